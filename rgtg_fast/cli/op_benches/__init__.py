"""The cases of the ops' benchmarks: ``<op>.cases(device)``, run by :mod:`..microbench`."""
