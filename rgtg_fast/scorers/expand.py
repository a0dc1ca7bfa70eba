"""The prefix cache repeated k times, for models that cannot tell siblings apart by a mask."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from ..models.foreign import Unsupported
from ..models.padding import last_real, positions_of
from .base import RewardModelScorer


class ExpandScorer(RewardModelScorer):
    """B*k rows, each with its own copy of the prefix KV: k times the memory of `TreeScorer`."""

    method = "expand"
    state = (*RewardModelScorer.state, "cache", "attention_mask", "position")

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.parts.text_config)
        hidden, _ = self.parts.forward_base(
            input_ids,
            attention_mask=attention_mask,
            position_ids=positions_of(attention_mask),
            cache=self.cache,
            use_cache=True,
        )
        if self.cache.get_seq_length() == 0:
            raise Unsupported("the reward model did not fill the key/value cache it was given")
        self.cache.batch_repeat_interleave(self.k)
        self.attention_mask = attention_mask.repeat_interleave(self.k, dim=0)
        self.position = self.attention_mask.long().sum(-1)
        return self.parts.rewards(last_real(hidden, attention_mask), self.backend)[:, 0]

    def _score(self, ids: Tensor) -> Tensor:
        ones = self.attention_mask.new_ones((self.attention_mask.shape[0], 1))
        self.attention_mask = torch.cat([self.attention_mask, ones], dim=-1)
        hidden, _ = self.parts.forward_base(
            ids.reshape(-1, 1),
            attention_mask=self.attention_mask,
            position_ids=self.position[:, None],
            cache=self.cache,
            use_cache=True,
        )
        self.position = self.position + 1
        rewards = self.parts.rewards(hidden.view(*ids.shape, -1), self.backend)
        return rewards.to(ids.device)

    def _commit(self, slot: Tensor) -> None:
        rows = torch.arange(slot.shape[0], device=slot.device) * self.k + slot
        self.cache.batch_select_indices(rows.repeat_interleave(self.k))

    def _keep_rows(self, rows: Tensor) -> None:
        copies = rows[:, None] * self.k + torch.arange(self.k, device=rows.device)
        self.cache.batch_select_indices(copies.flatten())
        self.attention_mask = self.attention_mask[copies.flatten()]
        self.position = self.position[copies.flatten()]
