"""The parts of `bench/quality/study.py`: tasks, training, decoding, exact values, findings, plots."""
