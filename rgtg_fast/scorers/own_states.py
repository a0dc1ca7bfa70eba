"""Vocabulary rewards from the states that the language model has anyway, or from a forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import ops
from ..models.vocab_head import VocabHead
from .rows import kept_handles
from .vocab_head import VocabRewardScorer


class States(Protocol):
    """Whoever runs the language model."""

    def states(self) -> Tensor:
        """The last hidden states [B, H] of all rows, whose next tokens are to be chosen."""


class StateScorer:
    """Rewards of a `VocabHead` on the language model that decodes: no forward, and no text.

    Made for one call. Its rows are those of `source`, which is set before the first reward: tokens
    and caches are there, so there is nothing to do here when they change.
    """

    method = "own_states"
    capturable = True
    caches = ()
    source: States

    def __init__(self, rm: VocabHead, backend: ops.Backend) -> None:
        self.rm, self.backend, self.own = rm, backend, rm.of_heads()
        self.handles: list[int] = []
        self.given = 0

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.given = len(input_ids)
        self.handles = list(range(self.given))

    @torch.no_grad()
    def score(self, ids: Tensor, handles: Sequence[int] | None = None) -> Tensor:
        """Rewards fp32 [n, k] of the candidates `ids` int64 [n, k] of each row."""
        states = self.source.states()
        if handles is not None:
            states = states[[self.handles.index(handle) for handle in handles]]
        return self.own.rewards(states, ids.to(states.device), self.backend).to(ids.device)

    @torch.no_grad()
    def score_all(self) -> Tensor:
        """Rewards fp32 [B, V_r] of every token that all heads have, behind all rows."""
        return self.own.score_all(self.source.states())

    def commit(self, slot: Tensor, handles: Sequence[int] | None = None) -> None:
        """The source's next step takes the tokens in."""

    def join(self, prompts: Sequence[Tensor]) -> list[int]:
        new = list(range(self.given, self.given + len(prompts)))
        self.given += len(prompts)
        self.handles = self.handles + new
        return new

    def leave(self, handles: Sequence[int]) -> None:
        self.handles = [handle for handle in self.handles if handle not in set(handles)]

    def extend(self, handles: Sequence[int], ids: Sequence[Tensor]) -> None:
        """The source has them."""

    def crop(self, handles: Sequence[int], lengths: Sequence[int] | Tensor) -> None:
        """The source does."""

    def keep_rows(self, rows: Tensor) -> None:
        """As `ScorerRows.keep_rows`."""
        self.handles, self.given = kept_handles(self.handles, rows, self.given)


class VocabHeadScorer(VocabRewardScorer):
    """Rewards of a `VocabHead` by a forward of its language model, one token a step: where the
    states of the one that decodes are other ones, or cannot be had."""

    own: VocabHead  # for one call

    def __init__(self, rm: VocabHead, backend: ops.Backend) -> None:
        super().__init__(rm.model, backend)
        self.vocab_head = rm

    def finish(self) -> None:
        self.__dict__.pop("own", None)
        super().finish()

    def _start(self) -> None:
        super()._start()
        self.own = self.vocab_head.of_heads()

    def _rewards(self, state: Tensor, ids: Tensor) -> Tensor:
        return self.own.rewards(state, ids, self.backend)

    def _rewards_of_all(self, state: Tensor) -> Tensor:
        return self.own.score_all(state)


def of_vocab_head(
    rm: VocabHead, shared: bool, capacity: int, backend: ops.Backend
) -> StateScorer | VocabHeadScorer:
    """The scorer of a `VocabHead`; `shared`: the language model that decodes gives its states."""
    if shared:
        return StateScorer(rm, backend)
    scorer: Any = VocabHeadScorer(rm, backend)
    scorer.reserve(capacity)
    return scorer
