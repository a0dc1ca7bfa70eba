"""The ops in plain torch: the oracle of the tests and ``backend="reference"``.

Functions decorated with ``op`` define the ops: the signature is the schema, the results' shapes are
what ``torch.compile`` is told, and autograd through them gives the kernels' gradients.

Values are computed in float64 from the inputs as given and returned in float32. The noise of the
sampler is the exception: it is float32 arithmetic, operation for operation that of
``csrc/gumbel.h``, so that every backend draws the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Reference = TypeVar("Reference", bound=Callable[..., Any])

OPS: dict[str, Callable[..., Any]] = {}  # the one list of the ops: name -> reference


_WORD = 0xFFFFFFFF
_ONE_MINUS_SQRT_HALF = 0.292893218813452476
_SQRT_HALF = 0.707106781186547524
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def ordered_keys(logits: Tensor) -> Tensor:
    """Integers (int64, 0 .. 2^32 - 1) that order like float32, with -0 == +0 and NaN on top."""
    x = logits.to(torch.float32)
    bits = x.view(torch.int32).to(torch.int64) & _WORD
    bits = torch.where(x == 0, torch.zeros_like(bits), bits)
    keys = torch.where(bits >= 0x80000000, bits ^ _WORD, bits | 0x80000000)
    return torch.where(torch.isnan(x), torch.full_like(keys, _WORD), keys)


def op(reference: Reference) -> Reference:
    OPS[reference.__name__] = reference
    return reference


def _first_k(values: Tensor, k: int) -> Tensor:
    """Ids ``[B, k]`` of the largest values, the lower id first among equals."""
    # A signed key, so that descending int64 order is descending value, then ascending id.
    ids = torch.arange(values.shape[1], device=values.device)
    keys = ((ordered_keys(values) - 0x80000000) << 32) | (_WORD - ids)
    return _WORD - (torch.topk(keys, k, dim=1).values & _WORD)


def _log_softmax(logits: Tensor) -> Tensor:
    logprobs = torch.log_softmax(logits.to(torch.float64), dim=1)
    # log_softmax would give NaN for a row of -inf alone; its log-probabilities are -inf.
    hopeless = torch.isneginf(logits).all(dim=1, keepdim=True)
    return torch.where(hopeless, -torch.inf, logprobs)


@op
def topk_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    chosen = _first_k(logits, k)
    return _log_softmax(logits).gather(1, chosen).to(torch.float32), chosen


def _for_vocabulary(x: Tensor, vocab: int) -> Tensor:
    """The first ``vocab`` columns; those that are missing are -inf."""
    return torch.nn.functional.pad(x, (0, vocab - x.shape[1]), value=-torch.inf)


@op
def mix_logits(
    logits: list[Tensor],
    weights: Tensor,
    k: int,
    floor: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first = logits[0]
    own = _log_softmax(first)
    scores, mixed = torch.zeros_like(own), torch.zeros_like(first, dtype=torch.float32)
    undefined = torch.zeros_like(first[:, :1], dtype=torch.bool)
    for i, (x, weight) in enumerate(zip(logits, weights.unsqueeze(2).unbind(1), strict=True)):
        used = weight != 0  # 0 * -inf would be NaN
        wide = _for_vocabulary(x.to(torch.float32), first.shape[1])
        logprobs = _for_vocabulary(_log_softmax(x), first.shape[1])
        missing = torch.isneginf(wide)
        # In float32 as on every backend. What is -inf stays so: -inf + inf would be NaN.
        total = mixed + torch.where(used, weight * wide, 0.0)
        gone = torch.isneginf(mixed) | (missing & (used | (i == 0)))
        if floor is not None and i == 0:
            gone = gone | (wide < floor.unsqueeze(1))
        mixed = torch.where(gone, -torch.inf, total)
        term = weight.to(torch.float64) * torch.where(missing, 0.0, logprobs)
        scores = scores + torch.where(used, term, 0.0)
        undefined = undefined | (used & torch.isnan(logprobs).any(dim=1, keepdim=True))
    impossible = torch.isneginf(mixed)
    scores = torch.where(impossible, -torch.inf, scores)
    scores = torch.where(undefined, torch.nan, scores)
    value, log_norm, kl = mixed, scores.new_empty(0), scores.new_empty(0)
    if temperature is not None:
        tempered = scores / temperature.unsqueeze(1)
        log_norm = torch.logsumexp(tempered, dim=1)
        logq = torch.where(impossible, 0.0, tempered - log_norm.unsqueeze(1))
        gap = torch.where(impossible, 0.0, logq.exp() * (logq - own))
        kl = torch.where(impossible.all(dim=1) | undefined[:, 0], torch.nan, gap.sum(dim=1))
        if seed is not None and position is not None:
            ids = torch.arange(first.shape[1], device=first.device)
            noise = gumbel_noise(seed.unsqueeze(1), position.unsqueeze(1), ids)
            value = mixed / temperature.unsqueeze(1) + noise
    chosen = _first_k(torch.where(impossible, -torch.inf, value), k)
    found = (scores.gather(1, chosen), own.gather(1, chosen), log_norm, kl)
    picked, logprobs, log_norm, kl = (x.to(torch.float32) for x in found)
    return picked, chosen, logprobs, log_norm, kl


@op
def reward_head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rewards = (hidden.to(torch.float64) * weight.to(torch.float64)).sum(dim=-1)
    if bias is not None:
        rewards = rewards + bias.to(torch.float64).reshape(())
    return rewards.to(torch.float32)


@op
def vocab_reward(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    rows = weight[ids].to(torch.float64)  # [B, k, H]
    return (rows * hidden.to(torch.float64).unsqueeze(1)).sum(dim=-1).to(torch.float32)


@op
def ratio_sample(
    logprobs: Tensor,
    rewards: Tensor,
    ids: Tensor,
    beta: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    do_sample: bool,
) -> tuple[Tensor, Tensor]:
    none = torch.isneginf(rewards)  # no token, whatever beta is; 0 * -inf would be NaN
    weighted = beta.unsqueeze(1) * rewards.masked_fill(none, 0.0)
    # [B, k], float32 as on every backend
    scores = logprobs + weighted.masked_fill(none, -torch.inf)
    tempered = scores / temperature.unsqueeze(1)
    usable = torch.isfinite(tempered)
    undefined = (torch.isnan(tempered) | torch.isposinf(tempered)).any(dim=1) | ~usable.any(dim=1)
    value = scores
    if do_sample:
        value = tempered + gumbel_noise(seed.unsqueeze(1), position.unsqueeze(1), ids)
    # torch.argmax does not promise the first of equal values; the slot number settles ties.
    value = torch.where(usable, value, -torch.inf)
    best = value == value.amax(dim=1, keepdim=True)
    slots = torch.arange(ids.shape[1], device=ids.device)
    slot = torch.where(best & usable, slots, ids.shape[1]).amin(dim=1)
    slot = torch.where(undefined, -1, slot)
    logq = torch.log_softmax(tempered.to(torch.float64), dim=1)
    logq = torch.where(undefined.unsqueeze(1), torch.nan, logq)
    return slot, logq.to(torch.float32)


@op
def ratio_keep(
    logprobs: Tensor,
    ids: Tensor,
    beta: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    do_sample: bool,
    low: float,
    high: float,
) -> Tensor:
    noise = gumbel_noise(seed.unsqueeze(1), position.unsqueeze(1), ids)
    values = []
    undefined = torch.zeros_like(seed, dtype=torch.bool)
    for reward in (low, high):
        scores = logprobs + (
            beta * torch.tensor(reward, dtype=torch.float32, device=logprobs.device)
        ).unsqueeze(1)
        tempered = scores / temperature.unsqueeze(1)
        undefined |= (torch.isnan(tempered) | torch.isposinf(tempered)).any(dim=1)
        value = tempered + noise if do_sample else scores
        values.append(torch.where(torch.isfinite(tempered), value, -torch.inf))
    floor = torch.minimum(*values).amax(dim=1, keepdim=True)
    return ~(torch.maximum(*values) < floor) | undefined.unsqueeze(1)


@op
def ratio_step(
    logprobs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    beta: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    do_sample: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rewards = reward_head(hidden, weight, bias)
    policy = (beta, temperature, seed, position)
    slot, logq = ratio_sample(logprobs, rewards, ids, *policy, do_sample)
    return slot, rewards, logq


def _stored(prefix: Tensor, rows: Tensor | None) -> Tensor:
    return prefix if rows is None else prefix.index_select(0, rows)


@op
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
    batch, k, heads, width = q.shape
    key_heads = k_prefix.shape[1]
    query = q.to(torch.float64).reshape(batch, k, key_heads, heads // key_heads, width)
    t = torch.arange(k_prefix.shape[2], device=q.device)
    end = length.unsqueeze(1)
    live = (t >= start.unsqueeze(1)) & (t < end)  # [B, T]
    if window is not None:
        live = live & (t > end - window)
    # Outside the live range a NaN times its weight of 0 would still be NaN, in the result and in
    # the gradients.
    keys, values = (
        torch.where(live[:, None, :, None], _stored(x, rows).to(torch.float64), 0.0)
        for x in (k_prefix, v_prefix)
    )
    own = (query * k_self.to(torch.float64).unsqueeze(3)).sum(dim=-1, keepdim=True)
    scores = torch.einsum("bkhgd,bhtd->bkhgt", query, keys)
    scores = torch.cat([scores, own], dim=-1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.cat([live, torch.ones_like(end, dtype=torch.bool)], dim=1)
    share = torch.softmax(torch.where(seen[:, None, None, None], scores, -torch.inf), dim=-1)
    out = torch.einsum("bkhgt,bhtd->bkhgd", share[..., :-1], values)
    out = out + share[..., -1:] * v_self.to(torch.float64).unsqueeze(3)
    return out.reshape(q.shape).to(q.dtype)


@op
def prefix_bt_loss(
    r_chosen: Tensor,
    r_rejected: Tensor,
    len_chosen: Tensor,
    len_rejected: Tensor,
    weights: Tensor,
    margin: Tensor,
    label_smoothing: float,
    centering: float,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each pair ``[N]`` and its gradients ``[N, L]``; an undefined pair is NaN."""
    width = r_chosen.shape[1]
    ends = len_chosen.unsqueeze(1), len_rejected.unsqueeze(1)
    end = torch.maximum(*ends)
    at = torch.arange(width, device=r_chosen.device).unsqueeze(0)  # of prefix length at + 1
    live = (at >= first - 1) & (at < end)  # [N, L]
    held = [torch.minimum(at, e - 1).clamp(0, width - 1) for e in ends]
    chosen = r_chosen.to(torch.float64).gather(1, held[0])
    rejected = r_rejected.to(torch.float64).gather(1, held[1])
    gap = torch.where(live, chosen - rejected - margin.unsqueeze(1), 0.0)
    share = torch.where(live, weights.to(torch.float64), 0.0)
    share = torch.where(live, share / share.sum(dim=1, keepdim=True), 0.0)
    losses = -torch.nn.functional.logsigmoid(gap)
    slope = label_smoothing - torch.sigmoid(-gap)
    pull = torch.zeros_like(gap)
    if label_smoothing:  # 0 * inf would be NaN
        losses = losses + label_smoothing * gap
    if centering:
        total = torch.where(live, chosen + rejected, 0.0)
        losses = losses + centering * total**2
        pull = 2 * centering * total
    grads = [
        torch.zeros_like(gap).scatter_add_(1, where, share * (pull + sign * slope))
        for where, sign in zip(held, (1, -1), strict=True)
    ]
    undefined = (torch.minimum(*ends) < 1) | (end > width) | (end < first)  # [N, 1]
    loss = (share * losses).sum(dim=1).masked_fill(undefined[:, 0], torch.nan)
    grads = [grad.masked_fill(undefined, torch.nan) for grad in grads]
    dtype = torch.promote_types(r_chosen.dtype, torch.float32)
    return loss.to(dtype), grads[0].to(dtype), grads[1].to(dtype)


