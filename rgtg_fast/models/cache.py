"""A KV cache for k sibling tokens on the prefix of each row, whose lengths differ.

All rows of a layer lie in one store of N slots. A row has a contiguous run of them, its extent:
`[k siblings | prefix]`. The siblings' scratch slots come first, so the prefix never moves:
appending the winner writes one slot, and nothing is concatenated. Keys carry their rotary
positions, so their order in memory means nothing. With a width of 1 it is an ordinary static cache,
and serves language models too.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .extents import Extent, fitted, in_order
from .selection import Selection
from .sibling_layer import SiblingLayer
from .stores import Prompt, empty_stores

SLACK = 16  # slots that a row in a ragged store may grow by before the rows are laid out anew
TIGHT = 0.96  # least share of a ragged store that is taken when a row joins without a new layout
ByDevice = dict[torch.device, Tensor]


class SiblingCache(Cache):
    """Prefix KV of B rows plus scratch for `width` siblings of each.

    Rows that came together (`finish_prefill`) have extents of one size, `capacity` prefix slots,
    which grow if they must; such a store can be seen as [B, Hkv, k + capacity, D]. Once rows join
    one by one (`join`) it is ragged, where it is `fused`: extents as long as their rows (and SLACK
    slots), at `offsets`; that of a row that left is given to one that joins and fits in, and only
    where none fits, or a row has outgrown its own, are all rows laid out anew.

    `fused`: attention reads the prefix from here (attention.py), so a layer's `update` returns the
    siblings alone. What a step changes (`lengths`, `ends`) is kept in device tensors, updated in
    place: a CUDA graph of a step replays on them. The host knows `length`, which no row exceeds.
    """

    def __init__(self, width: int, capacity: int, fused: bool = False) -> None:
        super().__init__(layer_class_to_replicate=SiblingLayer)
        self.layers: list[Any]  # SiblingLayer each, made by `update`
        self.width, self.capacity, self.fused = width, capacity, fused
        # One store per (device, dtype, heads, width) of keys or values: [n, Hkv, N, D], so that
        # `commit` is one gather and one copy for all layers of that shape.
        self.stores: list[Tensor] = []
        self.by_row: list[Tensor] = []  # the same as [n, B, Hkv, k + capacity, D]; not if ragged
        self.extents: list[Extent] = []  # of each row
        self.ragged = False
        self.loose = False  # rows have left more of a ragged store free than is to be kept
        self.length = 0
        self.limit = 0  # while `length` is below it, no row has filled its extent
        self.offsets: ByDevice = {}  # int64 [B], first slot of a row's extent
        self.lengths: ByDevice = {}  # int64 [B], prefix slots taken
        self.ends: ByDevice = {}  # int64 [B], the store's slot for a row's next token
        # Of the forward that runs: the layer whose attention is next, the selection of candidates
        # (None: all), the rows int64 [n] (None: all), where their tokens are written int64 [n * k]
        # (None: in the scratch slots of extents of one size), what fused attention takes as starts'
        # origin and lengths (None: rows by themselves).
        self.current: Any = None
        self.selection: Selection | None = None
        self.rows: Tensor | None = None
        self.places: ByDevice | None = None
        self.seen: ByDevice | None = None
        # Of a comb: which of its tokens are written behind the prefixes too, and where.
        self.chain: dict[torch.device, tuple[Tensor, Tensor]] | None = None
        # Of a compiled forward, for each store: the siblings' keys or values [n, B, Hkv, k, D],
        # which it gives instead of writing them into the scratch slots.
        self.fresh: list[Tensor] | None = None

    @property
    def packed(self) -> Selection | None:
        """The selection in the forward, where its tokens stand in one row."""
        return self.selection if self.selection is not None and self.selection.packed else None

    @property
    def batch(self) -> int:
        return len(self.extents)

    def finish_prefill(
        self, length: int, order: Tensor | None = None, copies: Tensor | None = None
    ) -> None:
        """Move the prompts' keys and values, as the layers computed them, into the stores; slots in
        the order `order` [B, L], if given. Row i gets the prompt `copies[i]` (None: its own)."""
        self.capacity = max(self.capacity, length)
        prompts = [Prompt(layer) for layer in self.layers]
        batch = prompts[0].keys.shape[0] if copies is None else len(copies)
        self.stores = empty_stores(self.layers, prompts, length)
        self.extents = in_order([self.width + self.capacity] * batch)
        self.stores = [self._store_like(s) for s in self.stores]
        for store in self.stores:
            shape, device = (batch,), store.device
            self.lengths[device] = torch.full(shape, length, dtype=torch.int64, device=device)
        self._placed([length] * batch)
        for layer, held in zip(self.layers, prompts, strict=True):
            for view, prompt in ((layer.keys, held.keys), (layer.values, held.values)):
                if copies is not None:
                    prompt = prompt[copies.to(prompt.device)]
                if order is not None:
                    index = order.to(prompt.device)[:, None, :, None]
                    prompt = prompt.gather(2, index.expand_as(prompt))
                view[:, :, : self.width] = 0  # as in `_store_like`
                view[:, :, self.width : self.width + length] = prompt

    def begin(self, rows: Tensor | None, siblings: int) -> None:
        """A forward of `siblings` candidates of each of `rows` int64 [n] (None: all) is next."""
        self.rows, self.chain = rows, None
        if self.loose:
            self._lay_out([extent.size for extent in self.extents])
            self._placed(self._taken())
        if rows is None and not self.ragged:
            self.places = self.seen = None
            return
        self.places, self.seen = {}, {}
        for device, offsets in self.offsets.items():
            own = slice(None) if rows is None else rows.to(device)
            slots = torch.arange(siblings, device=device)
            self.places[device] = (offsets[own][:, None] + slots).flatten()
            self.seen[device] = self.ends[device][own]

    def begin_extending(self, rows: Tensor | None, tokens: int) -> None:
        """A fused forward of the next `tokens` of each of the rows (or of fewer, and padding) is
        next: they are written behind the prefix, and each sees those before it."""
        self.reserve(tokens)
        self.rows, self.places, self.seen, self.chain = rows, {}, {}, None
        for device, ends in self.ends.items():
            own = slice(None) if rows is None else rows.to(device)
            slots = torch.arange(tokens, device=device)
            self.places[device] = self.seen[device] = (ends[own][:, None] + slots).flatten()

    def begin_comb(self, chain: Tensor, depths: int, siblings: int) -> None:
        """A fused forward of `siblings` candidates of every row at each of the next `depths`
        positions is next, depths * siblings <= width: those at a position see the prefix and the
        candidates `chain` [B, depths - 1] at the positions before it."""
        self.reserve(depths)
        self.rows, self.places, self.seen, self.chain = None, {}, {}, {}
        for device, ends in self.ends.items():
            ahead = torch.arange(depths, device=device)
            slots = torch.arange(depths * siblings, device=device)
            self.places[device] = (self.offsets[device][:, None] + slots).flatten()
            at = ends[:, None] + ahead
            self.seen[device] = at.flatten()
            row = torch.arange(len(ends), device=device)[:, None]
            nodes = (row * depths + ahead[:-1]) * siblings + chain.to(device)
            self.chain[device] = nodes.flatten(), at[:, :-1].flatten()

    def commit_comb(self, counts: Tensor, slot: Tensor, depths: int, siblings: int) -> None:
        """Append the first `counts` [B] <= depths tokens of the last comb's chain to the prefixes,
        with candidate `slot` [B] in the place of the last of them."""
        for store in self.stores:
            device = store.device
            last = (counts.to(device) - 1).clamp(min=0)
            node = self.offsets[device] + last * siblings + slot.to(device)
            store.index_copy_(2, self.ends[device] + last, store.index_select(2, node))
        self.advance(counts, None, depths)

    def commit(self, slot: Tensor, rows: Tensor | None = None) -> None:
        """Append sibling `slot` [n] to the prefix of each of `rows` int64 [n] (None: of all), in
        all layers."""
        self.reserve(1)
        for i, store in enumerate(self.stores):
            device = store.device
            here, index = slot.to(device), None if rows is None else rows.to(device)
            offsets, ends = self.offsets[device], self.ends[device]
            if index is not None:
                offsets, ends = offsets[index], ends[index]
            if self.fresh is None:
                winner = store.index_select(2, offsets + here)
            else:
                fresh = self.fresh[i] if index is None else self.fresh[i][:, index]
                n, _, heads, _, dim = fresh.shape
                winner = fresh.gather(3, here.view(1, -1, 1, 1, 1).expand(n, -1, heads, 1, dim))
                winner = winner[:, :, :, 0].transpose(1, 2)
            store.index_copy_(2, ends, winner)
        self.advance(1, rows, 1)

    def append(self, counts: Tensor, rows: Tensor | None, tokens: int) -> None:
        """Append the first `counts` [n] of the `tokens` siblings in the scratch slots of each of
        the rows, in their order."""
        self.reserve(tokens)
        for store in self.stores:
            device = store.device
            own = slice(None) if rows is None else rows.to(device)
            slots = torch.arange(tokens, device=device)
            scratch = self.offsets[device][own][:, None] + slots
            real = slots < counts.to(device)[:, None]
            places = (self.ends[device][own][:, None] + slots).where(real, scratch)
            tokens_of = store.index_select(2, scratch.flatten())
            store.index_copy_(2, places.flatten(), tokens_of)
        self.advance(counts, rows, tokens)

    def advance(self, counts: Tensor | int, rows: Tensor | None, most: int) -> None:
        """`counts` [n] slots more are taken in the rows, `most` at most."""
        self.length += most
        for device, lengths in self.lengths.items():
            for total in (lengths, self.ends[device]):
                added = counts.to(device) if isinstance(counts, Tensor) else counts
                if rows is None:
                    total += added
                else:
                    total[rows.to(device)] += added

    def crop_rows(self, lengths: Tensor, rows: Tensor | None = None) -> None:
        """Keep the first `lengths` [n] prefix slots of the rows alone."""
        for device, own in self.lengths.items():
            index = slice(None) if rows is None else rows.to(device)
            own[index] = torch.minimum(own[index], lengths.to(device))
            self.ends[device].copy_(self.offsets[device] + self.width + own)
            if self.fused:
                continue
            # A masked forward reads these at weight 0; a NaN would spread.
            slots = torch.arange(self.width + self.capacity, device=device)
            dead = (slots >= self.width + own[:, None]).flatten()
            for store in self.stores:
                if store.device == device:
                    store.masked_fill_(dead[:, None], 0)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep rows `rows` int64 [n], in that order, and free the others. A row named again is
        copied."""
        for device, lengths in self.lengths.items():
            self.lengths[device] = lengths[rows.to(device)]
        if self.fresh is not None:
            self.fresh = [states.index_select(1, rows.to(states.device)) for states in self.fresh]
        if self.ragged:
            self.extents = [self.extents[row] for row in rows.tolist()]
            if len(set(self.extents)) < len(self.extents):  # copies need slots of their own
                self._lay_out([extent.size for extent in self.extents])
            self.loose = self._used() < TIGHT * self.stores[0].shape[2]
        else:
            for i, store in enumerate(self.stores):
                kept = self._by_extent(store).index_select(2, rows.to(store.device))
                self.stores[i] = kept.flatten(2, 3)
            self.extents = in_order([self.width + self.capacity] * len(rows))
        self._placed(self._taken())

    def in_place(self) -> list[Tensor]:
        """What a step changes, and reads to do so."""
        counts = (self.lengths, self.offsets, self.ends)
        return [*self.stores, *(by_device[d] for by_device in counts for d in by_device)]

    def move_into(self, tensors: list[Tensor]) -> None:
        """Go on in tensors that are `in_place` in another cache, of as many rows and no less
        capacity; with extents of one size."""
        own, counts = self.by_row, iter(tensors[len(self.stores) :])
        before = self.lengths, self.offsets, self.ends
        self.stores = tensors[: len(self.stores)]
        self.capacity = self.stores[0].shape[2] // self.batch - self.width
        self.extents = in_order([self.width + self.capacity] * self.batch)
        self._placed([self.length] * self.batch)
        for ours, theirs in zip(own, self.by_row, strict=True):
            theirs[:, :, :, : ours.shape[3]].copy_(ours)
        for by_device in before:
            for device, count in by_device.items():
                by_device[device] = next(counts).copy_(count)

    def join(self, prompts: SiblingCache, lengths: Sequence[int]) -> None:
        """Take in rows behind the others: their prompts, of `lengths` slots each, are as the layers
        of `prompts` computed them, padded on the left. Nobody else may hold `prompts`."""
        first = self.batch
        layers = prompts.layers
        if not self.layers:
            self.layers, layers = prompts.layers, [Prompt(layer) for layer in prompts.layers]
            self.stores = empty_stores(self.layers, layers, max(lengths))
        self._make_room(lengths)
        for i, own in enumerate(self.layers):
            for name in ("keys", "values"):
                pool, prompt = self._pool_of(own, name), getattr(layers[i], name)
                for row, length in enumerate(lengths):
                    start = self.extents[first + row].start
                    end = start + self.width + length
                    pool[:, start : start + self.width] = 0
                    pool[:, start + self.width : end] = prompt[row, :, prompt.shape[2] - length :]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more in every row."""
        if self.length + tokens <= self.limit or not self.extents:
            return
        taken = self._taken()
        free = min(e.size - self.width - n for e, n in zip(self.extents, taken, strict=True))
        self.length = max(taken)
        if free < tokens:
            if self.ragged:
                room = max(SLACK, tokens)
                self._lay_out([self.width + n + room for n in taken])
            else:
                self.capacity += max(64, self.capacity // 2, tokens)
                self._lay_out([self.width + self.capacity] * self.batch)
            self._placed(taken)
        else:
            self.limit = self.length + free

    def prefix_of(self, layer: Any, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` prefix keys and values [B, Hkv, length, D] of a layer, as views; in
        extents of one size."""
        live = slice(self.width, self.width + length)
        return layer.keys[:, :, live], layer.values[:, :, live]

    def lengths_on(self, device: torch.device) -> Tensor:
        """The lengths int64 [B], on a device that need not have a layer."""
        known = self.lengths.get(device)
        return next(iter(self.lengths.values())).to(device) if known is None else known

    def parts_of_layers(self) -> list[tuple[int, int]]:
        """Of the keys and then the values of each layer: which store, and which part of it."""
        return [layer.at[name] for layer in self.layers for name in ("keys", "values")]

    def nbytes(self) -> int:
        """Bytes of the stores."""
        return sum(store.nbytes for store in self.stores)

    def _taken(self) -> list[int]:
        return next(iter(self.lengths.values())).tolist() if self.lengths else []

    def _used(self) -> int:
        return sum(extent.size for extent in self.extents)

    def _store_like(self, store: Tensor) -> Tensor:
        """A store [n, Hkv, N, D] like another, for the extents."""
        # A masked forward reads what it hides at weight 0; a NaN there would spread.
        make = store.new_empty if self.fused else store.new_zeros
        return make((*store.shape[:2], self._used(), store.shape[3]))

    def _pool_of(self, layer: Any, name: str) -> Tensor:
        store, i = layer.at[name]
        return self.stores[store][i]

    def _by_extent(self, store: Tensor) -> Tensor:
        """A store [n, Hkv, N, D] of extents of one size, as [n, Hkv, B, k + capacity, D]."""
        return store.unflatten(2, (self.batch, -1) if self.batch else (0, self.width))

    def _make_room(self, lengths: Sequence[int]) -> None:
        """Extents behind those of the rows, for prompts of `lengths`."""
        taken = self._taken()
        total = self.stores[0].shape[2]
        if self.fused:
            wanted = [self.width + length + SLACK for length in lengths]
            placed = fitted(self.extents, total, wanted) if self.ragged else None
            if placed is not None and self._used() + sum(wanted) >= TIGHT * total:
                self.extents, self.loose = self.extents + placed, False
            else:
                self.ragged, self.loose = True, False
                self._lay_out([self.width + n + SLACK for n in taken] + wanted)
        else:
            self.capacity = max([self.capacity, *lengths, *taken])
            count = self.batch + len(lengths)
            self._lay_out([self.width + self.capacity] * count)
        if not self.lengths:
            devices = {store.device for store in self.stores}
            self.lengths = {d: torch.zeros(0, dtype=torch.int64, device=d) for d in devices}
        for device, own in self.lengths.items():
            self.lengths[device] = torch.cat([own, own.new_tensor(list(lengths))])
        self._placed([*taken, *lengths])

    def _lay_out(self, sizes: Sequence[int]) -> None:
        """Move the rows to extents of `sizes`, one behind the other; sizes beyond the rows are
        for those that join."""
        old, self.extents, self.loose = self.extents, in_order(sizes), False
        for i, store in enumerate(self.stores):
            new = self._store_like(store)
            for source, target in zip(old, self.extents, strict=False):
                n = min(source.size, target.size)
                new[:, :, target.start : target.start + n] = store[
                    :, :, source.start : source.start + n
                ]
            self.stores[i] = new

    def _placed(self, taken: list[int]) -> None:
        """Follow a change of extents, of the rows or of the stores; `taken` are the lengths."""
        for device, lengths in self.lengths.items():
            starts = [extent.start for extent in self.extents]
            self.offsets[device] = torch.tensor(starts, dtype=torch.int64, device="cpu").to(device)
            self.ends[device] = self.offsets[device] + self.width + lengths
        rooms = [e.size - self.width - n for e, n in zip(self.extents, taken, strict=True)]
        self.length = max(taken, default=0)
        self.limit = self.length + min(rooms, default=0)
        stores = [] if self.ragged else self.stores
        self.by_row = [self._by_extent(store).transpose(1, 2) for store in stores]
        for layer in self.layers:
            layer.cache = weakref.ref(self)
            layer.key_pool = self._pool_of(layer, "keys")
            layer.value_pool = self._pool_of(layer, "values")
            layer.keys, layer.values = layer.key_pool, layer.value_pool
            if not self.ragged:
                places = layer.at["keys"], layer.at["values"]
                layer.keys, layer.values = (self.by_row[store][i] for store, i in places)
                layer.prefix_keys = layer.keys[:, :, self.width :]
                layer.prefix_values = layer.values[:, :, self.width :]
