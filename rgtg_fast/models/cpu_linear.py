"""Linear layers on x86 CPUs, through oneDNN.

For k siblings torch's fp32 `linear` and `addmm` (MKL) take 2 to 3 times as long as for one row,
though they read the same weights once. oneDNN's kernel, which torch ships as
`mkldnn._linear_pointwise`, took 0.4 to 0.8 of MKL's time for k siblings, half for one row of an
`nn.Linear`, and 0.9 for whole prompts (bench/README.md). It reads the weights as they are
stored; nothing is packed or copied.

bf16 layers run there anyhow, and what costs is the order of the weights in memory: packed for the
kernel they take half the time for one row and two thirds for k siblings, and give the same bits. A
twin packs a layer once it has served `_USES` steps, so a short call pays for nothing, and drops it
with the call: whatever happens to the weights between two calls is seen. Within one, a change in
place or a new tensor is; only one that passes torch's version counter by (through `.data`, numpy,
a fused optimizer or another process) waits for the next call. Packed weights double a model's
memory for that long, by `_ROOM` at most. All runs on torch's own threads.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .foreign import (
    FORWARD_HOOKS,
    PARAMETERS,
    PRE_HOOKS,
    has_onednn_linear,
    onednn_linear,
    onednn_pack,
)

_LARGE = 1 << 19  # weights; in a smaller layer the call's overhead (30 µs) outweighs its gain
_WIDE = 128  # inputs; with fewer the kernel is no faster
_USES = 8  # packing costs what it saves in 5 to 10 steps
_ROOM = 1 << 30  # bytes of packed weights, for each model
_ROWS = 256  # tokens of a forward; for more of them packing saves nothing


def quicken(twins: list[nn.Module]) -> None:
    """Give the linear layers among `twins` (see twin.py) that can take it the faster kernel.

    Only plain `nn.Linear` and GPT-2's `Conv1D` without hooks, with fp32 or bf16 weights on CPU.
    """
    if not has_onednn_linear():
        return
    room = _ROOM
    for module in twins:  # there are hundreds, so no function call for each
        quick = _QUICK.get(type(module))
        if quick is None:
            continue
        attributes = module.__dict__
        weight: Any = attributes[PARAMETERS].get("weight")
        if (
            type(weight) is nn.Parameter
            and (weight.dtype is torch.float32 or weight.dtype is torch.bfloat16)
            and weight.numel() >= _LARGE
            and weight.shape[0 if quick is _Conv1D else 1] >= _WIDE
            and not weight.is_inference()  # they have no version
            and weight.device.type == "cpu"
            and not (attributes[FORWARD_HOOKS] or attributes[PRE_HOOKS])
            and "forward" not in attributes  # accelerate and others patch it too
        ):
            if weight.dtype is torch.float32:
                module.__class__ = quick
            elif weight.nbytes <= room:
                room -= weight.nbytes
                attributes[_PACKED] = _Packed()
                module.__class__ = _PACKS[quick]


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if _falls_through(x, torch.float32):
            return super().forward(x)
        return _product(x, self.weight, self.bias)


class _Conv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        # Conv1D stores its weights transposed: for one row the kernel is no faster.
        if rows < 2 or _falls_through(x, torch.float32):
            return super().forward(x)
        return _product(x, self.weight.t(), self.bias)


class _PackedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        packed = _packed(self, self.weight, x)
        if packed is None:
            return super().forward(x)
        return onednn_linear(x, packed, self.bias)


class _PackedConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        packed = _packed(self, self.weight.t(), x)
        if packed is None:
            return super().forward(x)
        return onednn_linear(x, packed, self.bias)


# Classes, not functions in the instances: dynamo compiles anew for every such function.
_QUICK: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, Conv1D: _Conv1D}
_PACKS: dict[type[nn.Module], type[nn.Module]] = {_Linear: _PackedLinear, _Conv1D: _PackedConv1D}


_PACKED = "rgtg_packed"  # attribute of a bf16 layer of a twin


class _Packed:
    """The packed weights of a layer, the uses before they were made, and what they were made of."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        # Held, or a tensor that later takes the place of this one could lie at its address.
        self.source: Tensor | None = None
        self.stamp, self.uses = (0, 0), 0


# Whether packed weights win, by shape and threads; what they give is the same bits either way.
_wins: dict[tuple, bool] = {}


def _packed(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor | None:
    """The packed `weight` [out, in] of a layer, where it is to be used for `x`."""
    if (
        torch.compiler.is_compiling()
        or _falls_through(x, torch.bfloat16)
        or x.numel() > _ROWS * x.shape[-1]
    ):
        return None
    packed: _Packed = layer.__dict__[_PACKED]
    stamp = (weight.data_ptr(), weight._version)
    if packed.weight is not None and packed.stamp == stamp:
        return packed.weight
    packed.weight = packed.source = None  # changed: the old one is wrong, and the uses begin anew
    packed.uses = packed.uses + 1 if packed.stamp == stamp else 0
    packed.stamp = stamp
    key = (tuple(weight.shape), weight.stride(), torch.get_num_threads())
    if packed.uses < _USES or not _wins.get(key, True):
        return None
    made = onednn_pack(weight.detach(), x.shape[-2])
    if key not in _wins:
        _wins[key] = _measured(weight, made, x)
    if _wins[key]:
        packed.weight, packed.source = made, weight.detach()
    return packed.weight


def _measured(weight: Tensor, packed: Tensor, x: Tensor) -> bool:
    """Whether the packed weights give the same bits, in less time."""
    if not torch.equal(nn.functional.linear(x, weight), onednn_linear(x, packed, None)):
        return False
    plain, fast = [], []
    for _ in range(7):  # in turns; the least of each counts
        start = time.perf_counter()
        nn.functional.linear(x, weight)
        between = time.perf_counter()
        onednn_linear(x, packed, None)
        plain.append(between - start)
        fast.append(time.perf_counter() - between)
    return min(fast) < 0.95 * min(plain)


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


def _falls_through(x: Tensor, dtype: torch.dtype) -> bool:
    return (
        x.numel() == 0
        or x.dtype is not dtype
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
    )