def split_seed(seed: int, batch: int, device: torch.device | str | None = None) -> Tensor:
    row = torch.arange(batch, dtype=torch.int64, device="cpu" if device is None else device)
    zero = torch.zeros_like(row)
    key = torch.full_like(row, seed)
    word = philox4x32_10((row & _WORD, row >> 32, zero, zero), (key & _WORD, (key >> 32) & _WORD))
    return word[0] | (word[1] << 32)


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # mod 2^64, as unsigned
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def gumbel_noise(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise (float32) of each token id; the int64 arguments broadcast.

    Philox is keyed by the row seed and counts (token id, position), see ``csrc/gumbel.h``.
    """
    seed, position, ids = torch.broadcast_tensors(seed, position, ids)
    words = philox4x32_10(
        (ids & _WORD, (ids >> 32) & _WORD, position & _WORD, (position >> 32) & _WORD),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    return gumbel_from_word(words[0])


def gumbel_from_word(word: Tensor) -> Tensor:
    """-log(-log(1 - v)), v = (word + 1/2) / 2^32, relatively precise at both ends."""
    scale = 2.0**-32
    v = (word.to(torch.float32) + 0.5) * scale
    w = ((_WORD - word).to(torch.float32) + 0.5) * scale  # 1 - v
    small = v <= _ONE_MINUS_SQRT_HALF
    exponential = torch.where(small, -_log_near_one(-v, torch.zeros_like(v)), -_log_positive(w))
    return -_log_positive(exponential)


def _log_near_one(f: Tensor, exponent: Tensor) -> Tensor:
    square = f * f
    y = torch.full_like(f, _LOG_COEFFICIENTS[0])
    for coefficient in _LOG_COEFFICIENTS[1:]:
        y = y * f + coefficient
    y = y * f * square
    y = y + exponent * _LN2_LOW
    y = y + square * -0.5
    return (f + y) + exponent * _LN2_HIGH


def _log_positive(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)  # in [1/2, 1)
    low = mantissa < _SQRT_HALF
    exponent = exponent - low.to(torch.int32)
    mantissa = torch.where(low, mantissa + mantissa, mantissa)
    return _log_near_one(mantissa - 1.0, exponent.to(torch.float32))
