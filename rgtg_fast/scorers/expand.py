"""The prefix cache repeated k times, for models that cannot tell siblings apart by a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.copies import RowCaches, empty_cache
from ..models.foreign import Unsupported
from ..models.padding import at_counts, last_real, positions_of, without_copies
from .base import RewardModelScorer


class ExpandScorer(RewardModelScorer):
    """B*k rows, each with its own copy of the prefix KV: k times the memory of `TreeScorer`.

    The rows last scored are a batch; others wait outside of it, without padding (`RowCaches`).
    """

    method = "expand"
    rows: RowCaches  # for one call
    state = (*RewardModelScorer.state, "rows")

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids, mask, copies = without_copies(input_ids, attention_mask)
        cache, last = self._prompts(ids, mask)
        if copies is None:
            copies = torch.arange(len(ids), device=ids.device)
        index = copies.repeat_interleave(self.k)
        cache.batch_select_indices(index)
        self.rows = RowCaches(self.parts.text_config)
        self.rows.begin(cache, mask[index], self.k)
        return last[copies.to(last.device)]

    def _join_alike(self, prompts: list[Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        cache, last = self._prompts(ids, mask)
        if "rows" not in self.__dict__:
            self.rows = RowCaches(self.parts.text_config)
        self.rows.join(cache, mask)
        return last

    def _prompts(self, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        """The cache filled with the prompts, and their rewards fp32 [n]."""
        cache = empty_cache(self.parts.text_config)
        hidden, _ = self.parts.forward_base(
            ids,
            attention_mask=mask,
            position_ids=positions_of(mask),
            cache=cache,
            use_cache=True,
        )
        if cache.get_seq_length() == 0:
            raise Unsupported("the reward model did not fill the key/value cache it was given")
        return cache, self.parts.rewards(last_real(hidden, mask), self.backend)[:, 0]

    def _score(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        hidden, _ = self._fed(ids, rows)
        rewards = self.parts.rewards(hidden.view(*ids.shape, -1), self.backend)
        return rewards.to(ids.device)

    def _fed(self, ids: Tensor, rows: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
        """Hidden states [n * k, 1, H] of the candidates `ids` [n, k], and the whole output."""
        batch = self.rows.batch_of(rows, ids.shape[1])
        flat = ids.reshape(-1, 1)
        return batch.feed(self.parts.forward_base, flat, torch.ones_like(flat), **options)

    def _commit(self, slot: Tensor, rows: Tensor | None, at: Tensor | None) -> None:
        batch = self.rows.batch
        if at is None and batch is not None:
            batch.keep_copy(slot)
            return
        numbers = self.rows.numbers(rows)
        fed = {} if batch is None or not batch.fed else {r: i for i, r in enumerate(batch.rows)}
        if batch is None or not set(numbers) <= fed.keys():  # the batch was taken apart since
            ids = (self.ids if at is None else self.ids[at]).gather(1, slot[:, None])
            self._feed(ids, torch.ones_like(slot), rows)
            return
        chosen = zip(numbers, slot.tolist(), strict=True)
        kept = {row: batch.parked(fed[row], copy) for row, copy in chosen}
        self.rows.dissolve()
        for row, parked in kept.items():
            self.rows.waiting[row] = parked

    def _feed(self, ids: Tensor, counts: Tensor, rows: Tensor | None) -> Tensor:
        batch = self.rows.batch_of(rows, 1)
        real = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
        hidden, _ = batch.feed(self.parts.forward_base, ids, real.long())
        batch.fed = 0
        self.rows.dissolve()  # its rows may end in padding
        return self.parts.rewards(at_counts(hidden, counts), self.backend)[:, 0].to(ids.device)

    def _cut(self, lengths: Tensor, rows: Tensor | None) -> None:
        self.rows.cut(lengths, rows)

    def _keep(self, rows: Tensor) -> None:
        self.rows.keep_rows(rows)

    def _tokens(self) -> Tensor:
        return self.rows.tokens().to(self.device)
