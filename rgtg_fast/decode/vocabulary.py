"""The ratio policy over the whole vocabulary, of rewards that know every token.

scores [B, V] of π  --+
                      +-> mix_logits -> the k best of log π + β r, or a draw from all
scorer.score_all()  --+
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scorers.base import Scorer
from ..scorers.weighted import checked, of_width, rewards_of_all
from .ratio_policy import Choice, RatioPolicy, nucleus
from .warpers import REACH


def score(scorer: Scorer, ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Rewards [B, k] of the candidates (NaN of those not in `keep`, where it is given);
    `ValueError` where a scorer gives another shape."""
    rewards = scorer.score(ids) if keep is None else scorer.score(ids, keep)  # type: ignore[call-arg]
    return checked(scorer, rewards, ids).to(torch.float32)


def candidates_of_sum(
    policy: RatioPolicy, scorer: Scorer, scores: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """The k best tokens of log π + β r, of processed scores [B, V]: log π and ids [B, k]."""
    both = [scores, _rewards_of_all(policy, scorer, scores)]
    _, ids, logprobs, *_ = policy.mix(both, policy.weights(position), policy.k)
    return logprobs, ids


def draw_of_all(policy: RatioPolicy, scorer: Scorer, scores: Tensor, position: Tensor) -> Choice:
    """A token of each row, the best or a draw of softmax((log π + β r) / T) over the whole
    vocabulary, of processed scores [B, V]: a `Choice` among one candidate."""
    rewards, weights = _rewards_of_all(policy, scorer, scores), policy.weights(position)
    mass = None  # of π, in the nucleus
    if policy.do_sample and policy.top_p is not None:
        inside = _nucleus_of_all(policy, scores, rewards, weights)
        whole = scores.float().logsumexp(-1)
        scores = scores.masked_fill(~inside, -torch.inf)
        mass = scores.float().logsumexp(-1) - whole
    draw = (policy.temperature, policy.seeds, position) if policy.do_sample else (None, None, None)
    best, ids, logprobs, log_norm, gap = policy.mix([scores, rewards], weights, 1, None, *draw)
    slot = torch.where(best[:, 0].isfinite(), 0, -1)
    kl, logq = None, torch.zeros_like(best)
    if policy.do_sample:
        kl, logq = gap, best / policy.temperature[:, None] - log_norm[:, None]
    if mass is not None:
        kl, logprobs = gap - mass, logprobs + mass[:, None]
    of_token = policy.bounded(score(scorer, ids))
    beta = policy.step_beta(logprobs, of_token, position, None)
    known = torch.full_like(slot, rewards.shape[1])
    return Choice(slot, ids, logprobs, of_token, logq, beta=beta, kl=kl, known=known)


def _rewards_of_all(policy: RatioPolicy, scorer: Scorer, scores: Tensor) -> Tensor:
    """Rewards fp32 [B, V] of the language model's tokens, -inf of those that have none."""
    rewards = rewards_of_all(scorer).to(scores.device, torch.float32)
    return policy.bounded(of_width(rewards, scores.shape[1]))


def _nucleus_of_all(
    policy: RatioPolicy, scores: Tensor, rewards: Tensor, weights: Tensor
) -> Tensor:
    """Which tokens, bool [B, V], are in the nucleus of the policy.

    The best `REACH` tokens have it mostly; the rows of others are sorted.
    """
    assert policy.top_p is not None
    reach = min(REACH, scores.shape[1])
    temperature = policy.temperature[:, None]
    best, ids, _, log_norm, _ = policy.mix(
        [scores, rewards], weights, reach, None, policy.temperature
    )
    share = (best.double() / temperature - log_norm[:, None]).exp()
    inside = torch.zeros_like(scores, dtype=torch.bool)
    inside = inside.scatter(1, ids, nucleus(share, policy.top_p))
    beyond = (share.sum(1) < policy.top_p).nonzero()[:, 0]
    if reach < scores.shape[1] and len(beyond):
        own, theirs = (x[beyond].double().log_softmax(-1) for x in (scores, rewards))
        total = own + weights[beyond, 1:] * theirs.where(theirs != -torch.inf, 0.0)
        total = total.masked_fill(theirs == -torch.inf, -torch.inf)
        inside[beyond] = nucleus((total / temperature[beyond]).softmax(-1), policy.top_p)
    return inside
