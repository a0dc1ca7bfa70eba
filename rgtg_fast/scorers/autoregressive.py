"""GenARM: a reward model that is a language model gives log-probs as token rewards."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..models.foreign import cache_argument, cache_of
from .causal import StaticForward
from .next_token import NextTokenScorer


class AutoregressiveScorer(NextTokenScorer):
    """Rewards log p_r(v | x, y_<t) of an autoregressive reward model (arXiv 2410.08193): one
    forward of one token a step for all candidates.

    The reward of the prefix itself, Σ log p_r over its tokens, is the same for all candidates of a
    step and cancels in the ratio policy, so it is left out; generate's `beta` is the paper's 1/β.
    `model` is a causal LM as `PrefixRewardTrainer` trains it with `loss_type="genarm"` or
    `"genarm_prefix"`.

    Example: `rgtg_fast.generate(lm, **inputs, reward_model=AutoregressiveScorer(rm), beta=1.0)`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        inner: Any = model
        if hasattr(model, "peft_config"):
            inner = inner.get_base_model()
        parameters = inspect.signature(inner.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache_argument = cache_argument(inner.forward)

    def _of_hidden(self, static: StaticForward, hidden: Tensor) -> Tensor:
        return static.logits(hidden).float()

    def _forward(self, ids: Tensor, cache: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        kwargs[self._cache_argument] = cache
        # Not base and head: some models cap or scale their logits after the head.
        out = self.parts.model(input_ids=ids, return_dict=True, **kwargs, **self._options)
        return out.logits[:, -1].float(), cache_of(out)

    def _rewards(self, state: Tensor, ids: Tensor) -> Tensor:
        return state.gather(1, ids) - state.logsumexp(-1, keepdim=True)

    def _rewards_of_all(self, state: Tensor) -> Tensor:
        return state.log_softmax(-1)
