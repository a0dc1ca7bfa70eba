"""candidate_attention in Triton: k sibling queries per row over one shared prefix, two launches.

``q [B, k, Hq, D]``, ``k_prefix, v_prefix [B, Hkv, T, D]``, ``k_self, v_self [B, k, Hkv, D]``,
``start, length`` int64 ``[B]`` -> ``[B, k, Hq, D]``; float32, bfloat16 or float16; D <= 256.

1. ``_attend_prefix``, grid (B * Hkv, splits, k * group / BLOCK_M): all k * (Hq / Hkv) queries that
   share a key head are rows of one tile, so a key is read once for all of them (flash decoding
   over siblings). A split writes its maximum, its sum of exponentials and its weighted values.
   The grid covers all T, so that lengths need not be copied to the host: a split outside
   ``start <= t < length`` does nothing. WIDEN: the interpreter's dot takes no bfloat16.
2. ``_merge_self``, grid (B * Hkv, k * group): merges the splits of one query and the sibling's own
   key and value by their log-sum-exp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, check, check_shape, on_device, power_of_two

MAX_SPLITS = 64
SHORTEST_SPLIT, LONGEST_SPLIT = 128, 1024
BUSY = 264  # programs that fill a large GPU: two for each of 132 multiprocessors


@triton.jit
def _cap(scores, softcap):
    """softcap * tanh(scores / softcap); the series keeps the digits of a small argument."""
    x = scores / softcap
    square = x * x
    series = (square * (62.0 / 2835) - 17.0 / 315) * square + 2.0 / 15
    series = x + x * square * (series * square - 1.0 / 3)
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    tanh = tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))
    return softcap * tanh


@triton.jit
def _attend_prefix(
    q, keys, values, start, length, scale, window, softcap, peaks, sums, partials,
    prefix, heads, group, queries, splits,
    q_row, q_slot, q_head, k_row, k_head, k_step, v_row, v_head, v_step,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr, IS_HALF: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // heads, pair % heads
    split = tl.program_id(1).to(tl.int64)
    query = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    asked = query < queries
    at = q + row * q_row + (query // group) * q_slot + (head * group + query % group) * q_head
    x = tl.load(at[:, None] + d[None, :], mask=asked[:, None] & in_head[None, :], other=0.0)
    if WIDEN:
        x = x.to(tl.float32)

    end = tl.load(length + row)
    begin = tl.maximum(tl.load(start + row), 0)
    end = tl.maximum(end, 0)  # end - window would overflow for a very negative end
    if HAS_WINDOW:
        begin = tl.maximum(begin, end - window + 1)
    begin = tl.maximum(begin, split * SPLIT)
    end = tl.minimum(tl.minimum(end, prefix), (split + 1) * SPLIT)

    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if begin < end:
        keys += row * k_row + head * k_head
        values += row * v_row + head * v_head
        for offset in range(0, SPLIT, BLOCK_N):
            t = split * SPLIT + offset + tl.arange(0, BLOCK_N)
            seen = (t >= begin) & (t < end)
            mask = seen[:, None] & in_head[None, :]
            key = tl.load(keys + t[:, None] * k_step + d[None, :], mask=mask, other=0.0)
            if WIDEN:
                key = key.to(tl.float32)
            scores = tl.dot(x, tl.trans(key), input_precision="ieee") * scale
            if HAS_SOFTCAP:
                scores = _cap(scores, softcap)
            scores = tl.where(seen[None, :], scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            reference = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            share = tl.exp(scores - reference[:, None])
            shrink = tl.exp(peak - reference)
            value = tl.load(values + t[:, None] * v_step + d[None, :], mask=mask, other=0.0)
            total = total * shrink + tl.sum(share, axis=1)
            acc = acc * shrink[:, None]
            # Split the weights into two parts of the values' type: rounding them to one would cost
            # more accuracy than rounding the result does. The second dot is hidden by memory time.
            high = share.to(value.dtype)
            low = (share - high.to(tl.float32)).to(value.dtype)
            if WIDEN:
                high, low, value = high.to(tl.float32), low.to(tl.float32), value.to(tl.float32)
            acc += tl.dot(high, value, input_precision="ieee")
            if IS_HALF:
                acc += tl.dot(low, value, input_precision="ieee")
            peak = new_peak

    place = (pair * splits + split) * queries + query
    tl.store(peaks + place, peak, mask=asked)
    tl.store(sums + place, total, mask=asked)
    if begin < end:
        target = partials + place[:, None] * D + d[None, :]
        tl.store(target, acc, mask=asked[:, None] & in_head[None, :])


@triton.jit
def _merge_self(
    q, k_self, v_self, scale, softcap, peaks, sums, partials, out,
    heads, group, queries, splits,
    q_row, q_slot, q_head, k_row, k_slot, k_head, v_row, v_slot, v_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1).to(tl.int64)
    row, head = pair // heads, pair % heads
    slot, query_head = query // group, head * group + query % group
    d = tl.arange(0, BLOCK_D)
    in_head = d < D

    x = tl.load(q + row * q_row + slot * q_slot + query_head * q_head + d, mask=in_head, other=0.0)
    key = tl.load(k_self + row * k_row + slot * k_slot + head * k_head + d, mask=in_head, other=0.0)
    score = tl.sum(x.to(tl.float32) * key.to(tl.float32), axis=0) * scale
    if HAS_SOFTCAP:
        score = _cap(score, softcap)

    split = tl.arange(0, SPLITS)
    place = (pair * splits + split) * queries + query
    peak = tl.load(peaks + place, mask=split < splits, other=-float("inf"))
    total = tl.load(sums + place, mask=split < splits, other=0.0)
    written = peak != -float("inf")
    top = tl.maximum(tl.max(peak, axis=0), score)
    weight = tl.where(written, tl.exp(peak - top), 0.0)
    own = tl.exp(score - top)
    mask = written[:, None] & in_head[None, :]
    parts = tl.load(partials + place[:, None] * D + d[None, :], mask=mask, other=0.0)
    value = tl.load(
        v_self + row * v_row + slot * v_slot + head * v_head + d, mask=in_head, other=0.0
    )
    mixed = tl.sum(parts * weight[:, None], axis=0) + own * value.to(tl.float32)
    mixed = mixed / (tl.sum(weight * total, axis=0) + own)
    at = ((row * (queries // group) + slot) * heads * group + query_head) * D + d
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=in_head)


def split_length(prefix: int, programs: int) -> int:
    """Positions per split: as long as the splits times ``programs`` (rows, heads and tiles) still
    keep the device busy, and so that there are at most MAX_SPLITS."""
    length = LONGEST_SPLIT
    while length > SHORTEST_SPLIT and programs * triton.cdiv(prefix, length) < BUSY:
        length //= 2
    return max(length, power_of_two(triton.cdiv(prefix, MAX_SPLITS)))


def candidate_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    rows, k, query_heads, width = q.shape
    heads, prefix = k_prefix.shape[1:3]
    check(heads > 0 and query_heads % heads == 0, "q must have a multiple of the key heads")
    check_shape("k_prefix", k_prefix, rows, heads, prefix, width)
    check_shape("v_prefix", v_prefix, rows, heads, prefix, width)
    check_shape("k_self", k_self, rows, k, heads, width)
    check_shape("v_self", v_self, rows, k, heads, width)
    check_shape("start", start, rows)
    check_shape("length", length, rows)
    check(window is None or window >= 1, "window must be at least 1")
    check(softcap is None or softcap > 0, "softcap must be positive")
    # The interpreter's conversion to bfloat16 truncates where the GPU's rounds, so there the
    # result leaves the kernel in float32.
    out = q.new_empty(q.shape, dtype=torch.float32 if INTERPRETED else q.dtype)
    if out.numel() == 0:
        return out.to(q.dtype)
    q, k_prefix, v_prefix, k_self, v_self = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_prefix, v_prefix, k_self, v_self)
    )
    group = query_heads // heads
    queries = k * group
    block_d = power_of_two(width, 16)
    key_bytes = block_d * q.element_size()  # shared memory of one key in a tile
    block_n, stages = (64, 3) if key_bytes <= 256 else (32, 2) if key_bytes <= 512 else (16, 1)
    # No tensor core takes float32: wide tiles of 64 queries would spill registers at four warps.
    spills = q.dtype == torch.float32 and block_d >= 128
    block_m = min(32 if spills else 64, power_of_two(queries, 16))
    tiles = triton.cdiv(queries, block_m)
    split = split_length(prefix, rows * heads * tiles)
    splits = max(1, triton.cdiv(prefix, split))
    peaks, sums = q.new_empty((2, rows, heads, splits, queries), dtype=torch.float32)
    partials = q.new_empty((rows, heads, splits, queries, width), dtype=torch.float32)
    cap = {"HAS_SOFTCAP": softcap is not None}
    with on_device(q):
        _attend_prefix[(rows * heads, splits, tiles)](
            q, k_prefix, v_prefix, start.contiguous(), length.contiguous(), scale, window or 0,
            softcap or 0.0, peaks, sums, partials, prefix, heads, group, queries, splits,
            *q.stride()[:3], *k_prefix.stride()[:3], *v_prefix.stride()[:3],
            D=width, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, SPLIT=split,
            HAS_WINDOW=window is not None, WIDEN=INTERPRETED,
            IS_HALF=q.dtype != torch.float32, **cap,
            num_warps=8 if spills else 4, num_stages=stages,
        )  # fmt: skip
        _merge_self[(rows * heads, queries)](
            q, k_self, v_self, scale, softcap or 0.0, peaks, sums, partials, out,
            heads, group, queries, splits,
            *q.stride()[:3], *k_self.stride()[:3], *v_self.stride()[:3],
            D=width, BLOCK_D=block_d, SPLITS=power_of_two(splits), **cap, num_warps=4,
        )  # fmt: skip
    return out.to(q.dtype)
