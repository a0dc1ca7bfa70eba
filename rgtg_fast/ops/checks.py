"""Checks of the ops' arguments; every error names the argument, what came and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _shape_text(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    matches = tensor.dim() == len(shape)
    for got, wanted in zip(tensor.shape, shape, strict=False):  # a generator costs microseconds
        matches &= got == wanted or isinstance(wanted, str)
    if not matches:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; pass {_shape_text(shape)}")


def check_float(name: str, tensor: Tensor, shape: tuple[int | str, ...] | None) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; pass a floating-point tensor")
    if tensor.dtype not in _FLOATS:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; pass float64, float32, bfloat16 or float16"
        )
    if shape is not None:
        check_shape(name, tensor, shape)


def check_ints(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; pass an int64 tensor")
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {tensor.dtype}; pass int64")
    check_shape(name, tensor, shape)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {other_name} is on {other.device}; "
            f"move {name} to {other.device}"
        )


def check_k(k: int, vocab: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} candidates asked for; pass k>=1")
    if k > vocab:
        raise ValueError(
            f"k={k} candidates asked for but the vocabulary has {vocab} tokens; pass k<={vocab}"
        )


def per_row_float(
    name: str, value: float | Tensor, rows: int, device: torch.device, positive: bool
) -> Tensor:
    wanted = "positive and finite" if positive else "finite"
    if not isinstance(value, Tensor):
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"{name}={value}; pass a {wanted} number")
        return torch.full((rows,), value, dtype=torch.float32, device=device)
    check_float(name, value, (rows,))
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; move it to {device}")
    # On a GPU reading values would wait for the device, in a compiled graph break it; there a bad
    # row is given slot -1 by the kernel.
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        good = torch.isfinite(value) & (value > 0) if positive else torch.isfinite(value)
        if not bool(good.all()):
            raise ValueError(f"{name}={value.tolist()}; every element must be {wanted}")
    return value.to(torch.float32)


def check_bias(bias: Tensor | float | None, hidden: Tensor) -> Tensor | None:
    """The bias of a head as a tensor of one element, or None."""
    if isinstance(bias, (int, float)):
        return torch.full((1,), bias, dtype=torch.float64, device=hidden.device)
    if bias is not None:
        check_float("bias", bias, None)
        if bias.numel() != 1:
            raise ValueError(
                f"bias has shape {list(bias.shape)}; pass a number or one element, or None"
            )
        check_device("bias", bias, "hidden", hidden)
    return bias


def per_row_policy(
    logprobs: Tensor,
    ids: Tensor,
    beta: float | Tensor,
    temperature: float | Tensor,
    seed: int | Tensor,
    position: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """beta, temperature, row seeds and positions, each ``[B]``, with ``logprobs`` checked too."""
    check_float("logprobs", logprobs, ("B", "k"))
    rows, k = logprobs.shape
    if k == 0:
        raise ValueError("logprobs has no candidates; pass [B, k] with k>=1")
    device = logprobs.device
    check_ints("ids", ids, (rows, k))
    check_device("ids", ids, "logprobs", logprobs)
    betas = per_row_float("beta", beta, rows, device, positive=False)
    temperatures = per_row_float("temperature", temperature, rows, device, positive=True)
    return betas, temperatures, *_per_row_noise(seed, position, rows, device)


def _per_row_noise(
    seed: int | Tensor, position: int | Tensor, rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    if isinstance(seed, int):
        seed = split_seed(seed, rows, device)
    if isinstance(position, int):
        position = torch.full((rows,), position, dtype=torch.int64, device=device)
    for name, value in (("seed", seed), ("position", position)):
        check_ints(name, value, (rows,))
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}; move it to {device}")
    return seed, position


def per_row_draw(
    temperature: float | Tensor | None,
    seed: int | Tensor | None,
    position: int | Tensor | None,
    rows: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Temperatures, row seeds and positions ``[B]``, as far as they are given."""
    if (seed is None) != (position is None):
        missing = "seed" if seed is None else "position"
        raise ValueError(f"{missing} is missing; a draw takes both seed and position")
    if temperature is None:
        if seed is not None:
            raise ValueError("seed came without temperature; pass temperature=1.0 to draw from s")
        return None, None, None
    temperatures = per_row_float("temperature", temperature, rows, device, positive=True)
    if seed is None or position is None:
        return temperatures, None, None
    return temperatures, *_per_row_noise(seed, position, rows, device)


