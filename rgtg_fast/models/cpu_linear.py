"""fp32 linear layers on x86 CPUs, through oneDNN.

For k siblings torch's fp32 `linear` and `addmm` (MKL) take 2 to 3 times the time of one row,
although the weights are read once all the same. oneDNN's kernel, which torch ships as
`mkldnn._linear_pointwise`, took 0.4 to 0.8 of MKL's time there, half of it for one row of an
`nn.Linear`, and 0.9 of it for whole prompts (bench/README.md). It reads the weights as they are
stored; nothing is packed or copied.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Rows from which it is faster: one row of a Conv1D, whose weights lie the other way round, is not.
_FEWEST: dict[type, int] = {nn.Linear: 1, Conv1D: 2}
_LARGE = 1 << 19  # weights; below, the call's own cost (some 30 µs) outweighs the gain
_WIDE = 128  # inputs; rows of weights that are shorter are read no faster


class FastLinears:
    """The linear layers of `model` that can take the faster kernel; `active()` switches them.

    Only plain `nn.Linear` and GPT-2's `Conv1D` without hooks, with fp32 weights on CPU. The modules
    keep their parameters; inside `active()` each has an instance attribute `forward`, gone after.
    """

    def __init__(self, model: nn.Module) -> None:
        self._patches: list[tuple[dict, Callable]] = []
        if not _available():
            return
        for module in model.modules():
            if type(module) in (nn.Linear, Conv1D) and _is_plain(module):
                self._patches.append((module.__dict__, _forward_of(module)))

    @contextmanager
    def active(self) -> Iterator[None]:
        for attributes, forward in self._patches:
            attributes["forward"] = forward
        try:
            yield
        finally:
            for attributes, _ in self._patches:
                del attributes["forward"]


def _available() -> bool:
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_plain(module: nn.Module) -> bool:
    weight: Any = module.weight
    return (
        type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.numel() >= _LARGE
        and weight.shape[0 if isinstance(module, Conv1D) else 1] >= _WIDE
        and weight.device.type == "cpu"
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__  # accelerate and others patch it too
    )


def _forward_of(module: Any) -> Callable[[Tensor], Tensor]:
    original = module.forward
    stored_by_input = isinstance(module, Conv1D)
    fewest = _FEWEST[type(module)]

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        if rows < fewest or x.dtype != torch.float32 or torch.is_grad_enabled():
            return original(x)
        weight = module.weight.t() if stored_by_input else module.weight
        return torch.ops.mkldnn._linear_pointwise(x, weight, module.bias, "none", [], "")

    return forward
