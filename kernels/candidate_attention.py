"""candidate_attention in Triton: k sibling queries per row over one shared prefix, two launches.

``q [B, k, Hq, D]``, ``k_prefix, v_prefix [N, Hkv, T, D]``, ``k_self, v_self [B, k, Hkv, D]``,
``start, length`` and ``rows`` int64 ``[B]`` -> ``[B, k, Hq, D]``; float32, bfloat16 or float16;
D <= 256.

1. ``_attend_prefix``, grid (B * Hkv, splits, k * group / BLOCK_M): all k * (Hq / Hkv) queries that
   share a key head are rows of one tile, so a key is read once for all of them (flash decoding
   over siblings). The positions that are live, start <= t < length, are dealt to the splits on the
   device, so that lengths need not be copied to the host. A split writes its maximum, its sum of
   exponentials and its weighted values. POSITIONS, the
   prefix, is set for the interpreter alone: its dot takes no bfloat16 and its loops no bound that
   was loaded.
2. ``_merge_self``, grid (B * Hkv, k * group): merges the splits of one query and the sibling's own
   key and value by their log-sum-exp.

Nothing that grows with the prefix is compiled in: neither kernel is compiled anew while an answer
grows. Strides are counted in units of UNIT = 16 elements where they allow it, for the same reason:
the compiler then knows that rows are aligned, and need not look at each stride.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, Launch, check, on_device, power_of_two

MAX_SPLITS = 64
SHORTEST_SPLIT, LONGEST_SPLIT = 128, 1024
NAMES = ("q", "k_prefix", "v_prefix", "k_self", "v_self", "start", "length", "rows")
COUNTS = ("heads", "group", "queries", "splits", "stores")
STRIDES = tuple(f"{x}_{of}" for x in "qkv" for of in ("row", "slot", "head", "step"))
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


@triton.jit(do_not_specialize=[*COUNTS, "prefix", "window", *STRIDES])
def _attend_prefix(
    q, keys, values, start, length, rows, work, scale, softcap, heads, group, queries, splits,
    stores: tl.int64, prefix: tl.int64, window: tl.int64,
    q_row: tl.int64, q_slot: tl.int64, q_head: tl.int64,
    k_row: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_row: tl.int64, v_head: tl.int64, v_step: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_HALF: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // heads, pair % heads
    split = tl.program_id(1)
    query = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    asked = query < queries
    at = row * q_row + (query // group) * q_slot + (head * group + query % group) * q_head
    at = q + at * UNIT
    x = tl.load(at[:, None] + d[None, :], mask=asked[:, None] & in_head[None, :], other=0.0)
    if POSITIONS:
        x = x.to(tl.float32)

    store = tl.load(rows + row) if HAS_ROWS else row
    begin = tl.maximum(tl.load(start + row), 0)
    end = tl.maximum(tl.load(length + row), 0)  # end - window would overflow for a negative end
    if HAS_WINDOW:
        begin = tl.maximum(begin, end - window + 1)
    end = tl.where((store >= 0) & (store < stores), tl.minimum(end, prefix), 0)
    begin = tl.minimum(begin, end)  # end - begin, cut to 32 bits below, could turn positive
    share = (end - begin + splits - 1) // splits
    share = (share + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    begin += split * share
    count = tl.minimum(end - begin, share).to(tl.int32)

    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    place = (pair * queries + query) * splits + split
    numbers = tl.num_programs(0).to(tl.int64) * queries * splits
    if count > 0:
        keys += (store * k_row + head * k_head + begin * k_step) * UNIT
        values += (store * v_row + head * v_head + begin * v_step) * UNIT
        for first in range(0, POSITIONS if POSITIONS else count, BLOCK_N):
            t = first + tl.arange(0, BLOCK_N)
            seen = t < count
            mask = seen[:, None] & in_head[None, :]
            place_k = t.to(tl.int64) * k_step * UNIT
            key = tl.load(keys + place_k[:, None] + d[None, :], mask=mask, other=0.0)
            if POSITIONS:
                key = key.to(tl.float32)
            scores = tl.dot(x, tl.trans(key), input_precision="ieee") * scale
            if HAS_SOFTCAP:
                scores = _cap(scores, softcap)
            scores = tl.where(seen[None, :], scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            reference = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            weight = tl.exp(scores - reference[:, None])
            shrink = tl.exp(peak - reference)
            place_v = t.to(tl.int64) * v_step * UNIT
            value = tl.load(values + place_v[:, None] + d[None, :], mask=mask, other=0.0)
            total = total * shrink + tl.sum(weight, axis=1)
            acc = acc * shrink[:, None]
            # Split the weights into two parts of the values' type: rounding them to one would cost
            # more accuracy than rounding the result does. The second dot is hidden by memory time.
            high = weight.to(value.dtype)
            low = (weight - high.to(tl.float32)).to(value.dtype)
            if POSITIONS:
                high, low, value = high.to(tl.float32), low.to(tl.float32), value.to(tl.float32)
            acc += tl.dot(high, value, input_precision="ieee")
            if IS_HALF:
                acc += tl.dot(low, value, input_precision="ieee")
            peak = new_peak
        target = work + place[:, None] * D + d[None, :]
        tl.store(target, acc, mask=asked[:, None] & in_head[None, :])
    tl.store(work + numbers * D + place, peak, mask=asked)
    tl.store(work + numbers * (D + 1) + place, total, mask=asked)


@triton.jit(do_not_specialize=[*COUNTS, *STRIDES])
def _merge_self(
    q, k_self, v_self, rows, work, out, scale, softcap, heads, group, queries, splits,
    stores: tl.int64, q_row: tl.int64, q_slot: tl.int64, q_head: tl.int64,
    k_row: tl.int64, k_slot: tl.int64, k_head: tl.int64,
    v_row: tl.int64, v_slot: tl.int64, v_head: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1).to(tl.int64)
    row, head = pair // heads, pair % heads
    slot, query_head = query // group, head * group + query % group
    d = tl.arange(0, BLOCK_D)
    in_head = d < D

    at = (row * q_row + slot * q_slot + query_head * q_head) * UNIT
    x = tl.load(q + at + d, mask=in_head, other=0.0)
    at = (row * k_row + slot * k_slot + head * k_head) * UNIT
    key = tl.load(k_self + at + d, mask=in_head, other=0.0)
    score = tl.sum(x.to(tl.float32) * key.to(tl.float32), axis=0) * scale
    if HAS_SOFTCAP:
        score = _cap(score, softcap)

    numbers = tl.num_programs(0).to(tl.int64) * queries * splits
    first = (pair * queries + query) * splits
    peaks = work + numbers * D + first
    sums = work + numbers * (D + 1) + first
    CHUNK: tl.constexpr = 8
    chunk = tl.arange(0, CHUNK)
    largest = tl.full([CHUNK], -float("inf"), tl.float32)
    split = 0
    while split < splits:
        inside = split + chunk < splits
        peak = tl.load(peaks + split + chunk, mask=inside, other=-float("inf"))
        largest = tl.maximum(largest, peak)
        split += CHUNK
    top = tl.maximum(tl.max(largest, axis=0), score)
    own = tl.exp(score - top)
    at = (row * v_row + slot * v_slot + head * v_head) * UNIT
    value = tl.load(v_self + at + d, mask=in_head, other=0.0)
    mixed = own * value.to(tl.float32)
    total = own
    split = 0
    while split < splits:
        inside = split + chunk < splits
        peak = tl.load(peaks + split + chunk, mask=inside, other=-float("inf"))
        part = tl.load(sums + split + chunk, mask=inside, other=0.0)
        written = peak != -float("inf")
        weight = tl.where(written, tl.exp(peak - top), 0.0)
        place = work + (first + split + chunk)[:, None] * D + d[None, :]
        parts = tl.load(place, mask=written[:, None] & in_head[None, :], other=0.0)
        mixed += tl.sum(parts * weight[:, None], axis=0)
        total += tl.sum(weight * part, axis=0)
        split += CHUNK
    mixed = mixed / total
    if HAS_ROWS:  # a kernel cannot raise
        store = tl.load(rows + row)
        mixed = tl.where((store >= 0) & (store < stores), mixed, float("nan"))
    at = ((row * (queries // group) + slot) * heads * group + query_head) * D + d
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=in_head)


def split_count(prefix: int, programs: int) -> int:
    """Into how many splits the prefix is cut, ``programs`` (rows, heads and tiles) apiece: as few
    as keep the device busy, none longer than LONGEST_SPLIT, nor shorter than SHORTEST_SPLIT."""
    wanted = max(-(-BUSY // programs), -(-prefix // LONGEST_SPLIT))
    return max(1, min(wanted, -(-prefix // SHORTEST_SPLIT), MAX_SPLITS))


class _Plan(NamedTuple):
    """How arguments of one layout are launched."""

    dense: bool  # every last dimension is; else the rest does not hold
    floats: int  # of the work space
    attend: Launch
    merge: Launch


@lru_cache(maxsize=4096)
def _plan(
    dtypes: tuple[torch.dtype, ...], shapes: tuple[torch.Size, ...],
    strides: tuple[tuple[int, ...], ...], scale: float, window: int | None, softcap: float | None,
) -> _Plan:  # fmt: skip
    """Of q, k_prefix, v_prefix, k_self, v_self, start, length and rows, which may be missing; the
    strides are those of the first five. Raises RuntimeError for what must not be read."""
    batch, k, query_heads, width = shapes[0]
    stores, heads, prefix, _ = shapes[1]
    has_rows = len(shapes) == 8
    check(heads > 0 and query_heads % heads == 0, "q must have a multiple of the key heads")
    past = (stores if has_rows else batch, heads, prefix, width)
    wanted = (shapes[0], past, past, *[(batch, k, heads, width)] * 2, *[(batch,)] * 3)
    for name, shape, right in zip(NAMES, shapes, wanted, strict=False):
        check(shape == right, f"{name} has shape {list(shape)}; pass {list(right)}")
    check(set(dtypes[:5]) == {dtypes[0]}, "keys and values must have q's dtype")
    check(batch == 0 or set(dtypes[5:]) == {torch.int64}, "start, length and rows must be int64")
    check(window is None or window >= 1, "window must be at least 1")
    check(softcap is None or softcap > 0, "softcap must be positive")
    group = query_heads // heads
    queries, pairs = k * group, batch * heads
    dtype, is_half = dtypes[0], dtypes[0] != torch.float32
    block_d = power_of_two(width, 16)
    key_bytes = block_d * dtype.itemsize  # shared memory of one key in a tile
    block_n, stages = (64, 3) if key_bytes <= 256 else (32, 2) if key_bytes <= 512 else (16, 1)
    # Wide tiles of 64 queries would spill registers: in float32, which no tensor core takes, from
    # 128 on, even of 32 at four warps; in half precision beyond 128.
    spills = block_d > 128 if is_half else block_d >= 128
    block_m = min(32 if spills else 64, power_of_two(queries, 16))
    tiles = max(1, -(-queries // block_m))
    splits = split_count(prefix, max(1, pairs * tiles))
    used = [stride for of_one in strides for stride in of_one[:3]]
    unit = 1 if any(stride % 16 for stride in used) else 16
    used = [stride // unit for stride in used]
    numbers = (scale, softcap or 0.0, heads, group, queries, splits, stores)
    constants = (width, block_d, unit, softcap is not None, has_rows)
    own = (block_m, block_n, window is not None, is_half, prefix if INTERPRETED else 0)
    return _Plan(
        width == 1 or all(of_one[3] == 1 for of_one in strides),
        pairs * queries * splits * (width + 2),
        Launch(
            _attend_prefix, dtypes, (pairs, splits, tiles),
            (*numbers, prefix, window or 0, *used[:9]), (*constants, *own),
            8 if spills and not is_half else 4, stages,
        ),
        Launch(
            _merge_self, dtypes, (pairs, queries, 1), (*numbers, *used[:3], *used[9:]), constants,
            4, 1,
        ),
    )  # fmt: skip


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
    rows: Tensor | None = None,
) -> Tensor:
    tensors = (q, k_prefix, v_prefix, k_self, v_self)
    bounds = (start, length) if rows is None else (start, length, rows)
    every = tensors + bounds
    plan = _plan(
        tuple([x.dtype for x in every]), tuple([x.shape for x in every]),
        tuple([x.stride() for x in tensors]), scale, window, softcap,
    )  # fmt: skip
    if not plan.dense:
        q, k_prefix, v_prefix, k_self, v_self = (
            x if x.stride(-1) == 1 else x.contiguous() for x in tensors
        )
        return candidate_attention(
            q, k_prefix, v_prefix, k_self, v_self, start, length, scale, window, softcap, rows
        )
    # The interpreter's conversion to bfloat16 truncates where the GPU's rounds, so there the
    # result leaves the kernel in float32.
    out = q.new_empty(q.shape, dtype=torch.float32 if INTERPRETED else q.dtype)
    if plan.floats:
        work = q.new_empty(plan.floats, dtype=torch.float32)
        start, length = start.contiguous(), length.contiguous()
        rows = None if rows is None else rows.contiguous()
        with on_device(q):
            plan.attend(q, k_prefix, v_prefix, start, length, rows, work)
            plan.merge(q, k_self, v_self, rows, work, out)
    return out.to(q.dtype) if INTERPRETED else out
