"""CREAM's consistency: how far two reward models agree on rankings, as trust in the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...models.reward_model import as_reward_model
from ..collate import PairCollator
from ..data import PreferenceDataset


def kendall_tau(a: Tensor, b: Tensor, variant: str = "a") -> Tensor:
    """Kendall's rank correlation τ of scores `a` and `b` [..., n], float64 [...], ties exactly.

    With C concordant and D discordant ones of the n0 = n (n - 1) / 2 pairs, and t_a, t_b the pairs
    tied in a, in b::

        variant "a":  τ = (C - D) / n0
        variant "b":  τ = (C - D) / sqrt((n0 - t_a) (n0 - t_b))

    A pair tied in either is neither concordant nor discordant. τ-b is what `scipy.stats.kendalltau`
    gives, NaN where all of a or all of b is tied; τ-a is defined there too, 0, and equal to τ-b
    without ties. Scores are compared as they are, so no ranks are needed; n² memory.

    Raises `ValueError` for shapes that differ, n < 2, a NaN, or an unknown variant.
    """
    if variant not in ("a", "b"):
        raise ValueError(f"variant={variant!r} is unknown; pass 'a' or 'b'")
    if a.shape != b.shape or a.dim() == 0 or a.shape[-1] < 2:
        raise ValueError(
            f"a has shape {list(a.shape)} and b {list(b.shape)}; pass two of the same shape "
            "[..., n] with n >= 2"
        )
    if a.isnan().any() or b.isnan().any():
        raise ValueError("a score is NaN; leave its response out")
    # Not the sign of a difference: two equal infinities would give NaN.
    signs = [(s[..., :, None] > s[..., None, :]).long() for s in (a, b)]
    x, y = (s - s.mT for s in signs)
    difference = (x * y).sum((-2, -1))  # every pair twice
    if variant == "a":
        n = a.shape[-1]
        return difference.double() / (n * (n - 1))
    untied = x.abs().sum((-2, -1)).double() * y.abs().sum((-2, -1)).double()
    return difference.double() / untied.sqrt()


def consistency_rate(a: Tensor, b: Tensor) -> Tensor:
    """C = (τ + 1) / 2 of CREAM (arXiv 2410.12735), float64 [...], from scores [..., n].

    The scores are those of two reward models (there: of two iterations of one) for the same n
    responses to a prompt; its mean over the prompts is the weight C of the loss::

        C · L(chosen, rejected) + (1 - C) · L(rejected, chosen)

    which is `PrefixRewardConfig(consistency=C)`. τ is τ-a: a tie counts as half agreement, where
    the published code orders ties by their place in the list.
    """
    return (kendall_tau(a, b) + 1) / 2


@torch.no_grad()
def reward_consistency(
    model: Any, other: Any, dataset: PreferenceDataset, *, batch_size: int = 16
) -> float:
    """Mean of `consistency_rate` over the prompts of `dataset`, between two reward models.

    All answers to the same prompt, whichever pairs they come from, are ranked together by their
    rewards as whole answers. A prompt with one pair counts 1 where the models agree on it, 0 where
    they do not, so the mean is then the rate of agreement. Who won is not looked at.

    Args:
        model, other: causal reward models of one tokenizer, on any devices; run in eval mode.
        dataset: the pairs, such as those to be trained on.

    Example::

        from rgtg_fast.training import PreferenceDataset, PrefixRewardConfig
        from rgtg_fast.training.experimental import reward_consistency

        pairs = PreferenceDataset("pairs.jsonl", tokenizer)
        rate = reward_consistency(rm, previous_rm, pairs)
        args = PrefixRewardConfig("next_rm", consistency=rate)
    """
    scores: dict[tuple[int, ...], dict[tuple[int, ...], tuple[float, float]]] = {}
    both = [_answer_rewards(m, dataset, batch_size) for m in (model, other)]
    for row, one, two in zip(dataset.rows, *both, strict=True):
        answers = scores.setdefault(tuple(row["prompt_ids"]), {})
        for side, name in enumerate(("chosen_ids", "rejected_ids")):
            answers.setdefault(tuple(row[name]), (one[side], two[side]))
    rates = [
        consistency_rate(*torch.tensor(list(answers.values()), dtype=torch.float64).T)
        for answers in scores.values()
    ]
    return float(torch.stack(rates).mean())


def _answer_rewards(model: Any, dataset: PreferenceDataset, size: int) -> list[list[float]]:
    """Rewards [N, 2] of the whole answers."""
    rm = as_reward_model(model).twin()
    rewards: list[list[float]] = []
    batches: Any = DataLoader(dataset, size, collate_fn=PairCollator())
    for batch in batches:
        ids, mask = (batch[n].flatten(0, 1).to(rm.device) for n in ("input_ids", "attention_mask"))
        hidden, _ = rm.forward_base(ids, attention_mask=mask, use_cache=False)
        index = torch.arange(len(ids), device=hidden.device)
        last = (mask.sum(-1) - 1).to(hidden.device)
        rewards += rm.rewards(hidden[index, last][:, None]).view(-1, 2).tolist()
    return rewards
