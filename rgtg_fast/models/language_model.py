"""A causal language model taken apart: base, and what it does after its base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cpu_linear import quicken
from .foreign import COMPILED
from .parts import ModelParts
from .twin import Twins


class LanguageModel(ModelParts):
    """A causal LM taken apart: `forward_base`, and `rest` for what the model does after it."""

    def rest(self, eval_mode: bool = False) -> AfterBase:
        """What the model does after its base, on a twin."""
        return AfterBase(self, eval_mode)

    def _roots(self) -> list[nn.Module]:
        return [self.base]  # the rest has a twin of its own


class AfterBase:
    """A causal LM whose base is replaced by one that returns given hidden states, so that the
    model's own code after the base (head, caps, scales) can be run on them."""

    def __init__(self, parts: LanguageModel, eval_mode: bool) -> None:
        self._handout = _Handout()
        base = object.__new__(type(parts.base))
        base.__dict__.update(parts.base.__dict__)
        base.__dict__["forward"] = self._handout
        base.__dict__[COMPILED] = None
        twins = Twins([parts.model], eval_mode, given={parts.base: base})
        quicken(twins.modules)
        # `twins` is kept, as its copies are emptied when it is freed.
        self._twins, self._model = twins, twins[parts.model]
        self._key: tuple | None = None
        self._fresh: Tensor
        self._ids: Tensor

    def output_embeddings(self) -> Any:
        """The twin's head."""
        return self._model.get_output_embeddings()

    def logits(self, hidden: Tensor, output_type: Any) -> Tensor:
        """Logits [B, V] of hidden states [B, H], by the model's own code after its base (heads,
        caps, scales). `output_type` is the class of what the base returns."""
        key = hidden.shape, hidden.dtype, output_type
        if self._key != key:
            # Copy into a fresh contiguous tensor: for a slice, with frozen weights, torch.linear
            # copies the whole vocabulary matrix.
            self._fresh = hidden.new_empty((len(hidden), 1, hidden.shape[1]))
            self._ids = torch.zeros((len(hidden), 1), dtype=torch.int64, device=hidden.device)
            self._handout.output = output_type(last_hidden_state=self._fresh)
            self._key = key
        self._fresh.copy_(hidden[:, None])
        out = self._model(input_ids=self._ids, use_cache=False, return_dict=True)
        return out.logits[:, -1]


class _Handout:
    """Replaces the base's forward: returns `output`."""

    output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output