def mixture_weights(weights: Sequence[float] | Tensor, count: int, first: Tensor) -> Tensor:
    """The weight of each of ``count`` tensors, float32 ``[B, n]``."""
    rows = first.shape[0]
    if not isinstance(weights, Tensor):
        if len(weights) != count or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"weights={list(weights)} for {count} logits; pass a finite number for each"
            )
        weights = torch.tensor(weights, dtype=torch.float32, device=first.device)
    shape = (count,) if weights.dim() == 1 else (rows, count)
    check_float("weights", weights, shape)
    check_device("weights", weights, "logits[0]", first)
    # The sum costs a tenth of what isfinite() does, a call of which is as long as a small kernel's.
    if (
        _readable(weights)
        and not math.isfinite(float(weights.detach().sum()))
        and not bool(torch.isfinite(weights).all())
    ):
        raise ValueError(f"weights={weights.tolist()}; every element must be finite")
    weights = weights.to(torch.float32)
    return weights if weights.dim() == 2 else weights.expand(rows, count)


def split_seed(seed: int, batch: int, device: torch.device | str | None = None) -> Tensor:
    """One seed per row from one int: Philox4x32-10 keyed by ``seed``, counting rows.

    Args:
        seed: an int in -2^63 .. 2^63 - 1.
        batch: rows B.
        device: where to put the result; CPU by default.

    Returns:
        Row seeds, int64 ``[B]``. Row b does not depend on B.

    Raises:
        ValueError: if the seed does not fit in int64.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} does not fit in int64; pass one in -2**63 .. 2**63 - 1")
    return reference.split_seed(seed, batch, device)


def check_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    start: Tensor,
    length: Tensor,
    rows: Tensor | None,
) -> None:
    check_float("q", q, ("B", "k", "Hq", "D"))
    batch, k, query_heads, width = q.shape
    check_float("k_prefix", k_prefix, (batch if rows is None else "N", "Hkv", "T", width))
    stores, heads = k_prefix.shape[:2]
    if heads == 0 or query_heads % heads:
        raise ValueError(
            f"q has {query_heads} heads and k_prefix {heads}; pass a multiple of the key heads"
        )
    check_float("v_prefix", v_prefix, tuple(k_prefix.shape))
    check_float("k_self", k_self, (batch, k, heads, width))
    check_float("v_self", v_self, (batch, k, heads, width))
    check_ints("start", start, (batch,))
    check_ints("length", length, (batch,))
    others = {"k_prefix": k_prefix, "v_prefix": v_prefix, "k_self": k_self, "v_self": v_self}
    for name, tensor in others.items():
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype} and q {q.dtype}; pass the same")
    for name, tensor in {**others, "start": start, "length": length}.items():
        check_device(name, tensor, "q", q)
    if rows is not None:
        check_ints("rows", rows, (batch,))
        check_device("rows", rows, "q", q)
        if _readable(rows) and not bool(((rows >= 0) & (rows < stores)).all()):
            raise ValueError(
                f"rows={rows.tolist()} reach outside the {stores} prefixes of k_prefix; "
                f"pass 0 .. {stores - 1}"
            )


def _readable(tensor: Tensor) -> bool:
    """Whether values may be checked: on a GPU that would wait for the device, in a compiled graph
    break it."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def answer_lengths(name: str, mask: Tensor, rewards: Tensor) -> Tensor:
    """Lengths int64 ``[N]`` of right-padded answers, with ``mask`` ``[N, L]`` checked."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} is a {type(mask).__name__}; pass a tensor of bools or integers")
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"{name} has dtype {mask.dtype}; pass bools or integers, 1 = real token")
    check_shape(name, mask, tuple(rewards.shape))
    check_device(name, mask, "r_chosen", rewards)
    live = mask if mask.dtype == torch.bool else mask != 0
    lengths = live.sum(dim=1)
    if _readable(mask) and live.shape[0]:
        # max() of bytes is many times faster than any() of bools.
        rises = (live[:, 1:] > live[:, :-1]).view(torch.uint8)
        if not bool(live[:, 0].all()) or (rises.numel() and bool(rises.max())):
            _refuse_mask(name, live, lengths)
    return lengths


def _refuse_mask(name: str, live: Tensor, lengths: Tensor) -> None:
    empty = lengths == 0
    if bool(empty.any()):
        raise ValueError(
            f"{name} has no real token in pair {int(empty.nonzero()[0])}: the answer is empty; "
            "drop the pair, or let the answer be its EOS"
        )
    wrong = (live != (torch.arange(live.shape[1], device=live.device) < lengths.unsqueeze(1))).any(
        dim=1
    )
    raise ValueError(
        f"{name} has a hole in pair {int(wrong.nonzero()[0])}; pass right-padded answers: "
        "ones from position 0 on, then zeros"
    )


def prefix_weights(weights: str | Tensor, rewards: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of each prefix length, ``[L]`` in ``dtype``."""
    width = rewards.shape[1]
    if isinstance(weights, str):
        if weights == "uniform":
            return torch.ones(width, dtype=dtype, device=rewards.device)
        if weights == "linear":
            return torch.arange(1, width + 1, dtype=dtype, device=rewards.device)
        raise ValueError(f"weights={weights!r} is unknown; pass 'uniform', 'linear' or a tensor")
    check_float("weights", weights, (width,))
    check_device("weights", weights, "r_chosen", rewards)
    if weights.requires_grad:
        raise ValueError("weights requires grad but is a constant of the loss; pass it detached")
    if _readable(weights) and not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("weights has a negative or non-finite element; pass finite ones, >= 0")
    return weights.to(dtype)


