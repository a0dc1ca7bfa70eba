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
from .steering import entropy_of, solve_beta
from .warpers import Last

_NEXT_TO_NOTHING = 1e-30


class Choice(NamedTuple):
    """A step's candidates and the one chosen: log-probabilities under π, rewards and
    log-probabilities under the ratio policy fp32 [B, k], ids int64 [B, k], `slot` int64 [B];
    `scored` bool [B, k] says which candidates were (None: all), `gated` bool [B] in which rows no
    reward was wanted; `beta` fp32 [B] is the step's, where it is not the same at all. Of a draw
    from the whole vocabulary k is 1, `kl` fp32 [B] that of the whole policy, and `known`
    int64 [B] how many tokens were given a reward."""

    slot: Tensor
    ids: Tensor
    logprobs: Tensor
    rewards: Tensor
    logq: Tensor
    scored: Tensor | None = None
    gated: Tensor | None = None
    beta: Tensor | None = None
    kl: Tensor | None = None
    known: Tensor | None = None


class Contest(NamedTuple):
    """Which candidates bool [B, k] may win, and which have to be scored to know who does; `gated`
    bool [B]: rows that go without reward at this step (None: none does)."""

    may_win: Tensor
    scored: Tensor
    gated: Tensor | None = None


@dataclass
class RatioPolicy:
    """The ratio policy of a run: softmax((log π + β r) / T) over the k most likely tokens.

    `beta` and `temperature` are fp32 [B], `seeds` int64 [B], on the device of the ids; `check_nan`
    True reads a flag at every step, None once at the end, False never. Rewards are clamped to
    `reward_range`, and with `prune` those that cannot decide a step are not asked for. Neither is
    that of a candidate without a rival where `lone` is "row"; where it is "step", if no row has
    any. `warpers` make π of the scores.

    `schedule` fp32 [T] is what beta is times at each token of an answer. With `kl_budget` beta is
    the most that it may be, and as much as makes the KL from π so many nats. Rows whose entropy
    over the candidates is below `min_entropy` nats go without reward: the scorer then must commit
    rows unscored.

    `over` says what the candidates are: "lm" the most likely tokens; where every token's reward is
    known, "sum" the best of log π + β r, and "all" one token, drawn from the whole vocabulary.
    `top_p` cuts the policy that is drawn from to its nucleus.
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
    schedule: Tensor | None = None
    kl_budget: float | None = None
    min_entropy: float | None = None
    over: str = "lm"
    top_p: float | None = None

    @functools.cached_property
    def _topk(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return self._kernel("topk_logprobs")

    @functools.cached_property
    def mix(self) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        return self._kernel("mix_logits")

    @functools.cached_property
    def sample(self) -> Callable[..., tuple[Tensor, Tensor]]:
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
        gated = None
        if self.min_entropy is not None:
            gated = (entropy_of(logprobs) < self.min_entropy) & rows.unfinished
        if not self.prune and gated is None:
            return None
        if not self.prune:
            may_win = torch.ones_like(ids, dtype=torch.bool)
        elif self.reward_range is None or self.kl_budget is not None or self.top_p is not None:
            may_win = logprobs != -torch.inf  # a NaN may, to be seen
        else:
            if known is not None:
                logprobs = logprobs.masked_fill(~known, -torch.inf)
            may_win = self._keep(logprobs, ids, *self._per_row(rows.position), *self.reward_range)
        scored = may_win & rows.unfinished[:, None]
        if gated is not None:
            scored &= ~gated[:, None]
            if known is not None:  # no reward of -inf says so
                may_win &= known | ~gated[:, None]
        settled = torch.zeros_like(rows.unfinished)
        if self.lone is not None:
            settled = ~rows.unfinished | (may_win.sum(1) == 1)
            if known is not None:  # what is no token must be found to have no reward
                settled &= ~rows.unfinished | (known | ~may_win).all(1)
            if self.lone == "step":
                settled &= settled.all()
        scored &= ~settled[:, None]
        if gated is None:
            scored[:1, 0] |= ~(scored.any() | settled.all())
        return None if scored.all() else Contest(may_win, scored, gated)

    def alone(self, logprobs: Tensor, ids: Tensor, position: Tensor, reach: float) -> Tensor:
        """Whether, bool [B], one candidate wins whatever the rewards between -reach and reach."""
        per_row = self._per_row(position)
        return self._keep(logprobs, ids, *per_row, -reach, reach).sum(1) == 1

    def step_beta(
        self, logprobs: Tensor, rewards: Tensor, position: Tensor, contest: Contest | None
    ) -> Tensor | None:
        """Beta fp32 [B] of a step at `position` int64 [B]; None where it is always the same."""
        if self.schedule is None and self.kl_budget is None:
            return None
        beta = self._beta_at(position)
        if self.kl_budget is not None:
            if contest is not None:
                logprobs, rewards = _contested(logprobs, rewards, contest)
            beta = solve_beta(logprobs, rewards, beta, self.temperature, self.kl_budget)
        if contest is not None and contest.gated is not None:
            beta = beta.masked_fill(contest.gated, 0.0)
        return beta

    def weights(self, position: Tensor) -> Tensor:
        """Of log π and of rewards in their sum, fp32 [B, 2]."""
        beta = self._beta_at(position)
        # With a weight of 0 a token that the rewards say is none could be drawn.
        beta = beta.masked_fill(beta == 0, _NEXT_TO_NOTHING)
        return torch.stack([torch.ones_like(beta), beta], 1)

    def _beta_at(self, position: Tensor) -> Tensor:
        if self.schedule is None:
            return self.beta
        # Steps of rows that have ended may go beyond it.
        return self.beta * self.schedule[position.clamp(max=len(self.schedule) - 1)]

    def _per_row(self, position: Tensor, beta: Tensor | None = None) -> tuple[Any, ...]:
        """What the kernels take of each row at its `position` int64 [B]."""
        beta = self._beta_at(position) if beta is None else beta
        return beta, self.temperature, self.seeds, position, self.do_sample

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
        beta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw (or pick) slots int64 [B] from the ratio policy, with its log-probabilities [B, k];
        `position` int64 [B] counts the answer's tokens, `beta` [B] is that of `step_beta`."""
        if contest is not None:
            logprobs, rewards = _contested(logprobs, rewards, contest)
        if self.top_p is not None and self.do_sample:
            own = self._beta_at(position) if beta is None else beta
            impossible = rewards == -torch.inf
            total = logprobs + own[:, None] * rewards.masked_fill(impossible, 0.0)
            tempered = total.masked_fill(impossible, -torch.inf) / self.temperature[:, None]
            inside = ops.nucleus(tempered.double().softmax(-1), self.top_p)
            logprobs = logprobs.masked_fill(~inside, -torch.inf)
        return self.sample(logprobs, rewards, ids, *self._per_row(position, beta))

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
        return self._step(logprobs, hidden, weight, ids, *self._per_row(position), bias)

    def keep_rows(self, rows: Tensor) -> RatioPolicy:
        columns = {n: getattr(self, n)[rows] for n in ("beta", "temperature", "seeds")}
        return replace(self, **columns)


def _contested(logprobs: Tensor, rewards: Tensor, contest: Contest) -> tuple[Tensor, Tensor]:
    """Log-probabilities and rewards [B, k] of those that may win."""
    logprobs = logprobs.masked_fill(~contest.may_win, -torch.inf)
    return logprobs, rewards.where(contest.scored, 0.0)
