"""The nucleus of a mixture: its most likely tokens that have a given share of it together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import OPS
from .registry import MAX_CANDIDATES

Kernel = Callable[..., tuple[Tensor, ...]]
Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Which of the probabilities [B, n], bool, are among the largest that make `top_p` together.

    Of equal ones those that come first. Everything is where one is NaN, for it to be seen.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    inside = ordered.cumsum(-1) - ordered < top_p
    inside |= probabilities.isnan().any(-1, keepdim=True)
    return torch.zeros_like(inside).scatter(-1, order, inside)


def mix_nucleus(
    mix: Kernel,
    sample: Kernel,
    logits: list[Tensor],
    weights: Tensor,
    k: int,
    top_p: float,
    floor: Tensor | None,
    temperature: Tensor,
    seed: Tensor | None = None,
    position: Tensor | None = None,
) -> Found:
    """What `mix_logits` gives of the nucleus; `mix` and `sample` are a backend's `mix_logits` and
    `ratio_sample`.

    Mostly the nucleus is among the `MAX_CANDIDATES` most likely tokens, and each tensor is read
    once. Rows where it is not are ranked as a whole, in float64.
    """
    vocab = logits[0].shape[1]
    reach = min(max(MAX_CANDIDATES, k), vocab)
    *ranked, log_norm, _ = mix(logits, weights, reach, floor, temperature)
    found = _of_ranked(sample, ranked, log_norm, k, top_p, temperature, seed, position)
    seen = (ranked[0].double() / temperature[:, None] - log_norm[:, None]).exp().sum(1)
    beyond = (seen < top_p).nonzero()[:, 0] if reach < vocab else seen.new_zeros(0)
    if len(beyond):
        bound, seed, position = (None if x is None else x[beyond] for x in (floor, seed, position))
        some, tempered = [x[beyond] for x in logits], temperature[beyond]
        *ranked, log_norm, _ = OPS["mix_logits"](some, weights[beyond], vocab, bound, tempered)
        sample = OPS["ratio_sample"]  # a compiled one takes so few candidates only
        exact = _of_ranked(sample, ranked, log_norm, k, top_p, tempered, seed, position)
        for into, rows in zip(found, exact, strict=True):
            into[beyond] = rows
    return found


def _of_ranked(
    sample: Kernel,
    ranked: list[Tensor],
    log_norm: Tensor,
    k: int,
    top_p: float,
    temperature: Tensor,
    seed: Tensor | None,
    position: Tensor | None,
) -> Found:
    """The same of tokens in the order of their share: scores, ids and log-probabilities [B, n]."""
    scores, ids, logprobs = ranked
    tempered = scores.double() / temperature[:, None]
    inside = nucleus((tempered - log_norm[:, None]).exp(), top_p)
    inside &= scores != -torch.inf  # there to fill k places
    tempered = tempered.masked_fill(~inside, -torch.inf)
    norm = tempered.logsumexp(1)
    logq = (tempered - norm[:, None]).masked_fill(~inside, 0.0)
    gap = (logq.exp() * (logq - logprobs)).masked_fill(~inside, 0.0).sum(1)
    kl = gap.masked_fill(~inside.any(1), torch.nan)
    scores = scores.masked_fill(~inside, -torch.inf)
    if seed is None or position is None:
        slots = torch.arange(k, device=ids.device).expand(len(ids), k)
    else:
        slots = _draws(sample, scores, ids, k, temperature, seed, position)
    scores, ids, logprobs = (x.gather(1, slots) for x in (scores, ids, logprobs))
    return scores, ids, logprobs, norm.float(), kl.float()


def _draws(
    sample: Kernel,
    scores: Tensor,
    ids: Tensor,
    k: int,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """Slots int64 [B, k] of draws without replacement; where nothing is left, the next ones."""
    nothing, left = torch.zeros_like(scores), scores
    free, slots = torch.ones_like(scores, dtype=torch.bool), []
    for _ in range(k):
        slot = sample(left, nothing, ids, nothing[:, 0], temperature, seed, position, True)[0]
        slot = torch.where(slot < 0, free.int().argmax(1), slot)
        slots.append(slot)
        left = left.scatter(1, slot[:, None], -torch.inf)
        free = free.scatter(1, slot[:, None], False)
    return torch.stack(slots, 1)
