"""What scorers share that give every next token a reward from one forward of the prefix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..models.padding import positions_of
from ..models.parts import ModelParts


class NextTokenScorer(ABC):
    """A causal model on its own cache, one token a step; subclasses say what a candidate gets.

    `commit` only notes the winner; the next `score` runs its forward, so none is spent on the last
    token.
    """

    method = "next_token"

    def __init__(self, model: nn.Module) -> None:
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings over the vocabulary; pass a "
                "causal LM (AutoModelForCausalLM)"
            )
        self.model, self.rm = model, ModelParts(model)
        self.parts: ModelParts  # from here on: for one call
        self.head: Any
        self.state: Tensor

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Prompts int64 [B, P] and their mask [B, P], padding on the left."""
        self.rm = ModelParts(self.model)  # anew: its modules may have changed
        self.parts = self.rm.twin()
        self.head = self.parts.model.get_output_embeddings()  # type: ignore[operator]
        self.mask = attention_mask.to(self.rm.device)
        self.cache: Any = None
        self.chosen: Tensor | None = None
        self._advance(input_ids.to(self.rm.device), positions_of(self.mask))

    @torch.no_grad()
    def score(self, ids: Tensor) -> Tensor:
        """Rewards fp32 [B, k] of the candidates `ids` int64 [B, k] behind the prefix; -inf for ids
        past this model's vocabulary."""
        if self.chosen is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=1)
            position = self.mask.sum(-1, keepdim=True) - 1
            self._advance(self.chosen[:, None], position)
            self.chosen = None
        self.ids = ids.to(self.rm.device)
        last = self.head.weight.shape[0] - 1
        rewards = self._rewards(self.ids.clamp(max=last))
        return rewards.masked_fill(self.ids > last, -torch.inf).to(ids.device)

    def commit(self, slot: Tensor) -> None:
        """Append candidate `slot` int64 [B] of the last scored ids to every row."""
        self.chosen = self.ids.gather(1, slot.to(self.ids.device)[:, None])[:, 0]
        self.chosen = self.chosen.clamp(max=self.head.weight.shape[0] - 1)

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows (int64 [n]) only."""
        rows = rows.to(self.rm.device)
        self.mask, self.state = self.mask[rows], self.state[rows]
        if self.chosen is not None:
            self.chosen = self.chosen[rows]
        self.cache.batch_select_indices(rows)

    def finish(self) -> None:
        """Let go of the call's cache, twin and logits."""
        for name in ("parts", "head", "mask", "cache", "chosen", "state", "ids"):
            self.__dict__.pop(name, None)

    def _advance(self, ids: Tensor, positions: Tensor) -> None:
        self.state, self.cache = self._forward(
            ids,
            attention_mask=self.mask,
            position_ids=positions,
            cache=self.cache,
            use_cache=True,
        )

    @abstractmethod
    def _forward(self, ids: Tensor, cache: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """What candidates are scored with [B, ..], for the last position, and the cache."""

    @abstractmethod
    def _rewards(self, ids: Tensor) -> Tensor:
        """Rewards fp32 [B, k] out of `self.state`."""
