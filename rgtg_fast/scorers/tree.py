"""One forward of k siblings at the same position over the shared prefix KV."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..models.attention import attention_kernel
from ..models.cache import SiblingCache
from ..models.compiled import CompiledSiblings
from ..models.foreign import Unsupported
from ..models.padding import last_real
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
    state = (*RewardModelScorer.state, "forward")

    def __init__(self, rm: RewardModel, k: int, *, fused: bool = False, **options: Any) -> None:
        super().__init__(rm, k, **options)
        self.fused = fused
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
        return self._hidden(ids).to(head[0].dtype), *head

    @abstractmethod
    def _hidden(self, ids: Tensor) -> Tensor:
        """The candidates' hidden states [B, k, H]."""

    def _score(self, ids: Tensor) -> Tensor:
        return self.parts.rewards(self._hidden(ids), self.backend).to(ids.device)


class TreeScorer(SiblingScorer):
    """k sibling queries, one prefix; only the winner's KV is kept, so memory does not grow by k."""

    method = "tree"

    def __init__(self, rm: RewardModel, k: int, **options: Any) -> None:
        super().__init__(rm, k, **options)
        # On a GPU skipping saves next to nothing, and changing shapes would rule out a graph.
        self.can_skip = rm.device.type == "cpu"

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        sizes = self.k, self.capacity
        self.forward = SiblingForward(self.parts, *sizes, self.fused, self.backend)
        self.forward.compiled = self.compiled
        hidden = self.forward.prefill(input_ids, attention_mask)
        return self.parts.rewards(last_real(hidden, attention_mask), self.backend)[:, 0]

    def _hidden(self, ids: Tensor) -> Tensor:
        return self.forward.siblings(ids)

    def _score_kept(self, ids: Tensor, keep: Tensor) -> Tensor:
        if keep.all():
            return self._score(ids)
        selection = Selection(keep, packs=self.fused)
        hidden = self.forward.siblings(ids, selection)
        return selection.put_back(self.parts.rewards(hidden, self.backend).to(ids.device))

    def _commit(self, slot: Tensor) -> None:
        self.forward.commit(slot)

    def _keep_rows(self, rows: Tensor) -> None:
        self.forward.keep_rows(rows)
