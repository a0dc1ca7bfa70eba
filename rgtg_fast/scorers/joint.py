"""Rewards and next-token logits from one forward: the reward model is made of the language model.

The k candidates run through the language model as siblings, one step ahead: their hidden states
give the rewards (by a head on them, or on those of a second set of rows that carry an adapter), and
the winner's hidden state is the one that the next token's logits come from. A guided token costs
one forward of k tokens (2k with an adapter) and one row of the vocabulary projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.on_base import OnBase
from ..models.padding import last_real
from ..models.selection import Selection
from ..models.siblings import SiblingForward
from .tree import SiblingScorer


class _Both:
    """The base model on the language model's rows, followed by the adapter's rows if any."""

    def __init__(self, parts: OnBase) -> None:
        self.parts = parts
        self.device, self.dtype, self.twins = parts.device, parts.dtype, parts.twins
        self.text_config = parts.text_config
        self.reward_hidden: Tensor  # [B, n, H] of the last forward

    def forward_base(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, self.reward_hidden, out = self.parts.forward_both(input_ids, **kwargs)
        return hidden, out


class JointScorer(SiblingScorer):
    """The scorer's side; `JointLogits` is the language model's. `fused` as for `TreeScorer`."""

    method = "joint"
    parts: OnBase
    selection: Selection | None  # of the last forward
    state = (*SiblingScorer.state, "both", "hidden", "next_hidden", "selection")

    def __init__(self, rm: OnBase, k: int, **options: Any) -> None:
        super().__init__(rm, k, **options)
        self.copies = 2 if rm.own_rows else 1
        self.can_skip = rm.device.type == "cpu"  # as TreeScorer

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.both = _Both(self.parts)
        sizes = self.k, self.capacity
        self.forward = SiblingForward(self.both, *sizes, self.fused, self.backend)
        self.forward.compiled = self.compiled
        hidden = self.forward.prefill(self._doubled(input_ids), self._doubled(attention_mask))
        self.next_hidden = hidden[: len(input_ids), -1].clone()  # [B, H], updated in place
        last = last_real(self.both.reward_hidden, attention_mask)
        return self.parts.rewards(last, self.backend)[:, 0]

    def _hidden(self, ids: Tensor) -> Tensor:
        self.selection = None
        self.hidden = self.forward.siblings(self._doubled(ids))[: len(ids)]
        return self.both.reward_hidden

    def _score_kept(self, ids: Tensor, keep: Tensor) -> Tensor:
        if keep.all():
            return self._score(ids)
        # An adapter's rows are told by their place in the batch, so they cannot be packed.
        self.selection = own = Selection(keep, packs=self.fused and self.copies == 1)
        both = own if self.copies == 1 else Selection(self._doubled(keep), packs=False)
        self.hidden = self.forward.siblings(self._doubled(ids), both)[: len(ids)]
        rewards = self.parts.rewards(self.both.reward_hidden, self.backend)
        return own.put_back(rewards.to(ids.device))

    def _commit(self, slot: Tensor) -> None:
        if self.selection is None:
            index = slot.view(-1, 1, 1).expand(-1, 1, self.hidden.shape[-1])
            winner = self.hidden.gather(1, index.to(self.hidden.device))[:, 0]
        else:
            winner = self.selection.states_of(slot, self.hidden)
        self.next_hidden.copy_(winner)
        self.forward.commit(self._doubled(slot))

    def _keep_rows(self, rows: Tensor) -> None:
        self.next_hidden = self.next_hidden[rows.to(self.next_hidden.device)]
        batch = len(self.forward.position) // self.copies
        self.forward.keep_rows(torch.cat([rows + i * batch for i in range(self.copies)]))

    def _doubled(self, t: Tensor) -> Tensor:
        return t if self.copies == 1 else torch.cat([t, t])
