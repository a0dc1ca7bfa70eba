"""One forward of k siblings at the same position over the shared prefix KV."""

from __future__ import annotations

from torch import Tensor

from ..cache import SiblingCache, SiblingMask, attention_spans
from .base import RewardModelScorer, last_real, positions_of


class TreeScorer(RewardModelScorer):
    """k sibling queries, one prefix; only the winner's KV is kept, so memory does not grow by k."""

    method = "tree"

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        self.cache = SiblingCache(self.k, max(self.capacity, length + 1))
        hidden, _ = self.rm.forward_base(
            input_ids,
            attention_mask=attention_mask,
            position_ids=positions_of(attention_mask),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache.finish_prefill(length)
        spans = attention_spans(self.rm.text_config)
        self.mask = SiblingMask(attention_mask, spans, self.k, self.cache.capacity, self.rm.dtype)
        self.position = attention_mask.long().sum(-1)  # [B], number of real tokens
        return self.rm.rewards(last_real(hidden, attention_mask), self.backend)[:, 0]

    def _score(self, ids: Tensor) -> Tensor:
        hidden, _ = self.rm.forward_base(
            ids,
            attention_mask=self.mask.current(),
            position_ids=self.position[:, None].expand(-1, self.k),
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.rm.rewards(hidden, self.backend).to(ids.device)

    def _commit(self, slot: Tensor) -> None:
        self.cache.commit(slot)
        self.mask.advance()
        self.position = self.position + 1


def plain_attention(config: object) -> bool:
    """Whether the attention in use takes a dense additive 4D mask (FlashAttention takes 2D ones
    only, and flex_attention with a dense one has crashed the process on CPU)."""
    return getattr(config, "_attn_implementation", "eager") in ("eager", "sdpa")