def pair_margins(margin: float | Tensor | None, rewards: Tensor, dtype: torch.dtype) -> Tensor:
    """The margin of each pair, ``[N]`` in ``dtype``."""
    rows = rewards.shape[0]
    if not isinstance(margin, Tensor):
        value = 0.0 if margin is None else float(margin)
        if not math.isfinite(value):
            raise ValueError(f"margin={margin}; pass a finite number, [N] or None")
        return torch.full((rows,), value, dtype=dtype, device=rewards.device)
    check_float("margin", margin, (rows,))
    check_device("margin", margin, "r_chosen", rewards)
    if margin.requires_grad:
        raise ValueError("margin requires grad but is a constant of the loss; pass it detached")
    if _readable(margin) and not bool(torch.isfinite(margin).all()):
        raise ValueError(f"margin={margin.tolist()}; every element must be finite")
    return margin.to(dtype)


def check_pair_prefixes(first: int, end: Tensor, weights: str | Tensor) -> None:
    """Every pair must have a prefix of ``first`` tokens or more, and weight on its prefixes."""
    if not isinstance(first, int) or first < 1:
        raise ValueError(f"first={first}; pass the shortest prefix length, an int >= 1")
    if not _readable(end) or end.numel() == 0:
        return
    if int(end.min()) < first:
        pair = int(end.argmin())
        raise ValueError(
            f"first={first} but both answers of pair {pair} are shorter (at most {int(end[pair])} "
            "tokens); pass a smaller first or drop the pair"
        )
    if isinstance(weights, str):
        return
    weightless = weights[first - 1 :].cumsum(dim=0)[end - first] <= 0
    if bool(weightless.any()):
        pair = int(weightless.nonzero()[0])
        raise ValueError(
            f"weights are 0 at every prefix length of pair {pair} ({first} .. {int(end[pair])}); "
            "pass a positive weight there or drop the pair"
        )
