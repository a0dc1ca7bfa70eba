"""fp32 linear layers on x86 CPUs, through oneDNN.

For k siblings torch's fp32 `linear` and `addmm` (MKL) take 2 to 3 times as long as for one row,
though they read the same weights once. oneDNN's kernel, which torch ships as
`mkldnn._linear_pointwise`, took 0.4 to 0.8 of MKL's time for k siblings, half for one row of an
`nn.Linear`, and 0.9 for whole prompts (bench/README.md). It reads the weights as they are
stored; nothing is packed or copied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .foreign import FORWARD_HOOKS, PARAMETERS, PRE_HOOKS, onednn_linear

_LARGE = 1 << 19  # weights; in a smaller layer the call's overhead (30 µs) outweighs its gain
_WIDE = 128  # inputs; with fewer the kernel is no faster


def quicken(twins: list[nn.Module]) -> None:
    """Give the linear layers among `twins` (see twin.py) that can take it the faster kernel.

    Only plain `nn.Linear` and GPT-2's `Conv1D` without hooks, with fp32 weights on CPU.
    """
    kernel = onednn_linear()
    if kernel is None:
        return
    for module in twins:  # there are hundreds, so no function call for each
        kind = type(module)
        if kind is not nn.Linear and kind is not Conv1D:
            continue
        attributes = module.__dict__
        weight: Any = attributes[PARAMETERS].get("weight")
        if (
            type(weight) is nn.Parameter
            and weight.dtype is torch.float32
            and weight.numel() >= _LARGE
            and weight.shape[0 if kind is Conv1D else 1] >= _WIDE
            and weight.device.type == "cpu"
            and not (attributes[FORWARD_HOOKS] or attributes[PRE_HOOKS])
            and "forward" not in attributes  # accelerate and others patch it too
        ):
            bias = attributes[PARAMETERS]["bias"]
            forward = _conv1d if kind is Conv1D else _linear
            # Not bound to the module: that would be a reference cycle.
            attributes["forward"] = partial(forward, kernel, weight, bias)


def _linear(
    kernel: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, x: Tensor
) -> Tensor:
    if _falls_through(x):
        return nn.functional.linear(x, weight, bias)
    return kernel(x, weight, bias, "none", [], "")


def _conv1d(kernel: Callable[..., Tensor], weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    rows = x.numel() // max(1, x.shape[-1])
    # Conv1D stores its weights transposed: for one row the kernel is no faster.
    if rows < 2 or _falls_through(x):
        out = torch.addmm(bias, x.view(-1, x.shape[-1]), weight)
        return out.view(*x.shape[:-1], weight.shape[1])
    return kernel(x, weight.t(), bias, "none", [], "")


def _falls_through(x: Tensor) -> bool:
    return (
        x.numel() == 0
        or x.dtype is not torch.float32
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
    )
