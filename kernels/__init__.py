"""Triton kernels, one module per op, installed as ``rgtg_fast.kernels``."""
