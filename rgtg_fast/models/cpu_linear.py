"""fp32 linear layers on x86 CPUs, through oneDNN.

For k siblings torch's fp32 `linear` and `addmm` (MKL) take 2 to 3 times as long as for one row,
though they read the same weights once. oneDNN's kernel, which torch ships as
`mkldnn._linear_pointwise`, took 0.4 to 0.8 of MKL's time for k siblings, half for one row of an
`nn.Linear`, and 0.9 for whole prompts (bench/README.md). It reads the weights as they are
stored; nothing is packed or copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .foreign import FORWARD_HOOKS, PARAMETERS, PRE_HOOKS, has_onednn_linear, onednn_linear

_LARGE = 1 << 19  # weights; in a smaller layer the call's overhead (30 µs) outweighs its gain
_WIDE = 128  # inputs; with fewer the kernel is no faster


def quicken(twins: list[nn.Module]) -> None:
    """Give the linear layers among `twins` (see twin.py) that can take it the faster kernel.

    Only plain `nn.Linear` and GPT-2's `Conv1D` without hooks, with fp32 weights on CPU.
    """
    if not has_onednn_linear():
        return
    for module in twins:  # there are hundreds, so no function call for each
        quick = _QUICK.get(type(module))
        if quick is None:
            continue
        attributes = module.__dict__
        weight: Any = attributes[PARAMETERS].get("weight")
        if (
            type(weight) is nn.Parameter
            and weight.dtype is torch.float32
            and weight.numel() >= _LARGE
            and weight.shape[0 if quick is _Conv1D else 1] >= _WIDE
            and weight.device.type == "cpu"
            and not (attributes[FORWARD_HOOKS] or attributes[PRE_HOOKS])
            and "forward" not in attributes  # accelerate and others patch it too
        ):
            module.__class__ = quick


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if _falls_through(x):
            return nn.functional.linear(x, self.weight, self.bias)
        return _product(x, self.weight, self.bias)


class _Conv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        # Conv1D stores its weights transposed: for one row the kernel is no faster.
        if rows < 2 or _falls_through(x):
            return super().forward(x)
        return _product(x, self.weight.t(), self.bias)


# Classes, not functions in the instances: dynamo compiles anew for every such function.
_QUICK: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, Conv1D: _Conv1D}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return _traceable(x, weight, bias)
    return onednn_linear(x, weight, bias)


# inductor takes oneDNN's operator for weights that are constants alone; this one it calls as it is.
_library = torch.library.Library("rgtg_fast_models", "DEF")
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


_library.impl("onednn_linear", onednn_linear, "CPU")


@torch.library.register_fake("rgtg_fast_models::onednn_linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_traceable = torch.ops.rgtg_fast_models.onednn_linear.default


def _falls_through(x: Tensor) -> bool:
    return (
        x.numel() == 0
        or x.dtype is not torch.float32
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
    )
