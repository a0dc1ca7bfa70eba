"""One forward of k siblings at the same position over the shared prefix KV."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models.attention import attention_kernel
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

    forward: SiblingForward  # of one call
    state = (*RewardModelScorer.state, "forward")

    def __init__(self, rm: RewardModel, k: int, *, fused: bool = False, **options: Any) -> None:
        super().__init__(rm, k, **options)
        self.fused = fused
        if fused and attention_kernel(self.backend, rm.device) is None:
            raise Unsupported(f"no compiled kernel of candidate_attention runs on {rm.device}")

    @property
    def capturable(self) -> bool:
        return self.fused

    @property
    def length(self) -> int:
        return self.forward.length

    @length.setter
    def length(self, length: int) -> None:
        self.forward.length = length


class TreeScorer(SiblingScorer):
    """k sibling queries, one prefix; only the winner's KV is kept, so memory does not grow by k."""

    method = "tree"

    def __init__(self, rm: RewardModel, k: int, **options: Any) -> None:
        super().__init__(rm, k, **options)
        # On a GPU siblings are nearly free, and the shapes of a step stay as they are.
        self.can_skip = rm.device.type == "cpu"

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        sizes = self.k, self.capacity
        self.forward = SiblingForward(self.parts, *sizes, self.fused, self.backend)
        hidden = self.forward.prefill(input_ids, attention_mask)
        return self.parts.rewards(last_real(hidden, attention_mask), self.backend)[:, 0]

    def _score(self, ids: Tensor) -> Tensor:
        return self.parts.rewards(self.forward.siblings(ids), self.backend).to(ids.device)

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
