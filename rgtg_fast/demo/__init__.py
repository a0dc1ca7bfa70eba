"""The embedded task, models and demo: `python -m rgtg_fast demo`."""
