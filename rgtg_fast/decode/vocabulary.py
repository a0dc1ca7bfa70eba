"""The ratio policy over the whole vocabulary, of rewards that know every token.

scores [B, V] of π  --+
                      +-> mix_logits -> the k best of log π + β r, or a draw from all
scorer.score_all()  --+
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..scorers.base import Scorer
from ..scorers.weighted import checked, of_width, rewards_of_all
from .ratio_policy import Choice, RatioPolicy


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
    draw = (policy.temperature, policy.seeds, position) if policy.do_sample else (None, None, None)
    both = [scores, rewards]
    if policy.do_sample and policy.top_p is not None:
        found = ops.mix_nucleus(
            policy.mix, policy.sample, both, weights, 1, policy.top_p, None, *draw
        )
    else:
        found = policy.mix(both, weights, 1, None, *draw)
    best, ids, logprobs, log_norm, gap = found
    slot = torch.where(best[:, 0].isfinite(), 0, -1)
    kl, logq = None, torch.zeros_like(best)
    if policy.do_sample:
        kl, logq = gap, best / policy.temperature[:, None] - log_norm[:, None]
    of_token = policy.bounded(score(scorer, ids))
    beta = policy.step_beta(logprobs, of_token, position, None)
    known = torch.full_like(slot, rewards.shape[1])
    return Choice(slot, ids, logprobs, of_token, logq, beta=beta, kl=kl, known=known)


def _rewards_of_all(policy: RatioPolicy, scorer: Scorer, scores: Tensor) -> Tensor:
    """Rewards fp32 [B, V] of the language model's tokens, -inf of those that have none."""
    rewards = rewards_of_all(scorer).to(scores.device, torch.float32)
    return policy.bounded(of_width(rewards, scores.shape[1]))
