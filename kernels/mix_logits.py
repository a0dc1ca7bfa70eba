"""mix_logits in Triton: the k best of a weighted sum of log-softmaxes, or draws, two launches.

``logits`` n tensors ``[B, V_i]`` any float, n <= 4, ``weights`` float32 ``[B, n]``, ``floor``,
``temperature`` float32, ``seed`` and ``position`` int64 ``[B]`` or None -> ``scores`` float32,
``ids`` int64, ``logprobs`` float32 ``[B, k]``, ``log_norm`` and ``kl`` float32 ``[B]`` (empty
without a temperature); k <= 64.

1. ``_mix_groups``, grid (B, slices): each group of GROUP = 256 tokens leaves the key of its best
   token, and the maximum and the sum of exponentials of each tensor and of the tempered mixture.
2. ``_mix_merge``, grid (B,): as in ``topk_logprobs``, the k best tokens lie in the k groups with
   the best keys, which are read again.

What orders the tokens is float32, each operation rounded once (no fused multiply-add, correctly
rounded division), so that ids are those of every other backend.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgtg_fast.ops.registry import MAX_CANDIDATES, MAX_MIXED

from .gumbel import gumbel_noise
from .launch import check, check_shape, on_device, power_of_two
from .ordered_key import NO_CODE, NO_KEY, best_of_rows, key_id, ordered, pack, top_keys

GROUP = 256
PART = 16
CHUNK = 1024  # group keys that are sorted at once
TILE = 4  # groups per program

_MINUS = tl.constexpr(-float("inf"))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _load(x, ids, vocab):
    """The logits of ``ids``; an id that the tensor lacks is -inf."""
    return tl.load(x + ids, mask=ids < vocab, other=-float("inf"))


@triton.jit
def _mix_in(mixed, x, weight, limit):
    """Adds a tensor to the mixture, in which logits below ``limit`` are impossible. What is -inf
    stays so: -inf plus inf would be NaN."""
    wide = x.to(tl.float32)
    total = mixed + tl.where(weight != 0, weight * wide, 0.0)
    return tl.where((mixed == _MINUS) | (wide < limit), _MINUS, total)


@triton.jit
def _limit(weight):
    """Below it is -inf alone, or nothing where the tensor takes no part."""
    return tl.where(weight != 0, _LOWEST, _MINUS)


@triton.jit
def _floor(floor, row, FLOOR: tl.constexpr):
    """The limit of the first tensor, in which -inf is impossible whatever its weight."""
    if FLOOR:
        bound = tl.load(floor + row)
        return tl.where(bound > _LOWEST, bound, _LOWEST)
    return _LOWEST


@triton.jit
def _value(mixed, ids, temperature, seed, position, NOISE: tl.constexpr):
    """What orders the tokens."""
    if NOISE:
        return tl.div_rn(mixed, temperature) + gumbel_noise(seed, position, ids.to(tl.int64))
    return mixed


@triton.jit
def _peak(x):
    """The largest of each row, NaN ignored."""
    return tl.max(tl.where(x != x, _MINUS, x), axis=1)


@triton.jit
def _shares(x, peak):
    return tl.where(x == _MINUS, 0.0, tl.exp(x - peak[:, None]))


@triton.jit
def _store_sum(x, parts, at, live):
    """Leaves the maximum and the sum of exponentials of each row at parts[0] and parts[1]."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    peak = _peak(x)
    tl.store(parts + at, peak.to(tl.float64), mask=live)
    return tl.sum(_shares(x, peak), axis=1).to(tl.float64)


