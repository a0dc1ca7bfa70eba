"""The scorer protocol, and what the three scorers of a reward model share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import ops
from ..models.reward_model import RewardModel


@runtime_checkable
class Scorer(Protocol):
    """The whole contract between the decode loop and whatever gives rewards.

    A scorer may also have `keep_rows(rows)` (int64 [n]: go on with these rows alone). Without it,
    rows that have ended are carried along until all have. One whose `can_skip` is true takes
    `score(ids, keep)` too: bool [B, k], only these candidates need a reward (at least one does);
    the others get NaN and are not committed. With `commits_unscored` it may be none, and a row's
    only candidate is committed without. One that says `capturable = True` only changes
    tensors in place in `score` and `commit`, never waits for the device there, and keeps nothing on
    the host but the lengths of its `caches`, the `SiblingCache`s it has after `prefill` (replaying
    a graph advances the counts on the device alone, so whoever replays one sets these).
    `finish()`, where there is one, ends a call and drops what belongs to it.
    """

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Take the prompts: int64 [B, P] and their mask [B, P] (1 = real token, padding left)."""

    def score(self, ids: Tensor) -> Tensor:
        """Rewards fp32 [B, k] of prefix + each candidate, for candidate ids int64 [B, k]."""

    def commit(self, slot: Tensor) -> None:
        """Append candidate `slot` int64 [B] (index into the last scored ids) to every row."""


class RewardModelScorer(ABC):
    """EOS handling, devices and the bookkeeping of the last reward; subclasses do the forwards.

    `eos_ids` with `eos_reward="previous"` gives prefix + EOS the reward of the prefix.
    """

    method: str
    can_skip: bool = False
    parts: RewardModel  # a twin, for one call
    state: tuple[str, ...] = ("parts", "rewards", "last_reward")  # attributes that `finish` drops

    def __init__(
        self,
        rm: RewardModel,
        k: int,
        *,
        eos_ids: Tensor | None = None,
        eos_reward: str = "hidden",
        capacity: int = 0,
        backend: ops.Backend = "auto",
    ) -> None:
        self.rm, self.k, self.capacity, self.backend = rm, k, capacity, backend
        keeps_eos = eos_reward == "hidden" or eos_ids is None
        self.eos_ids = None if keeps_eos else eos_ids.to(rm.device)  # type: ignore[union-attr]

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.parts = self.rm.twin()
        last = self._prefill(input_ids.to(self.rm.device), attention_mask.to(self.rm.device))
        self.last_reward = last  # [B], reward of the prefix as it stands

    @torch.no_grad()
    def score(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        ids_here = ids.to(self.rm.device)
        keep = None if keep is None else keep.to(self.rm.device)
        known = self.known(ids_here)
        if known is not None:
            ids_here = ids_here.where(known, 0)
        rewards = self._score(ids_here) if keep is None else self._score_kept(ids_here, keep)
        if known is not None:
            rewards = rewards.masked_fill(~known, -torch.inf)
        if self.eos_ids is not None:
            # Not torch.isin: with many EOS ids it sorts and makes the host wait for the device.
            is_eos = (ids_here[..., None] == self.eos_ids).any(-1)
            rewards = torch.where(is_eos, self.last_reward[:, None], rewards)
        if keep is not None:
            rewards = rewards.masked_fill(~keep, torch.nan)
        self.rewards = rewards
        return rewards.to(ids.device)

    def known(self, ids: Tensor) -> Tensor | None:
        """Which of `ids` the reward model has a row for; None where it has one for all.

        A language model's vocabulary may be padded past its tokenizer: such an id is no token and
        must never be chosen.
        """
        return ids < self.rm.vocab_size if self.rm.vocab_size <= self.largest_id else None

    def commit(self, slot: Tensor) -> None:
        slot = slot.to(self.rm.device)
        if self.eos_ids is not None:
            self.last_reward.copy_(self.rewards.gather(1, slot[:, None])[:, 0])
        self._commit(slot)

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with rows `rows` int64 [n] alone: the others have ended."""
        rows = rows.to(self.rm.device)
        self.last_reward = self.last_reward[rows]
        self._keep_rows(rows)

    def finish(self) -> None:
        """Let go of the call's cache, twin and rewards."""
        for name in self.state:
            self.__dict__.pop(name, None)

    largest_id = -1  # set by the factory where the language model has more ids than the RM

    @abstractmethod
    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode the prompts; rewards fp32 [B] of the prompts themselves."""

    @abstractmethod
    def _score(self, ids: Tensor) -> Tensor:
        """Rewards fp32 [B, k] of prefix + candidate."""

    def _score_kept(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Rewards fp32 [B, k], right for those in `keep` [B, k] at least."""
        return self._score(ids)

    @abstractmethod
    def _commit(self, slot: Tensor) -> None:
        """Append the winners to the prefix."""

    @abstractmethod
    def _keep_rows(self, rows: Tensor) -> None:
        """Drop the other rows."""
