"""Rewards of prompts alone, behind which answers begin."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..scorers.expand import ExpandScorer
from ..scorers.implicit import LogprobScorer
from ..scorers.tree import SiblingScorer
from ..scorers.weighted import WeightedRows
from .cost import tokens_joined, tokens_scored
from .texts import Text, Texts


@torch.no_grad()
def prompt_rewards(texts: Texts, first: int, otherwise: str) -> list[float]:
    """r(x) of the prompts of rows `first` and behind it, which have just joined; 0 where rewards
    are of single tokens. A row of which it is not known fails, and is told what to do
    `otherwise`."""
    rows = range(first, len(texts.rows))
    if texts.per_token:
        return [0.0 for _ in rows]
    rewards = _of_part(texts.scorer, texts.rows, first)[:, 0].tolist()
    for row, reward in zip(rows, rewards, strict=True):
        if not math.isfinite(reward):
            one = len(texts.rows[row].entry.ids) == 1
            why = " (of a prompt of one token most scorers know none)" if one else ""
            texts.fail(row, f"the reward of the prompt alone is {reward}{why}, and {otherwise}")
    return rewards


def _of_part(scorer: Any, rows: list[Text], first: int) -> Tensor:
    """The same [n, 1] of a part of the reward; NaN where there is none."""
    if isinstance(scorer, WeightedRows):
        parts = [_of_part(part, rows, first) for part in scorer.parts]
        return scorer.now(parts, torch.arange(first, len(rows), dtype=torch.int64, device="cpu"))
    if isinstance(scorer, SiblingScorer | ExpandScorer):
        return scorer.last_reward[first:, None].cpu()
    if isinstance(scorer, LogprobScorer):  # a sum over the tokens of the answer
        return torch.zeros((len(rows) - first, 1), device="cpu")
    rewards = [_asked(scorer, text) for text in rows[first:]]
    return torch.tensor(rewards, dtype=torch.float32, device="cpu")[:, None]


def _asked(scorer: Any, text: Text) -> float:
    """The reward of a prompt's last token behind those before it, in a row of its own; NaN where
    there are none."""
    ids = text.entry.ids
    if len(ids) == 1:
        return math.nan
    (handle,) = scorer.join([ids[:-1]])
    try:
        text.cost.reward_tokens += tokens_joined(scorer, len(ids) - 1)
        text.cost.reward_tokens += tokens_scored(scorer, -1, len(ids) - 1, 1)
        text.cost.rewards += 1
        return float(scorer.score(ids[None, -1:], handles=[handle]))
    finally:
        scorer.leave([handle])
