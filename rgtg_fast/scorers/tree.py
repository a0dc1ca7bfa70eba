"""One forward of k siblings at the same position over the shared prefix KV."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.attention import attention_kernel
from ..models.cache import SiblingCache
from ..models.compiled import CompiledSiblings
from ..models.foreign import Unsupported
from ..models.padding import at_counts, last_real, without_copies
from ..models.reward_model import RewardModel
from ..models.selection import Selection
from ..models.siblings import SiblingForward
from .base import RewardModelScorer


class SiblingScorer(RewardModelScorer):
    """A scorer whose state is that of a `SiblingForward`.

    `fused`: by attention without masks (see attention.py). Raises `ValueError` where no kernel of
    it runs on the model's device.
    """

    forward: SiblingForward  # for one call
    selection: Selection | None = None  # of the candidates last scored; None: all
    ahead = 1  # positions that `score_comb` of a call has room for
    chain: Tensor  # int64 [B, m - 1], of the last comb
    state = (*RewardModelScorer.state, "forward", "selection", "chain")

    def __init__(self, rm: RewardModel, k: int, *, fused: bool = False, **options: Any) -> None:
        super().__init__(rm, k, **options)
        self.fused, self.most = fused, k
        self.compiled: CompiledSiblings | None = None  # what `forward` of a call is to run by
        if fused and attention_kernel(self.backend, rm.device) is None:
            raise Unsupported(f"no compiled kernel of candidate_attention runs on {rm.device}")

    @property
    def capturable(self) -> bool:
        return self.fused

    @property
    def caches(self) -> tuple[SiblingCache]:
        return (self.forward.cache,)

    def is_linear(self, device: torch.device) -> bool:
        """Whether a reward is one linear head on hidden states on `device`, and no more: nothing is
        done about EOS, or about ids that the reward model does not have."""
        head = self.rm.linear_head()
        whole = self.eos_ids is None and self.largest_id < self.rm.vocab_size
        return whole and head is not None and head[0].device == device == self.rm.device

    @torch.no_grad()
    def linear(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What rewards are made of: hidden states [B, k, H], the head's weight [H] and bias [1]."""
        head = self.parts.linear_head()
        assert head is not None
        self.scored, self.ids = list(self.handles), ids
        return self._hidden(ids, None).to(head[0].dtype), *head

    def _tokens(self) -> Tensor:
        assert self.forward.position is not None
        return self.forward.position[: len(self.handles), 0]

    def _forward(self, parts: Any) -> SiblingForward:
        """The forward of a call."""
        width = self.k * self.ahead
        forward = SiblingForward(parts, width, self.capacity, self.fused, self.backend)
        forward.compiled = self.compiled
        return forward

    @abstractmethod
    def _hidden(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """The candidates' hidden states [n, k, H]."""

    def _score(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        return self.parts.rewards(self._hidden(ids, rows), self.backend).to(ids.device)

    @torch.no_grad()
    def score_comb(self, ids: Tensor, chain: Tensor, keep: Tensor | None = None) -> Tensor:
        """Rewards fp32 [B, m, k] of candidates `ids` int64 [B, m, k] at the next m <= `ahead`
        positions, each behind the prefix and the candidates `chain` [B, m - 1] before it. NaN of
        those not in `keep` bool [B, m, k], which has the chain's (None: all of them, for which the
        host waits for nothing)."""
        here, chain = ids.to(self.device), chain.to(self.device)
        known = self.known(here)
        if known is not None:
            here = here.where(known, 0)
        self.selection = None
        if keep is not None:
            keep = keep.to(self.device)
            if not keep.all():
                self.selection = self._select(keep.flatten(0, 1))
        rewards = self.parts.rewards(self._comb(here, self._places(chain)), self.backend)
        rewards = rewards.to(self.device)
        if self.selection is not None:
            rewards = self.selection.put_back(rewards)
        rewards = rewards.view(ids.shape)
        if known is not None:
            unknown = ~known if keep is None else ~known & keep
            rewards = rewards.masked_fill(unknown, -torch.inf)
        if self.eos_ids is not None:
            of_chain = rewards[:, :-1].gather(2, chain[..., None])[..., 0]
            before = torch.cat([self.last_reward[:, None], of_chain], dim=1)
            is_eos = (here[..., None] == self.eos_ids).any(-1)
            is_eos = is_eos if keep is None else is_eos & keep
            rewards = torch.where(is_eos, before[..., None], rewards)
        self.ids, self.rewards, self.chain, self.scored = here, rewards, chain, []
        return rewards.to(ids.device)

    @torch.no_grad()
    def commit_comb(self, counts: Tensor, slot: Tensor) -> None:
        """Append the first `counts` [B] tokens of the last `score_comb`'s chain to the rows, with
        candidate `slot` [B] for the last of them."""
        counts, slot = counts.to(self.device), slot.to(self.device)
        last = (counts - 1).clamp(min=0)
        row = torch.arange(len(counts), device=self.device)
        if self.eos_ids is not None:
            of_row = self.rewards[row, last, slot]
            self.last_reward.copy_(of_row.where(counts > 0, self.last_reward))
        if self.texts is not None:
            slots = torch.cat([self.chain, slot[:, None]], dim=1)
            slots = slots.scatter(1, last[:, None], slot[:, None])
            self.texts.extend(self.ids.gather(2, slots[..., None])[..., 0], counts, None)
        depths, siblings = self.ids.shape[1:]
        self._keep_newest(counts, slot, row * depths + last)
        if self.selection is not None:
            slot = self.selection.places_of(slot, row * depths + last)
            siblings = self.selection.width
        self._commit_comb(counts, slot, depths, siblings)

    def _select(self, keep: Tensor) -> Selection:
        """Those `keep` [n, k] of the candidates of n positions, for one forward."""
        return Selection(keep, packs=self.fused)

    def _places(self, chain: Tensor) -> Tensor:
        """Where the candidates `chain` [B, m - 1] are among those that are kept of a comb."""
        if self.selection is None or not chain.numel():
            return chain
        batch, before = chain.shape
        row = torch.arange(batch, device=chain.device)[:, None] * (before + 1)
        at = (row + torch.arange(before, device=chain.device)).flatten()
        return self.selection.places_of(chain.flatten(), at).view_as(chain)

    def _keep_newest(self, counts: Tensor, slot: Tensor, at: Tensor) -> None:
        """Keep what is wanted of the states of the newest tokens: candidates `slot` [B] of the
        comb's positions `at` [B] (of all rows), in the rows with `counts` [B] > 0."""

    @abstractmethod
    def _comb(self, ids: Tensor, chain: Tensor) -> Tensor:
        """The hidden states of candidates `ids` [B, m, k] behind the places `chain` [B, m - 1]:
        [B * m, k, H], or as `selection` has them."""

    @abstractmethod
    def _commit_comb(self, counts: Tensor, slot: Tensor, depths: int, siblings: int) -> None:
        """As `SiblingForward.commit_comb`."""


class TreeScorer(SiblingScorer):
    """k sibling queries, one prefix; only the winner's KV is kept, so memory does not grow by k."""

    method = "tree"
    # Ids [B, k] of a step of which nothing was scored, until it is committed; and the winners
    # [B, 1] of such steps, which are read in one forward when a reward is next asked for.
    unscored: Tensor | None = None
    unread: list[Tensor]
    state = (*SiblingScorer.state, "unscored")

    def __init__(self, rm: RewardModel, k: int, **options: Any) -> None:
        super().__init__(rm, k, **options)
        # On a GPU skipping saves next to nothing, and changing shapes would rule out a graph.
        self.can_skip = rm.device.type == "cpu"
        self.commits_unscored = "step" if self.can_skip else None

    def begin(self, rows: int) -> None:
        super().begin(rows)
        self.unread = []

    def score(
        self, ids: Tensor, keep: Tensor | None = None, handles: Sequence[int] | None = None
    ) -> Tensor:
        if keep is not None and handles is None and not keep.any():
            known = self.known(ids)
            self.unscored = ids if known is None else ids.where(known, 0)
            return torch.full(ids.shape, torch.nan, dtype=torch.float32, device=ids.device)
        self._read()
        return super().score(ids, keep, handles)

    def commit(self, slot: Tensor, handles: Sequence[int] | None = None) -> None:
        if self.unscored is None:
            super().commit(slot, handles)
            return
        self.unread.append(self.unscored.gather(1, slot[:, None]).to(self.device))
        self.unscored = None

    def extend(self, handles: Sequence[int], ids: Sequence[Tensor]) -> None:
        self._read()
        super().extend(handles, ids)

    def crop(self, handles: Sequence[int], lengths: Sequence[int] | Tensor) -> None:
        self._read()
        super().crop(handles, lengths)

    def join(self, prompts: Sequence[Tensor]) -> list[int]:
        self._read()
        return super().join(prompts)

    def linear(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        self._read()
        return super().linear(ids)

    def _read(self) -> None:
        if self.unread:
            tokens, self.unread = torch.cat(self.unread, dim=1), []
            super().extend(self.handles, list(tokens))

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids, mask, copies = without_copies(input_ids, attention_mask)
        self.forward = self._forward(self.parts)
        hidden = self.forward.prefill(ids, mask, copies)
        rewards = self.parts.rewards(last_real(hidden, mask), self.backend)[:, 0]
        return rewards if copies is None else rewards[copies.to(rewards.device)]

    def _join_alike(self, prompts: list[Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        if "forward" not in self.__dict__:
            self.forward = self._forward(self.parts)
        return self.parts.rewards(self.forward.join(prompts)[:, -1:], self.backend)[:, 0]

    def _hidden(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        self.selection = None
        return self.forward.siblings(ids, rows=rows)

    def _score_kept(self, ids: Tensor, keep: Tensor, rows: Tensor | None) -> Tensor:
        if keep.all():
            return self._score(ids, rows)
        self.selection = selection = Selection(keep, packs=self.fused)
        hidden = self.forward.siblings(ids, selection, rows)
        return selection.put_back(self.parts.rewards(hidden, self.backend).to(ids.device))

    def _commit(self, slot: Tensor, rows: Tensor | None, at: Tensor | None) -> None:
        if self.selection is not None:
            slot = self.selection.places_of(slot, at)
        self.forward.commit(slot, rows)

    def _comb(self, ids: Tensor, chain: Tensor) -> Tensor:
        self._read()
        return self.forward.comb(ids, chain, self.selection)

    def _commit_comb(self, counts: Tensor, slot: Tensor, depths: int, siblings: int) -> None:
        self.forward.commit_comb(counts, slot, depths, siblings)

    def _feed(self, ids: Tensor, counts: Tensor, rows: Tensor | None) -> Tensor:
        hidden = self.forward.extend(ids, counts, rows)
        last = at_counts(hidden, counts)
        return self.parts.rewards(last, self.backend)[:, 0].to(ids.device)

    def _cut(self, lengths: Tensor, rows: Tensor | None) -> None:
        self.forward.crop(lengths, rows)

    def _keep(self, rows: Tensor) -> None:
        self.unread = [tokens[rows] for tokens in self.unread]
        self.forward.keep_rows(rows)
