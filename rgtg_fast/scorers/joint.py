"""Rewards and next-token logits from one forward: the reward model is made of the language model.

The k candidates run through the language model as siblings, one step ahead: their hidden states
give the rewards (by a head on them, or on those of a second set of rows that carry an adapter), and
the winner's hidden state is the one that the next token's logits come from. A guided token costs
one forward of k tokens (2k with an adapter) and one row of the vocabulary projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .base import last_real
from .on_base import OnBase
from .tree import SiblingForward, SiblingScorer, fill_cache

if TYPE_CHECKING:
    from ..policy import LanguageModel


class _Both:
    """The base model on the rows of the language model, then those of the adapter if any."""

    def __init__(self, rm: OnBase) -> None:
        self.rm = rm
        self.base, self.device, self.dtype = rm.base, rm.device, rm.dtype
        self.text_config = rm.text_config
        self.reward_hidden: Tensor  # [B, n, H] of the last forward

    def forward_base(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, self.reward_hidden, out = self.rm.forward_both(input_ids, **kwargs)
        return hidden, out


class JointScorer(SiblingScorer):
    """The scorer's side; `JointPolicy` is the policy's. `fused` as for `TreeScorer`."""

    def __init__(self, rm: OnBase, k: int, *, fused: bool, **options: Any) -> None:
        super().__init__(rm, k, **options)
        self.copies = 2 if rm.own_rows else 1
        self.both = _Both(rm)
        self.forward = SiblingForward(self.both, k, self.capacity, fused, self.backend)

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.forward.prefill(self._doubled(input_ids), self._doubled(attention_mask))
        self.next_hidden = hidden[: len(input_ids), -1].clone()  # [B, H], updated in place
        last = last_real(self.both.reward_hidden, attention_mask)
        return self.rm.rewards(last, self.backend)[:, 0]

    def _score(self, ids: Tensor) -> Tensor:
        self.hidden = self.forward.siblings(self._doubled(ids))[: len(ids)]
        return self.rm.rewards(self.both.reward_hidden, self.backend).to(ids.device)

    def _commit(self, slot: Tensor) -> None:
        index = slot.view(-1, 1, 1).expand(-1, 1, self.hidden.shape[-1])
        self.next_hidden.copy_(self.hidden.gather(1, index.to(self.hidden.device))[:, 0])
        self.forward.commit(self._doubled(slot))

    def _keep_rows(self, rows: Tensor) -> None:
        self.next_hidden = self.next_hidden[rows.to(self.next_hidden.device)]
        batch = len(self.forward.position) // self.copies
        self.forward.keep_rows(torch.cat([rows + i * batch for i in range(self.copies)]))

    def _doubled(self, t: Tensor) -> Tensor:
        return t if self.copies == 1 else torch.cat([t, t])


class JointPolicy:
    """The logits of a `JointScorer`'s winners; it has no forward of its own."""

    attentions = hidden_states = None
    capturable = True
    length = 0  # the scorer counts; see graphs.py

    def __init__(self, view: LanguageModel, scorer: JointScorer, cache: DynamicCache) -> None:
        self.view, self.scorer, self.cache = view, scorer, cache

    def prefill(self, input_ids: Tensor) -> Tensor:
        self.prompt = input_ids.shape[1]
        return self.step(input_ids)

    def step(self, input_ids: Tensor) -> Tensor:
        with self.view.fast_linears.active():
            logits = self.view.logits(self.scorer.next_hidden, self.scorer.forward.output_type)
        return logits.to(input_ids.device)

    def can_keep_rows(self) -> bool:
        return True

    def keep_rows(self, rows: Tensor) -> None:
        """The scorer's rows are the policy's."""

    def finish(self, steps: int) -> Any:
        rows = len(self.scorer.next_hidden)
        return fill_cache(self.cache, self.scorer.forward.cache, self.prompt + steps - 1, rows)
