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


class Choice(NamedTuple):
    """A step's candidates and the one chosen: log-probabilities under π, rewards and
    log-probabilities under the ratio policy fp32 [B, k], ids int64 [B, k], `slot` int64 [B]; `keep`
    bool [B, k] says which candidates were scored (None: all)."""

    slot: Tensor
    ids: Tensor
    logprobs: Tensor
    rewards: Tensor
    logq: Tensor
    keep: Tensor | None = None


@dataclass
class RatioPolicy:
    """The ratio policy of a run: softmax((log π + β r) / T) over the k most likely tokens.

    `beta` and `temperature` are fp32 [B], `seeds` int64 [B], on the device of the ids; `check_nan`
    True reads a flag at every step, None once at the end, False never. Rewards are clamped to
    `reward_range`, and with `prune` those that cannot decide a step are not asked for.
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
        return self._topk(scores, self.k)

    def contenders(
        self, logprobs: Tensor, ids: Tensor, known: Tensor | None, rows: Rows
    ) -> Tensor | None:
        """Which candidates [B, k] may win, whatever their rewards are; None without pruning.

        The noise of a draw is known before the rewards, and with it each candidate's best and worst
        possible value: drop a candidate whose best is below another's worst. Those not `known` to
        the reward model and rows that have ended are out; of all rows together at least one
        candidate is in.
        """
        if not self.prune:
            return None
        assert self.reward_range is not None
        if known is not None:
            logprobs = logprobs.masked_fill(~known, -torch.inf)
        per_row = self.beta, self.temperature, self.seeds, rows.position, self.do_sample
        keep = self._keep(logprobs, ids, *per_row, *self.reward_range) & rows.unfinished[:, None]
        keep[:1, 0] |= ~keep.any()
        return keep

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
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw (or pick) slots int64 [B] from the ratio policy, with its log-probabilities [B, k];
        `position` int64 [B] counts the answer's tokens. Only those in `keep` [B, k] can win."""
        if keep is not None:
            logprobs, rewards = logprobs.masked_fill(~keep, -torch.inf), rewards.where(keep, 0.0)
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
