"""topk_logprobs in Triton: log-softmax and top-k in one read of the vocabulary, two launches.

``logits [B, V]`` any float -> ``logprobs`` float32 ``[B, k]``, ``ids`` int64 ``[B, k]``, k <= 64.

1. ``_reduce_groups``, grid (B, slices): a slice is TILE groups of GROUP = 256 consecutive logits.
   Each group leaves the 64-bit key of its best token, its maximum ``peak`` and
   ``rest = sum(exp(x - peak))`` over the others. A group stays within a warp, and the result
   depends neither on the slicing nor on the batch.
2. ``_merge``, grid (B,): the k best tokens lie in the k groups with the best keys (a token outside
   of them is beaten by k tokens, one in each). So the k best groups of V / 256 are taken, read
   again and cut into 16 parts each, the k best parts likewise, and the k best of the 16 k tokens
   left are the answer. No sort sees more than max(CHUNK, 16 k) keys.
   The log-sum-exp is merged in float64 as ``log(sum(exp(peak - max) * (1 + rest)))``: with the
   best token's 1 kept apart from ``rest`` the log-probability of a near-certain token keeps its
   digits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgtg_fast.ops.registry import MAX_CANDIDATES

from .launch import accumulator, check, on_device, power_of_two
from .ordered_key import NAN_CODE, NO_CODE, NO_KEY, best_of_rows, key_id, ordered, pack, top_keys

GROUP = 256
PART = 16
CHUNK = 1024  # group keys that are sorted at once
TILE = 8  # groups per program


@triton.jit
def _reduce_groups(
    logits, row_stride, vocab, groups, keys, peaks, rests,
    GROUP: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = ids < vocab
    x = tl.load(logits + row * row_stride + ids, mask=inside, other=-float("inf"))
    code, first = best_of_rows(tl.where(inside, ordered(x), NO_CODE), ids)

    x = x.to(ACC)
    peak = tl.max(tl.where(x != x, -float("inf"), x), axis=1)
    peak = tl.where(code == NAN_CODE, float("nan"), peak)
    share = tl.where(x == -float("inf"), 0.0, tl.exp(x - peak[:, None]))
    if tl.float32 == ACC:  # float64: rounded to a key, the first token need not be the largest
        share = tl.where(ids == first[:, None], 0.0, share)

    at = row * groups + group
    tl.store(keys + at, pack(code, first), mask=group < groups)
    tl.store(peaks + at, peak, mask=group < groups)
    tl.store(rests + at, tl.sum(share, axis=1), mask=group < groups)


@triton.jit(do_not_specialize=["k"])
def _merge(
    logits, row_stride, vocab, k, keys, peaks, rests, logprobs, ids_out, groups: tl.constexpr,
    GROUP: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr, LOG_CHUNK: tl.constexpr,
    K: tl.constexpr, LOG_K: tl.constexpr, LOG_PARTS: tl.constexpr, LOG_PART: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    chunk = tl.arange(0, CHUNK)

    best = tl.full([K], NO_KEY, tl.int64)
    peak = tl.full([CHUNK], -float("inf"), ACC)
    for start in range(0, groups, CHUNK):
        at = start + chunk
        key = tl.load(keys + row * groups + at, mask=at < groups, other=NO_KEY)
        found = top_keys(key, K, LOG_CHUNK, LOG_K)
        both = tl.reshape(tl.join(best, found), [2 * K])
        best = top_keys(both, K, LOG_K + 1, LOG_K)
        x = tl.load(peaks + row * groups + at, mask=at < groups, other=-float("inf"))
        peak = tl.where((x > peak) | (x != x), x, peak)
    has_nan = tl.max((peak != peak).to(tl.int32), axis=0) == 1
    top = tl.max(tl.where(peak != peak, -float("inf"), peak), axis=0)
    top = tl.where(has_nan, float("nan"), top)

    sums = tl.zeros([CHUNK], tl.float64)
    for start in range(0, groups, CHUNK):
        at = start + chunk
        x = tl.load(peaks + row * groups + at, mask=at < groups, other=-float("inf"))
        rest = tl.load(rests + row * groups + at, mask=at < groups, other=0.0).to(tl.float64)
        if tl.float32 == ACC:
            rest += 1.0
        sums += tl.where(x == -float("inf"), 0.0, tl.exp(x - top).to(tl.float64) * rest)
    total = tl.sum(sums, axis=0)

    group = key_id(best) // GROUP
    ids = (group * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    ids = tl.where((best == NO_KEY)[:, None], vocab, ids)
    x = tl.load(logits + ids, mask=ids < vocab, other=-float("inf"))
    code = tl.where(ids < vocab, ordered(x), NO_CODE)
    PARTS: tl.constexpr = K * (GROUP // PART)
    code, first = best_of_rows(
        tl.reshape(code, [PARTS, PART]), tl.reshape(ids.to(tl.int32), [PARTS, PART])
    )
    best = top_keys(pack(code, first), K, LOG_PARTS, LOG_K)

    part = key_id(best) // PART
    ids = (part * PART)[:, None] + tl.arange(0, PART)[None, :]
    ids = tl.where((best == NO_KEY)[:, None], vocab, ids)
    x = tl.load(logits + ids, mask=ids < vocab, other=-float("inf"))
    key = pack(tl.where(ids < vocab, ordered(x), NO_CODE), ids)
    best = top_keys(tl.reshape(key, [K * PART]), K, LOG_K + LOG_PART, LOG_K)

    slots = tl.arange(0, K)
    ids = key_id(best)
    x = tl.load(logits + ids, mask=slots < k, other=0.0).to(ACC).to(tl.float64)
    logprob = tl.where(x == -float("inf"), x, (x - top.to(tl.float64)) - tl.log(total))
    logprob = tl.where(total != total, float("nan"), logprob)
    tl.store(logprobs + row * k + slots, logprob.to(tl.float32), mask=slots < k)
    tl.store(ids_out + row * k + slots, ids, mask=slots < k)


def topk_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    most = min(vocab, MAX_CANDIDATES)
    check(1 <= k <= most, f"k={k} must be between 1 and {most}")
    logprobs = logits.new_empty((rows, k), dtype=torch.float32)
    ids = logits.new_empty((rows, k), dtype=torch.int64)
    if rows == 0:
        return logprobs, ids
    if vocab > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    acc = accumulator(logits)
    groups = triton.cdiv(vocab, GROUP)
    keys = logits.new_empty((rows, groups), dtype=torch.int64)
    wide = torch.float64 if acc == tl.float64 else torch.float32
    peaks, rests = logits.new_empty((2, rows, groups), dtype=wide)
    candidates = power_of_two(k, 2)
    chunk = min(CHUNK, power_of_two(groups, candidates))
    parts = candidates * (GROUP // PART)
    with on_device(logits):
        _reduce_groups[(rows, triton.cdiv(groups, TILE))](
            logits, logits.stride(0), vocab, groups, keys, peaks, rests,
            GROUP=GROUP, TILE=TILE, ACC=acc, num_warps=4,
        )  # fmt: skip
        _merge[(rows,)](
            logits, logits.stride(0), vocab, k, keys, peaks, rests, logprobs, ids, groups,
            GROUP=GROUP, PART=PART, CHUNK=chunk, LOG_CHUNK=chunk.bit_length() - 1,
            K=candidates, LOG_K=candidates.bit_length() - 1,
            LOG_PARTS=parts.bit_length() - 1, LOG_PART=PART.bit_length() - 1,
            ACC=acc, num_warps=8,
        )  # fmt: skip
    return logprobs, ids
