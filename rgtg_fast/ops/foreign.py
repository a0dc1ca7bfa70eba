"""Private names of torch that the ops use; tests/ops/test_ops_foreign.py fails when one changes."""

from __future__ import annotations

import torch


def has_kernel_for(operator: str, key: str) -> bool:
    """Whether ``namespace::name`` has a kernel of its own for a dispatch key, such as ``"CUDA"``.

    torch (2.13) has no public way to ask: ``torch.library`` only tells by calling the operator.

    Raises:
        RuntimeError: if there is no such operator.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def sleep_on_gpu(cycles: int) -> None:
    """Keeps the current CUDA stream busy for so many cycles of its clock, without memory traffic.

    torch (2.13) has no public call for it; its own tests use this one.
    """
    torch.cuda._sleep(cycles)