@triton.jit
def _mix_groups(
    x0, x1, x2, x3, row0, row1, row2, row3, vocab0, vocab1, vocab2, vocab3,
    weights, floor, temperature, seed, position, keys, parts, groups,
    N: tl.constexpr, FLOOR: tl.constexpr, TEMPER: tl.constexpr, NOISE: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = group < groups
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    weights += row * N
    parts += row * (2 * N + 3) * groups
    limit = _floor(floor, row, FLOOR)

    x = _load(x0 + row * row0, ids, vocab0)
    first = x.to(tl.float32)
    mixed = _mix_in(tl.zeros([TILE, GROUP], tl.float32), x, tl.load(weights), limit)
    tl.store(parts + groups + group, _store_sum(x, parts, group, live), mask=live)
    for i in tl.static_range(1, N):
        if i == 1:
            x = _load(x1 + row * row1, ids, vocab1)
        elif i == 2:
            x = _load(x2 + row * row2, ids, vocab2)
        else:
            x = _load(x3 + row * row3, ids, vocab3)
        weight = tl.load(weights + i)
        mixed = _mix_in(mixed, x, weight, _limit(weight))
        own = parts + 2 * i * groups
        tl.store(own + groups + group, _store_sum(x, own, group, live), mask=live)
    t, s, p = 1.0, 0, 0
    if TEMPER:
        t = tl.load(temperature + row)
        tempered = tl.div_rn(mixed, t)
        peak = _peak(tempered)
        share = _shares(tempered, peak)
        gap = tl.where(tempered == _MINUS, 0.0, share * (tempered - first))
        own = parts + 2 * N * groups
        tl.store(own + group, peak.to(tl.float64), mask=live)
        tl.store(own + groups + group, tl.sum(share, axis=1).to(tl.float64), mask=live)
        tl.store(own + 2 * groups + group, tl.sum(gap, axis=1).to(tl.float64), mask=live)
    if NOISE:
        s, p = tl.load(seed + row), tl.load(position + row)
    code = ordered(_value(mixed, ids, t, s, p, NOISE))
    code, best = best_of_rows(tl.where(ids < vocab0, code, NO_CODE), ids)
    tl.store(keys + row * groups + group, pack(code, best), mask=live)


@triton.jit
def _top(peaks, groups: tl.constexpr, CHUNK: tl.constexpr):
    top = tl.full([CHUNK], -float("inf"), tl.float64)
    for start in range(0, groups, CHUNK):
        at = start + tl.arange(0, CHUNK)
        top = tl.maximum(top, tl.load(peaks + at, mask=at < groups, other=-float("inf")))
    return tl.max(top, axis=0)


@triton.jit
def _total(peaks, sums, top, groups: tl.constexpr, CHUNK: tl.constexpr):
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, groups, CHUNK):
        at = start + tl.arange(0, CHUNK)
        peak = tl.load(peaks + at, mask=at < groups, other=-float("inf"))
        part = tl.load(sums + at, mask=at < groups, other=0.0)
        # In float32: the argument of a float64 exponential would cost more than all else.
        total += tl.where(part == 0, 0.0, tl.exp((peak - top).to(tl.float32)).to(tl.float64) * part)
    return tl.sum(total, axis=0)


