"""A causal language model taken apart: base, and what it does after its base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cpu_linear import FastLinears
from .reward_model import RewardModel


class LanguageModel(RewardModel):
    """A causal LM taken apart: `forward_base`, and `logits` for what the model does after it."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, head=_no_head)
        self.fast_linears = FastLinears(model)
        self._ready: tuple[tuple, Tensor, Tensor, Any] | None = None  # see `logits`

    def logits(self, hidden: Tensor, output_type: Any) -> Tensor:
        """Logits [B, V] of hidden states [B, H], by the model's own code after its base (heads,
        caps, scales): the model runs with a base that hands out `hidden`."""
        if self._ready is None or self._ready[0] != (hidden.shape, hidden.dtype, output_type):
            # A tensor of its own: with frozen weights torch's linear copies the whole vocabulary
            # matrix for an input whose strides are not quite a new tensor's, as a slice's are not.
            fresh = hidden.new_empty((len(hidden), 1, hidden.shape[1]))
            ids = torch.zeros((len(hidden), 1), dtype=torch.int64, device=hidden.device)
            key = hidden.shape, hidden.dtype, output_type
            self._ready = key, fresh, ids, output_type(last_hidden_state=fresh)
        _, fresh, ids, ready = self._ready
        fresh.copy_(hidden[:, None])
        self.base.__dict__["forward"] = lambda *args, **kwargs: ready
        try:
            return self.model(input_ids=ids, use_cache=False, return_dict=True).logits[:, -1]
        finally:
            del self.base.__dict__["forward"]


def _no_head(hidden: Tensor) -> Tensor:
    raise TypeError("a language model gives no rewards")
