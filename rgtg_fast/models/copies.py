"""Rows in a key/value cache of Hugging Face's, each repeated for its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .padding import positions_of


class Parked(NamedTuple):
    """A row outside of a batch: its mask [s], from its first real token to its last, and keys and
    values [Hkv, s, D] of each layer."""

    mask: Tensor
    layers: list[tuple[Tensor, Tensor]]

    def cut(self, tokens: int) -> Parked:
        """The row with its first `tokens` real tokens alone."""
        end = int((self.mask.cumsum(0) < tokens).sum()) + 1 if tokens else 0
        return Parked(self.mask[:end], [(k[:, :end], v[:, :end]) for k, v in self.layers])


def empty_cache(config: Any) -> DynamicCache:
    """A cache that keeps all tokens, also those that a window has passed: a row may be cropped.
    With recurrent layers it is what the configuration says."""
    cache = DynamicCache(config=config)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return DynamicCache() if all(type(x) in plain for x in cache.layers) else cache


class Copies:
    """A batch of rows, numbered `rows`, each `copies` times in a `cache` (copies next to each
    other), padded on the left: `attention_mask` [n * copies, L] and `position` [n * copies], the
    real tokens of each."""

    def __init__(self, rows: list[int], copies: int, cache: Any, mask: Tensor) -> None:
        self.rows, self.copies, self.cache, self.attention_mask = rows, copies, cache, mask
        self.position = mask.long().sum(-1)
        self.fed = 0  # tokens of a forward that may still be taken back

    @classmethod
    def assembled(
        cls, rows: list[int], parked: Sequence[Parked], copies: int, config: Any
    ) -> Copies:
        length = max(len(row.mask) for row in parked)
        mask = parked[0].mask.new_zeros((len(parked), length))
        for i, row in enumerate(parked):
            mask[i, length - len(row.mask) :] = row.mask
        cache = empty_cache(config)
        for layer in range(len(parked[0].layers) if length else 0):
            both = []
            for which in (0, 1):
                of_rows = [row.layers[layer][which] for row in parked]
                heads, _, dim = of_rows[0].shape
                whole = of_rows[0].new_zeros((len(parked), heads, length, dim))
                for i, row_states in enumerate(of_rows):
                    whole[i, :, length - row_states.shape[1] :] = row_states
                both.append(whole.repeat_interleave(copies, dim=0))
            cache.update(both[0], both[1], layer)
        return cls(rows, copies, cache, mask.repeat_interleave(copies, dim=0))

    def feed(self, forward: Any, ids: Tensor, real: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """Hidden states and output of `forward` on the tokens `ids` [n * copies, m], of which the
        `real` [n * copies, m] ones count. They stay until `take_back`."""
        ahead = positions_of(real)
        self.attention_mask = torch.cat([self.attention_mask, real.to(self.attention_mask)], dim=-1)
        hidden, out = forward(
            ids,
            attention_mask=self.attention_mask,
            position_ids=self.position[:, None] + ahead,
            cache=self.cache,
            use_cache=True,
            **options,
        )
        self.position = self.position + real.sum(-1)
        self.fed = ids.shape[1]
        return hidden, out

    def take_back(self) -> None:
        """Forget the tokens last fed, unless they were kept since."""
        if self.fed:
            self.position = self.position - self.attention_mask[:, -self.fed :].long().sum(-1)
            self.attention_mask = self.attention_mask[:, : -self.fed]
            for layer in self.cache.layers:
                layer.keys, layer.values = (
                    t[:, :, : -self.fed] for t in (layer.keys, layer.values)
                )
            self.fed = 0

    def keep_copy(self, slot: Tensor) -> None:
        """Go on with copy `slot` [n] of each row, and the token it was fed."""
        rows = torch.arange(len(slot), device=slot.device) * self.copies + slot
        self.cache.batch_select_indices(rows.repeat_interleave(self.copies))
        self.fed = 0

    def select(self, places: Sequence[int], rows: list[int]) -> None:
        """Go on with the rows at `places` alone, numbered `rows` now."""
        index = torch.tensor(places, dtype=torch.int64, device=self.position.device)[:, None]
        copies = torch.arange(self.copies, device=index.device)
        index = (index * self.copies + copies).flatten()
        self.cache.batch_select_indices(index)
        self.attention_mask, self.position = self.attention_mask[index], self.position[index]
        self.rows = rows

    def parked(self, place: int, copy: int = 0) -> Parked:
        """The row at `place` as copy `copy` has it, in memory of its own."""
        i = place * self.copies + copy
        mask = self.attention_mask[i]
        real = mask.nonzero()[:, 0]
        live = slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 0)
        layers = []
        for layer in self.cache.layers:
            states = (t[i, :, live.start : live.stop].clone() for t in (layer.keys, layer.values))
            layers.append(tuple(states))
        return Parked(mask[live].clone(), layers)  # type: ignore[arg-type]


class RowCaches:
    """Rows on Hugging Face's cache, numbered in their order: those last run are a batch (`Copies`),
    the others wait outside of it, without padding."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.batch: Copies | None = None
        self.waiting: list[Parked | None] = []  # of each row; None: it is in the batch

    def begin(self, cache: Any, mask: Tensor, copies: int) -> None:
        """All rows are in `cache`, `copies` times each; `mask` [B * copies, L]."""
        rows = len(mask) // copies
        self.batch = Copies(list(range(rows)), copies, cache, mask)
        self.waiting = [None] * rows

    def join(self, cache: Any, mask: Tensor) -> None:
        """The rows in `cache` come in behind the others; `mask` [n, L]."""
        batch = Copies(list(range(len(mask))), 1, cache, mask)
        self.waiting = [*self.waiting, *(batch.parked(i) for i in range(len(mask)))]

    def batch_of(self, rows: Tensor | None, copies: int) -> Copies:
        """The rows int64 [n] (None: all) as a batch of `copies` of each."""
        wanted = self.numbers(rows)
        if self.batch is not None and (self.batch.rows, self.batch.copies) == (wanted, copies):
            self.batch.take_back()
            return self.batch
        self.dissolve()
        parked = [self.waiting[row] for row in wanted]
        self.batch = Copies.assembled(wanted, parked, copies, self.config)  # type: ignore[arg-type]
        for row in wanted:
            self.waiting[row] = None
        return self.batch

    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        batch = [] if self.batch is None else self.batch.cache.layers
        held = [tensor for layer in batch for tensor in (layer.keys, layer.values)]
        for row in self.waiting:
            held += [] if row is None else [tensor for layer in row.layers for tensor in layer]
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def dissolve(self) -> None:
        """Take the batch apart into rows by themselves."""
        batch, self.batch = self.batch, None
        if batch is not None:
            batch.take_back()
            for place, row in enumerate(batch.rows):
                self.waiting[row] = batch.parked(place)

    def cut(self, lengths: Tensor, rows: Tensor | None) -> None:
        """Keep the first `lengths` [n] tokens of the rows."""
        self.dissolve()
        for row, length in zip(self.numbers(rows), lengths.tolist(), strict=True):
            waiting = self.waiting[row]
            assert waiting is not None
            self.waiting[row] = waiting.cut(length)

    def keep_rows(self, rows: Tensor) -> None:
        kept = rows.tolist()
        self.waiting = [self.waiting[row] for row in kept]
        if self.batch is not None:
            at = {row: i for i, row in enumerate(self.batch.rows)}
            new = [i for i, row in enumerate(kept) if row in at]
            self.batch.select([at[kept[i]] for i in new], new)

    def tokens(self) -> Tensor:
        """Tokens int64 [B] of each row."""
        self.dissolve()
        masks = [row.mask for row in self.waiting if row is not None]
        return torch.tensor([int(mask.sum()) for mask in masks], dtype=torch.int64, device="cpu")

    def numbers(self, rows: Tensor | None) -> list[int]:
        return list(range(len(self.waiting))) if rows is None else rows.tolist()