@triton.jit
def _codes_of(
    x0, x1, x2, x3, vocab0, vocab1, vocab2, vocab3, weights, limit, ids, t, s, p,
    N: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """The mixture of some tokens and the codes that order them."""
    nothing = tl.zeros_like(ids).to(tl.float32)
    mixed = _mix_in(nothing, _load(x0, ids, vocab0), tl.load(weights), limit)
    if N > 1:
        weight = tl.load(weights + 1)
        mixed = _mix_in(mixed, _load(x1, ids, vocab1), weight, _limit(weight))
    if N > 2:
        weight = tl.load(weights + 2)
        mixed = _mix_in(mixed, _load(x2, ids, vocab2), weight, _limit(weight))
    if N > 3:
        weight = tl.load(weights + 3)
        mixed = _mix_in(mixed, _load(x3, ids, vocab3), weight, _limit(weight))
    code = ordered(_value(mixed, ids, t, s, p, NOISE))
    return mixed, tl.where(ids < vocab0, code, NO_CODE)


@triton.jit
def _scores_of(x, ids, vocab, weight, parts, groups: tl.constexpr, CHUNK: tl.constexpr):
    """A tensor's share of the scores, of their log-sum-exp, NaN where it is undefined, and its
    log-probabilities and log-sum-exp."""
    top = _top(parts, groups, CHUNK)
    total = _total(parts, parts + groups, top, groups, CHUNK)
    norm = top + tl.log(total)
    z = _load(x, ids, vocab).to(tl.float64)
    logprob = tl.where(z == _MINUS, z, (z - top) - tl.log(total)) + (total - total)
    wide = weight.to(tl.float64)
    odd = tl.where(weight != 0, total - total, 0.0)
    score = tl.where(weight != 0, wide * logprob, 0.0)
    return score, tl.where(weight != 0, wide * norm, 0.0), odd, logprob, norm


@triton.jit(do_not_specialize=["k"])
def _mix_merge(
    x0, x1, x2, x3, row0, row1, row2, row3, vocab0, vocab1, vocab2, vocab3,
    weights, floor, temperature, seed, position, keys, parts,
    scores_out, ids_out, logprobs_out, norm_out, kl_out, k, groups: tl.constexpr,
    N: tl.constexpr, FLOOR: tl.constexpr, TEMPER: tl.constexpr, NOISE: tl.constexpr,
    GROUP: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr, LOG_CHUNK: tl.constexpr,
    K: tl.constexpr, LOG_K: tl.constexpr, LOG_PARTS: tl.constexpr, LOG_PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x0 += row * row0
    x1 += row * row1
    x2 += row * row2
    x3 += row * row3
    weights += row * N
    parts += row * (2 * N + 3) * groups
    limit = _floor(floor, row, FLOOR)
    t, s, p = 1.0, 0, 0
    if TEMPER:
        t = tl.load(temperature + row)
    if NOISE:
        s, p = tl.load(seed + row), tl.load(position + row)

    best = tl.full([K], NO_KEY, tl.int64)
    for start in range(0, groups, CHUNK):
        at = start + tl.arange(0, CHUNK)
        key = tl.load(keys + row * groups + at, mask=at < groups, other=NO_KEY)
        found = top_keys(key, K, LOG_CHUNK, LOG_K)
        best = top_keys(tl.reshape(tl.join(best, found), [2 * K]), K, LOG_K + 1, LOG_K)

    ids = (key_id(best) // GROUP * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    ids = tl.where((best == NO_KEY)[:, None], vocab0, ids)
    _, code = _codes_of(
        x0, x1, x2, x3, vocab0, vocab1, vocab2, vocab3, weights, limit, ids, t, s, p, N, NOISE
    )  # fmt: skip
    PARTS: tl.constexpr = K * (GROUP // PART)
    code, first = best_of_rows(
        tl.reshape(code, [PARTS, PART]), tl.reshape(ids.to(tl.int32), [PARTS, PART])
    )
    best = top_keys(pack(code, first), K, LOG_PARTS, LOG_K)
    ids = (key_id(best) // PART * PART)[:, None] + tl.arange(0, PART)[None, :]
    ids = tl.where((best == NO_KEY)[:, None], vocab0, ids)
    _, code = _codes_of(
        x0, x1, x2, x3, vocab0, vocab1, vocab2, vocab3, weights, limit, ids, t, s, p, N, NOISE
    )  # fmt: skip
    best = top_keys(tl.reshape(pack(code, ids), [K * PART]), K, LOG_K + LOG_PART, LOG_K)

    slots = tl.arange(0, K)
    live = slots < k
    ids = tl.where(live, key_id(best), 0)
    mixed, _ = _codes_of(
        x0, x1, x2, x3, vocab0, vocab1, vocab2, vocab3, weights, limit, ids, t, s, p, N, NOISE
    )  # fmt: skip
    score, shift, odd, logprob, norm0 = _scores_of(
        x0, ids, vocab0, tl.load(weights), parts, groups, CHUNK
    )
    for i in tl.static_range(1, N):
        if i == 1:
            x, vocab = x1, vocab1
        elif i == 2:
            x, vocab = x2, vocab2
        else:
            x, vocab = x3, vocab3
        own = parts + 2 * i * groups
        term, part, spoilt, _, _ = _scores_of(
            x, ids, vocab, tl.load(weights + i), own, groups, CHUNK
        )
        score += term
        shift += part
        odd += spoilt
    score = tl.where(mixed == _MINUS, _MINUS, score) + odd
    tl.store(scores_out + row * k + slots, score.to(tl.float32), mask=live)
    tl.store(ids_out + row * k + slots, ids, mask=live)
    tl.store(logprobs_out + row * k + slots, logprob.to(tl.float32), mask=live)
    if TEMPER:
        own = parts + 2 * N * groups
        top = _top(own, groups, CHUNK)
        total = _total(own, own + groups, top, groups, CHUNK)
        norm = top + tl.log(total)
        kl = _total(own, own + 2 * groups, top, groups, CHUNK) / total - norm + norm0
        log_norm = tl.where(total == 0, _MINUS, norm - shift / t) + odd
        kl = tl.where(total == 0, float("nan"), kl) + odd
        tl.store(norm_out + row, log_norm.to(tl.float32))
        tl.store(kl_out + row, kl.to(tl.float32))


def _check(
    logits: list[Tensor],
    weights: Tensor,
    k: int,
    temperature: Tensor | None,
    seed: Tensor | None,
    position: Tensor | None,
    per_row: dict[str, Tensor | None],
) -> None:
    check(1 <= len(logits) <= MAX_MIXED, f"logits has {len(logits)} tensors; pass 1 to {MAX_MIXED}")
    rows, vocab = logits[0].shape
    for x in logits[1:]:
        check_shape("logits", x, rows, x.shape[-1])
    check_shape("weights", weights, rows, len(logits))
    for name, tensor in per_row.items():
        if tensor is not None:
            check_shape(name, tensor, rows)
    complete = (seed is None) == (position is None) and (seed is None or temperature is not None)
    check(complete, "a draw takes temperature, seed and position")
    most = min(vocab, MAX_CANDIDATES)
    check(1 <= k <= most, f"k={k} must be between 1 and {most}")


def mix_logits(
    logits: list[Tensor],
    weights: Tensor,
    k: int,
    floor: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_row = {"floor": floor, "temperature": temperature, "seed": seed, "position": position}
    _check(logits, weights, k, temperature, seed, position, per_row)
    count, first = len(logits), logits[0]
    rows = first.shape[0]
    scores, logprobs = (first.new_empty((rows, k), dtype=torch.float32) for _ in range(2))
    ids = first.new_empty((rows, k), dtype=torch.int64)
    tempered = 0 if temperature is None else rows
    norm, kl = (first.new_empty((tempered,), dtype=torch.float32) for _ in range(2))
    if rows == 0:
        return scores, ids, logprobs, norm, kl
    dense = [x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous() for x in logits]
    dense += [dense[0]] * (MAX_MIXED - count)
    weights = weights.contiguous()
    vectors = [weights if t is None else t.contiguous() for t in per_row.values()]
    groups = triton.cdiv(max(x.shape[1] for x in dense), GROUP)
    keys = first.new_empty((rows, groups), dtype=torch.int64)
    parts = first.new_empty((rows, 2 * count + 3, groups), dtype=torch.float64)
    given = (*dense, *(x.stride(0) for x in dense), *(x.shape[1] for x in dense), weights, *vectors)
    modes = {
        "N": count,
        "FLOOR": floor is not None,
        "TEMPER": temperature is not None,
        "NOISE": seed is not None,
        "GROUP": GROUP,
        "enable_fp_fusion": False,
    }
    candidates = power_of_two(k, 2)
    chunk = min(CHUNK, power_of_two(groups, candidates))
    inner = candidates * (GROUP // PART)
    with on_device(first):
        _mix_groups[(rows, triton.cdiv(groups, TILE))](
            *given, keys, parts, groups, TILE=TILE, num_warps=4, **modes
        )
        _mix_merge[(rows,)](
            *given, keys, parts, scores, ids, logprobs, norm, kl, k, groups,
            PART=PART, CHUNK=chunk, LOG_CHUNK=chunk.bit_length() - 1,
            K=candidates, LOG_K=candidates.bit_length() - 1,
            LOG_PARTS=inner.bit_length() - 1, LOG_PART=PART.bit_length() - 1,
            num_warps=16 if candidates > 16 else 8, **modes,
        )  # fmt: skip
    return scores, ids, logprobs, norm, kl
