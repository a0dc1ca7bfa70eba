"""The scorer protocol, and what the three scorers of a reward model share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import ops
from ..models.padding import groups_of_like_length, left_padded
from ..models.reward_model import RewardModel
from .rows import ScorerRows, Texts


@runtime_checkable
class Scorer(Protocol):
    """The whole contract between the decode loop and whatever gives rewards.

    A scorer may also have `keep_rows(rows)` (int64 [n]: go on with these rows alone, in this order;
    of a `RowScorer` one named again is copied, with a new handle). Without it, rows that have ended
    are carried along until all have. One whose `can_skip` is true takes
    `score(ids, keep)` too: bool [B, k], only these candidates need a reward (at least one does);
    the others get NaN and are not committed. Its `commits_unscored` is "row" where a row of which
    none does can be committed all the same, "step" where that holds if it is so for all rows of a
    step. One that says `capturable = True` only changes
    tensors in place in `score` and `commit`, never waits for the device there, and keeps nothing on
    the host but the lengths of its `caches`, the `SiblingCache`s it has after `prefill` (replaying
    a graph advances the counts on the device alone, so whoever replays one sets these).
    One that has `score_all()` knows every token: it gives the rewards [B, V_r] of all tokens behind
    the rows, before the `score` of the step; what it knows is part of no step's text.
    `finish()`, where there is one, ends a call and drops what belongs to it.
    """

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Take the prompts: int64 [B, P] and their mask [B, P] (1 = real token, padding left)."""

    def score(self, ids: Tensor) -> Tensor:
        """Rewards fp32 [B, k] of prefix + each candidate, for candidate ids int64 [B, k]."""

    def commit(self, slot: Tensor) -> None:
        """Append candidate `slot` int64 [B] (index into the last scored ids) to every row."""


@runtime_checkable
class RowScorer(Scorer, Protocol):
    """A scorer whose rows come and go by themselves; those of `prefill` come together.

    Rows have handles, which stay the same while rows come and go. `score` and `commit` are for all
    rows in the order in which they came, or for those whose `handles` are given; `commit` for rows
    of the last `score`, as long as they were neither extended nor cropped since.
    """

    handles: list[int]

    def join(self, prompts: Sequence[Tensor]) -> list[int]:
        """Rows with these prompts (int64 [P] each, without padding) come in behind the others;
        their handles. Before `prefill`, or after `finish`, it begins a call."""

    def leave(self, handles: Sequence[int]) -> None:
        """Let rows go, and what they hold."""

    def extend(self, handles: Sequence[int], ids: Sequence[Tensor]) -> None:
        """Append tokens, int64 [n] each, to rows."""

    def crop(self, handles: Sequence[int], lengths: Sequence[int] | Tensor) -> None:
        """Keep the first `lengths[i]` >= 1 tokens of rows, prompts included."""


