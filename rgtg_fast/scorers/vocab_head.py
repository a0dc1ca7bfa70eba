"""FaRMA: a head over the vocabulary gives the rewards of all next tokens at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from ..models.foreign import cache_of
from .causal import StaticForward
from .next_token import NextTokenScorer


class VocabRewardScorer(NextTokenScorer):
    """Rewards R(v | x, y_<t) = h_{t-1} · W[v] + b[v] of a vocabulary-head reward model
    (arXiv 2502.04517): one forward of one token a step, and k rows of W gathered.

    `model` is a causal LM whose output embeddings are the reward head, as `PrefixRewardTrainer`
    trains it with `loss_type="farma"` or `"soft_q"`. Raises `ValueError` for a model without.

    Example: `rgtg_fast.generate(lm, **inputs, reward_model=VocabRewardScorer(rm), k=10)`.
    """

    def __init__(self, model: nn.Module, backend: ops.Backend = "auto") -> None:
        super().__init__(model, backend)

    def _of_hidden(self, static: StaticForward, hidden: Tensor) -> Tensor:
        return hidden.contiguous()

    def _forward(self, ids: Tensor, cache: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, out = self.parts.forward_base(ids, cache=cache, **kwargs)
        return hidden[:, -1].contiguous(), cache_of(out)

    def _rewards(self, state: Tensor, ids: Tensor) -> Tensor:
        head: Any = self.head
        hidden = state.to(head.weight.device)
        if type(head) is not nn.Linear:  # an adapter on the head: there are no plain rows to gather
            return head(hidden.to(head.weight.dtype)).gather(1, ids).float()
        kernel = ops.kernel("vocab_reward", self.backend, hidden.device, len(hidden))
        rewards = kernel(hidden, head.weight, ids)
        return rewards if head.bias is None else rewards + head.bias[ids].float()

    def _rewards_of_all(self, state: Tensor) -> Tensor:
        head: Any = self.head
        return head(state.to(head.weight.device, head.weight.dtype)).float()
