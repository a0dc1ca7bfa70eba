"""The ratio policy: the candidates of a step, and the draw among them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .rows import Rows
from .warpers import Last


class Choice(NamedTuple):
    """A step's candidates and the one chosen: log-probabilities under π, rewards and
    log-probabilities under the ratio policy fp32 [B, k], ids int64 [B, k], `slot` int64 [B];
    `scored` bool [B, k] says which candidates were (None: all)."""

    slot: Tensor
    ids: Tensor
    logprobs: Tensor
    rewards: Tensor
    logq: Tensor
    scored: Tensor | None = None


class Contest(NamedTuple):
    """Which candidates bool [B, k] may win, and which have to be scored to know who does."""

    may_win: Tensor
    scored: Tensor


@dataclass
class RatioPolicy:
    """The ratio policy of a run: softmax((log π + β r) / T) over the k most likely tokens.

    `beta` and `temperature` are fp32 [B], `seeds` int64 [B], on the device of the ids; `check_nan`
    True reads a flag at every step, None once at the end, False never. Rewards are clamped to
    `reward_range`, and with `prune` those that cannot decide a step are not asked for. Neither is
    that of a candidate without a rival where `lone` is "row"; where it is "step", if no row has
    any. `warpers` make π of the scores.
    """

    k: int
    beta: Tensor
    temperature: Tensor
    seeds: Tensor
    do_sample: bool
    check_nan: bool | None
    backend: ops.Backend
    reward_range: tuple[float, float] | None = None
    prune: bool = False
    lone: str | None = None
    warpers: Last | None = None

    @functools.cached_property
    def _topk(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return self._kernel("topk_logprobs")

    @functools.cached_property
    def _sample(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return self._kernel("ratio_sample")

    @functools.cached_property
    def _step(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        return self._kernel("ratio_step")

    @functools.cached_property
    def _keep(self) -> Callable[..., Tensor]:
        return ops.kernel_or_auto("ratio_keep", self.backend, self.seeds.device)

    def _kernel(self, op: str) -> Callable[..., Any]:
        return ops.kernel(op, self.backend, self.seeds.device, len(self.seeds))

    def candidates(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The k most likely tokens of processed scores [B, V]: log-probabilities and ids [B, k]."""
        if self.warpers is not None:
            return self.warpers(scores, self.k, self._topk)
        return self._topk(scores, self.k)

    def contenders(
        self, logprobs: Tensor, ids: Tensor, known: Tensor | None, rows: Rows
    ) -> Contest | None:
        """Which candidates may win, whatever their rewards are; None where all are scored.

        One at -inf cannot. And the noise of a draw is known before the rewards, and with it, where
        rewards have bounds, each candidate's best and worst possible value: drop a candidate whose
        best is below another's worst, and those not `known` to the reward model. In rows that have
        ended nothing is scored.
        """
        if not self.prune:
            return None
        if self.reward_range is None:
            may_win = logprobs != -torch.inf  # a NaN may, to be seen
        else:
            if known is not None:
                logprobs = logprobs.masked_fill(~known, -torch.inf)
            per_row = self.beta, self.temperature, self.seeds, rows.position, self.do_sample
            may_win = self._keep(logprobs, ids, *per_row, *self.reward_range)
        scored = may_win & rows.unfinished[:, None]
        settled = torch.zeros_like(rows.unfinished)
        if self.lone is not None:
            settled = ~rows.unfinished | (may_win.sum(1) == 1)
            if known is not None:  # what is no token must be found to have no reward
                settled &= ~rows.unfinished | (known | ~may_win).all(1)
            if self.lone == "step":
                settled &= settled.all()
        scored &= ~settled[:, None]
        scored[:1, 0] |= ~(scored.any() | settled.all())
        return None if scored.all() else Contest(may_win, scored)

    def alone(self, logprobs: Tensor, ids: Tensor, position: Tensor, reach: float) -> Tensor:
        """Whether, bool [B], one candidate wins whatever the rewards between -reach and reach."""
        per_row = self.beta, self.temperature, self.seeds, position, self.do_sample
        return self._keep(logprobs, ids, *per_row, -reach, reach).sum(1) == 1

    def bounded(self, rewards: Tensor) -> Tensor:
        """Rewards clamped to the range; -inf (an id that is no token) and NaN are left."""
        if self.reward_range is None:
            return rewards
        return rewards.clamp(*self.reward_range).where(rewards != -torch.inf, rewards)

    def select(
        self,
        logprobs: Tensor,
        rewards: Tensor,
        ids: Tensor,
        position: Tensor,
        contest: Contest | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw (or pick) slots int64 [B] from the ratio policy, with its log-probabilities [B, k];
        `position` int64 [B] counts the answer's tokens."""
        if contest is not None:
            logprobs = logprobs.masked_fill(~contest.may_win, -torch.inf)
            rewards = rewards.where(contest.scored, 0.0)
        per_row = self.beta, self.temperature, self.seeds, position, self.do_sample
        return self._sample(logprobs, rewards, ids, *per_row)

    def step(
        self,
        logprobs: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        position: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`select` with the rewards hidden [B, k, H] · weight [H] + bias: slots int64 [B], rewards
        fp32 [B, k] and log-probabilities [B, k]."""
        per_row = self.beta, self.temperature, self.seeds, position, self.do_sample
        return self._step(logprobs, hidden, weight, ids, *per_row, bias)

    def keep_rows(self, rows: Tensor) -> RatioPolicy:
        columns = {n: getattr(self, n)[rows] for n in ("beta", "temperature", "seeds")}
        return replace(self, **columns)