class RewardModelScorer(ScorerRows):
    """EOS handling, devices and the bookkeeping of the last reward; subclasses do the forwards.

    `eos_ids` with `eos_reward="previous"` gives prefix + EOS the reward of the prefix.
    """

    method: str
    can_skip: bool = False
    parts: RewardModel  # a twin, for one call
    # Attributes that `finish` drops.
    state: tuple[str, ...] = ("parts", "rewards", "last_reward", "ids", "texts")

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
        self.vocabulary = rm.vocab_size
        keeps_eos = eos_reward == "hidden" or eos_ids is None
        self.eos_ids = None if keeps_eos else eos_ids.to(rm.device)  # type: ignore[union-attr]
        # Whether cropping has to run a row's new last token again: for its reward.
        self.keeps_text = not keeps_eos
        self.begin(0)

    @property
    def device(self) -> torch.device:
        return self.rm.device

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.parts = self.rm.twin()
        self.begin(len(input_ids))
        ids, mask = input_ids.to(self.device), attention_mask.to(self.device)
        last = self._prefill(ids, mask)
        self.last_reward = last  # [B], reward of the prefix as it stands
        self.texts = Texts(ids, mask, self.capacity) if self.keeps_text else None

    @torch.no_grad()
    def score(
        self, ids: Tensor, keep: Tensor | None = None, handles: Sequence[int] | None = None
    ) -> Tensor:
        self.scored = []
        names, rows = self.rows_of(handles)
        self.check_candidates(ids, len(names))
        if not names:
            return torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        ids_here = ids.to(self.device, torch.int64)
        keep = None if keep is None else keep.to(self.device)
        known = self.known(ids_here)
        if known is not None:
            ids_here = ids_here.where(known, 0)
        if keep is None:
            rewards = self._score(ids_here, rows)
        else:
            rewards = self._score_kept(ids_here, keep, rows)
        if known is not None:
            rewards = rewards.masked_fill(~known, -torch.inf)
        if self.eos_ids is not None:
            # Not torch.isin: with many EOS ids it sorts and makes the host wait for the device.
            is_eos = (ids_here[..., None] == self.eos_ids).any(-1)
            last = self.last_reward if rows is None else self.last_reward[rows]
            rewards = torch.where(is_eos, last[:, None], rewards)
        if keep is not None:
            rewards = rewards.masked_fill(~keep, torch.nan)
        self.ids, self.rewards, self.scored = ids_here, rewards, list(names)
        return rewards.to(ids.device)

    def known(self, ids: Tensor) -> Tensor | None:
        """Which of `ids` the reward model has a row for; None where it has one for all.

        A language model's vocabulary may be padded past its tokenizer: such an id is no token and
        must never be chosen.
        """
        return ids < self.rm.vocab_size if self.rm.vocab_size <= self.largest_id else None

    @torch.no_grad()
    def commit(self, slot: Tensor, handles: Sequence[int] | None = None) -> None:
        rows, at = self.scored_rows(handles, slot)
        if not len(slot):
            return
        slot = slot.to(self.device, torch.int64)
        if self.eos_ids is not None:
            last = (self.rewards if at is None else self.rewards[at]).gather(1, slot[:, None])[:, 0]
            put(self.last_reward, last, rows)
        if self.texts is not None:
            ids = self.ids if at is None else self.ids[at]
            self.texts.extend(ids.gather(1, slot[:, None]), 1, rows)
        self._commit(slot, rows, at)

    def finish(self) -> None:
        """Let go of the call's cache, twin and rewards."""
        for name in self.state:
            self.__dict__.pop(name, None)
        self.begin(0)

    largest_id = -1  # set by the factory where the language model has more ids than the RM

    def _join(self, prompts: list[Tensor]) -> None:
        if "parts" not in self.__dict__:
            self.parts = self.rm.twin()
            self.last_reward = torch.zeros(0, dtype=torch.float32, device=self.device)
            none = torch.zeros((0, 1), dtype=torch.int64, device=self.device)
            self.texts = Texts(none, none) if self.keeps_text else None
        for group in groups_of_like_length(prompts):
            ids, mask = left_padded(group)
            last = self._join_alike(group, ids, mask)
            self.last_reward = torch.cat([self.last_reward, last.to(self.device)])
            if self.texts is not None:
                self.texts.join(ids, mask)

    def _extend(self, ids: Tensor, counts: Tensor, rows: Tensor | None) -> None:
        last = self._feed(ids, counts, rows)
        if self.eos_ids is not None:
            before = self.last_reward if rows is None else self.last_reward[rows]
            put(self.last_reward, last.where(counts > 0, before), rows)
        if self.texts is not None:
            self.texts.extend(ids, counts, rows)

    def _crop(self, lengths: Tensor, rows: Tensor | None) -> None:
        if self.texts is None:
            self._cut(lengths, rows)
            return
        last = self.texts.crop(lengths, rows)[:, None]
        self._cut(lengths - 1, rows)
        self._extend(last, torch.ones_like(lengths), rows)

    def _keep_rows(self, rows: Tensor) -> None:
        self.last_reward = self.last_reward[rows]
        if self.texts is not None:
            self.texts.keep_rows(rows)
        self._keep(rows)

    @abstractmethod
    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode the prompts; rewards fp32 [B] of the prompts themselves."""

    @abstractmethod
    def _join_alike(self, prompts: list[Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        """Encode prompts of rows that come in, also given padded; their rewards fp32 [n]."""

    @abstractmethod
    def _score(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Rewards fp32 [n, k] of prefix + candidate of rows int64 [n] (None: of all)."""

    def _score_kept(self, ids: Tensor, keep: Tensor, rows: Tensor | None) -> Tensor:
        """Rewards fp32 [n, k], right for those in `keep` [n, k] at least."""
        return self._score(ids, rows)

    @abstractmethod
    def _commit(self, slot: Tensor, rows: Tensor | None, at: Tensor | None) -> None:
        """Append the winners `slot` [n] to the rows, which are those last scored, or of these the
        ones at places `at` [n]."""

    @abstractmethod
    def _feed(self, ids: Tensor, counts: Tensor, rows: Tensor | None) -> Tensor:
        """Append tokens, as `_extend`; rewards fp32 [n] of the prefixes then, or anything where
        nothing is done about EOS, and where a row gets no token."""

    @abstractmethod
    def _cut(self, lengths: Tensor, rows: Tensor | None) -> None:
        """Keep the first `lengths` [n] >= 0 tokens of the rows."""

    @abstractmethod
    def _keep(self, rows: Tensor) -> None:
        """Drop the other rows."""


def put(of_rows: Tensor, values: Tensor, rows: Tensor | None) -> None:
    """Write `values` [n] to rows of a tensor [B], in place."""
    if rows is None:
        of_rows.copy_(values)
    else:
        of_rows[rows.to(of_rows.device)] = values.to(of_rows.device)
