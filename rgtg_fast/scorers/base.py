"""The scorer protocol, and what the three scorers of a reward model share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import ops
from .reward_model import RewardModel


@runtime_checkable
class Scorer(Protocol):
    """The whole contract between the decode loop and whatever gives rewards.

    A scorer may also have `keep_rows(rows)` (int64 [n]: go on with these rows alone). Without it,
    rows that have ended are carried along until all have.
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
        with self.rm.evaluating(), self.rm.fast_linears.active():
            last = self._prefill(input_ids.to(self.rm.device), attention_mask.to(self.rm.device))
        self.last_reward = last  # [B], reward of the prefix as it stands

    @torch.no_grad()
    def score(self, ids: Tensor) -> Tensor:
        ids_here = ids.to(self.rm.device)
        known = None
        if self.rm.vocab_size <= self.largest_id:
            # A language model's vocabulary may be padded past its tokenizer: such an id is no
            # token, the reward model has no row for it, and it must never be chosen.
            known = ids_here < self.rm.vocab_size
            ids_here = ids_here.where(known, 0)
        with self.rm.evaluating(), self.rm.fast_linears.active():
            rewards = self._score(ids_here)
        if known is not None:
            rewards = rewards.masked_fill(~known, -torch.inf)
        if self.eos_ids is not None:
            rewards = torch.where(
                torch.isin(ids_here, self.eos_ids), self.last_reward[:, None], rewards
            )
        self.rewards = rewards
        return rewards.to(ids.device)

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

    largest_id = -1  # set by the factory where the language model has more ids than the RM

    @abstractmethod
    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode the prompts; rewards fp32 [B] of the prompts themselves."""

    @abstractmethod
    def _score(self, ids: Tensor) -> Tensor:
        """Rewards fp32 [B, k] of prefix + candidate."""

    @abstractmethod
    def _commit(self, slot: Tensor) -> None:
        """Append the winners to the prefix."""

    @abstractmethod
    def _keep_rows(self, rows: Tensor) -> None:
        """Drop the other rows."""


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids [B, P] of left-padded rows: 0 for padding and for the first real token."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_real(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden state [B, 1, H] at each row's last real token."""
    index = attention_mask.shape[1] - 1 - attention_mask.flip(-1).long().argmax(-1)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, index.to(hidden.device)][:, None]
