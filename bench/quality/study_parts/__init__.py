"""The parts of `bench/quality/study.py`."""
