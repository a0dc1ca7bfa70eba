"""What scorers share that give every next token a reward from one forward of the prefix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..models.cache import SiblingCache
from ..models.compiled import CompiledSiblings
from ..models.language_model import LanguageModel
from ..models.padding import positions_of
from ..models.parts import ModelParts
from .causal import StaticForward, language_model


class NextTokenScorer(ABC):
    """A causal model on a cache of its own, one token a step; subclasses say what a candidate gets.

    `commit` only notes the winner; the next `score` runs its forward, so none is spent on the last
    token. The cache is static and updated in place where a probe finds that right for the model,
    and else Hugging Face's. `capacity`, which `generate` sets: prompt and answer, in tokens.
    """

    method = "next_token"
    capacity = 0
    reserved = 0  # slots of the cache
    compiled: CompiledSiblings | None = None  # the forward of one call; set before its prompts

    def __init__(self, model: nn.Module, backend: ops.Backend = "auto") -> None:
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings over the vocabulary; pass a "
                "causal LM (AutoModelForCausalLM)"
            )
        self.model, self.rm, self.backend = model, ModelParts(model), backend
        self.static: StaticForward | None  # from here on: for one call
        self.parts: ModelParts  # without a static cache
        self.mask: Tensor
        self.cache: Any
        self.head: Any
        self.state: Tensor
        self.chosen: Tensor

    def _taken_apart(self) -> LanguageModel | None:
        """The model's parts, where it runs on a static cache."""
        found = language_model(self.model, self.capacity or None, self.backend)
        return found[0] if found is not None and found[1] == "fused" else None

    @property
    def capturable(self) -> bool:
        return self._taken_apart() is not None

    @property
    def caches(self) -> Sequence[SiblingCache]:
        return () if self.static is None else (self.static.forward.cache,)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Prompts int64 [B, P] and their mask [B, P], padding on the left."""
        self.rm = ModelParts(self.model)  # anew: its modules may have changed
        ids, mask = input_ids.to(self.rm.device), attention_mask.to(self.rm.device)
        view = self._taken_apart()
        if view is None:
            self.static, self.cache, self.mask = None, None, mask
            self.parts = self.rm.twin()
            self.head = self.parts.model.get_output_embeddings()  # type: ignore[operator]
            self._advance(ids, positions_of(mask))
        else:
            self.static = StaticForward(view, self.reserved, self.backend, eval_mode=True)
            self.static.forward.compiled = self.compiled
            self.head = self.static.rest.output_embeddings()
            self.state = self._of_hidden(self.static, self.static.prefill(ids, mask))
        self.chosen = ids[:, -1].clone()
        self.waiting = False  # whether the forward of `chosen` is still to be run

    @torch.no_grad()
    def score(self, ids: Tensor) -> Tensor:
        """Rewards fp32 [B, k] of the candidates `ids` int64 [B, k] behind the prefix; -inf for ids
        past this model's vocabulary."""
        if self.waiting:
            self._step()
        self.ids = ids.to(self.rm.device)
        last = self.head.weight.shape[0] - 1
        rewards = self._rewards(self.ids.clamp(max=last))
        return rewards.masked_fill(self.ids > last, -torch.inf).to(ids.device)

    def commit(self, slot: Tensor) -> None:
        """Append candidate `slot` int64 [B] of the last scored ids to every row."""
        chosen = self.ids.gather(1, slot.to(self.ids.device)[:, None])[:, 0]
        self.chosen.copy_(chosen.clamp(max=self.head.weight.shape[0] - 1))
        self.waiting = True

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows (int64 [n]) only."""
        rows = rows.to(self.rm.device)
        self.state, self.chosen = self.state[rows], self.chosen[rows]
        if self.static is None:
            self.mask = self.mask[rows]
            self.cache.batch_select_indices(rows)
        else:
            self.static.keep_rows(rows)

    def finish(self) -> None:
        """Let go of the call's cache, twin and logits."""
        for name in (
            "static",
            "parts",
            "head",
            "mask",
            "cache",
            "chosen",
            "state",
            "ids",
            "compiled",
        ):
            self.__dict__.pop(name, None)

    def _step(self) -> None:
        """Run the forward of the tokens chosen."""
        ids, self.waiting = self.chosen[:, None], False
        if self.static is None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=1)
            self._advance(ids, self.mask.sum(-1, keepdim=True) - 1)
        else:
            self.state = self._of_hidden(self.static, self.static.step(ids))

    def _advance(self, ids: Tensor, positions: Tensor) -> None:
        """The same on Hugging Face's cache."""
        self.state, self.cache = self._forward(
            ids,
            attention_mask=self.mask,
            position_ids=positions,
            cache=self.cache,
            use_cache=True,
        )

    @abstractmethod
    def _of_hidden(self, static: StaticForward, hidden: Tensor) -> Tensor:
        """What candidates are scored with [B, ..], of the last hidden states [B, H]."""

    @abstractmethod
    def _forward(self, ids: Tensor, cache: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """The same by the model's own forward, and the cache."""

    @abstractmethod
    def _rewards(self, ids: Tensor) -> Tensor:
        """Rewards fp32 [B, k] out of `self.state`."""
