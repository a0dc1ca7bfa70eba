"""What a decoding step of a pair of models costs at least: bytes, operations, and what they take.

    memory(B) = W_lm + W_rm + B T (kv_lm + kv_rm) + B k kv_rm + prompts' activations
    model(t, rows) = max((W_step + rows T kv) / bandwidth, 2 P_step t rows / flops) + kernels
    guided step = model_lm(1, B) + model_rm(k, B)

W_step are the weights that a step reads: all but the input embeddings, of which it reads a row
(unless they are the output layer too). T is a row's whole context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.foreign import cache_of

GB = 1e9


class Device(NamedTuple):
    """A kind of accelerator: memory in bytes, bytes per second, and dense operations per second in
    16 bits, as its maker states them."""

    memory: float
    bandwidth: float
    flops: float


DEVICES = {
    "b200": Device(180 * GB, 8000 * GB, 2250e12),
    "h200": Device(141 * GB, 4800 * GB, 989e12),
    "h100": Device(80 * GB, 3350 * GB, 989e12),
    "h100-pcie": Device(80 * GB, 2000 * GB, 756e12),
    "a100-80gb": Device(80 * GB, 2039 * GB, 312e12),
    "a100-40gb": Device(40 * GB, 1555 * GB, 312e12),
    "l40s": Device(48 * GB, 864 * GB, 362e12),
    "l4": Device(24 * GB, 300 * GB, 121e12),
    "rtx4090": Device(24 * GB, 1008 * GB, 165e12),
}
# Assumed, as no run on a GPU stands in bench/results yet.
REACHED = 0.85  # of the bandwidth, by a product that reads weights
REACHED_FLOPS = 0.6  # of the operations
KERNELS = 16  # of a layer with a compiled forward, `bench/bench_launches.py`
KERNEL_SECONDS = 1.6e-6  # of a small kernel in a CUDA graph
RESERVED = 1.5 * GB  # the CUDA context, kernels and the allocator's rounding


@dataclass(frozen=True)
class Sized:
    """A model: bytes of its parameters; those that a step reads, and their bytes; bytes of keys and
    values of a token; layers; width of the widest activation of a token, in bytes."""

    nbytes: int
    step_parameters: int
    step_bytes: int
    kv_bytes: int
    layers: int
    activation_bytes: int

    def wider(self, factor: int) -> Sized:
        """The same with `factor` times as many bytes for each number."""
        of_bytes = ("nbytes", "step_bytes", "kv_bytes", "activation_bytes")
        return replace(self, **{name: factor * getattr(self, name) for name in of_bytes})


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a step reads, shared ones once."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    skipped = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    return [p for p in model.parameters() if id(p) not in skipped - of_head]


@torch.no_grad()
def sized(model: Any) -> Sized:
    """What a model, which may be on the meta device, costs."""
    device = next(model.parameters()).device
    ids = torch.zeros((1, 2), dtype=torch.int64, device=device)
    out = model(input_ids=ids, use_cache=True, return_dict=True)
    filled = cache_of(out)
    if filled is None:
        raise ValueError(
            f"{type(model).__name__} keeps no cache of keys and values; pass a decoder"
        )
    kv = sum(t.nbytes for layer in filled.layers for t in (layer.keys, layer.values))
    widths = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    size, config = model.dtype.itemsize, model.config.get_text_config()
    every, read = (sum(p.numel() for p in ps) for ps in (model.parameters(), weights_of(model)))
    inner = [w for w in widths if w < config.vocab_size] or [config.hidden_size]
    return Sized(
        nbytes=size * every,
        step_parameters=read,
        step_bytes=size * read,
        kv_bytes=kv // 2,
        layers=len(filled.layers),
        activation_bytes=3 * max(inner) * size,
    )


@dataclass(frozen=True)
class Pair:
    """A language model and what its reward adds: `reward` is a model of its own, which runs `k`
    tokens a step of a row (1 where it knows every token at once). None: the language model itself
    runs them, with `extra` bytes of a head or an adapter, and keeps `caches` sets of keys and
    values (2 with an adapter)."""

    lm: Sized
    reward: Sized | None
    k: int
    extra: int = 0
    caches: int = 1

    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.lm.nbytes + (self.extra if self.reward is None else self.reward.nbytes)

    def row_bytes(self, context: int) -> int:
        """Bytes of keys and values of a row of `context` tokens, its candidates included."""
        rm = self.lm if self.reward is None else self.reward
        if self.reward is None:
            return self.caches * (context + self.k) * rm.kv_bytes
        return context * self.lm.kv_bytes + (context + self.k) * rm.kv_bytes

    def rows_that_fit(self, context: int, device: Device) -> int:
        """Rows at once, when their prompts, as long as the context, are run together; 0 where the
        weights alone do not fit."""
        sizes = [self.lm] if self.reward is None else [self.lm, self.reward]
        passing = context * max(size.activation_bytes for size in sizes)
        left = device.memory - RESERVED - self.weight_bytes()
        return max(0, int(left // (self.row_bytes(context) + passing)))

    def plain_seconds(self, rows: int, context: int, device: Device) -> float:
        """Of a step of `rows` without a reward."""
        return seconds(self.lm, 1, rows, context, device)

    def guided_seconds(self, rows: int, context: int, device: Device) -> float:
        """Of a guided step of `rows`."""
        if self.reward is not None:
            step = seconds(self.lm, 1, rows, context, device)
            return step + seconds(self.reward, self.k, rows, context, device)
        step = seconds(self.lm, self.caches * self.k, rows, self.caches * context, device)
        return step + self.extra / (REACHED * device.bandwidth)


def seconds(model: Sized, tokens: int, rows: int, context: int, device: Device) -> float:
    """Of a forward of `tokens` a row, with `context` tokens a row in the cache."""
    moved = model.step_bytes + rows * context * model.kv_bytes
    reading = moved / (REACHED * device.bandwidth)
    computing = 2 * model.step_parameters * tokens * rows / (REACHED_FLOPS * device.flops)
    return max(reading, computing) + model.layers * KERNELS * KERNEL_SECONDS
