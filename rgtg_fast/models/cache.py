"""A KV cache for k sibling tokens on one shared prefix.

Key slots are laid out as `[k siblings | prefix]`. The siblings' scratch slots come first, so the
prefix never moves: appending the winner writes one slot of a preallocated store, and nothing is
concatenated. Keys carry their rotary positions, so their order in memory means nothing. With a
width of 1 it is an ordinary static cache, and serves language models too.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .selection import Selection


class SiblingLayer(CacheLayerMixin):
    """One layer's view of the stores: `keys` and `values` are [B, Hkv, k + capacity, D]."""

    is_sliding = False
    # Set after the prompt. Weakly: a reference cycle would keep the stores alive after the call.
    cache: weakref.ref[SiblingCache] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        cache = None if self.cache is None else self.cache()
        if cache is None:  # the prompt: kept as computed until the stores are built
            self.keys, self.values = _as_attended(key_states), _as_attended(value_states)
            self.lazy_initialization(self.keys, self.values)
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        if cache.packed is not None:
            key_states, value_states = map(cache.packed.spread, (key_states, value_states))
        siblings = key_states.shape[2]
        self.keys[:, :, :siblings] = key_states
        self.values[:, :, :siblings] = value_states
        if cache.fused:
            cache.current = self
            return key_states, value_states
        live = cache.width + cache.length
        return self.keys[:, :, :live], self.values[:, :, :live]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        cache = None if self.cache is None else self.cache()
        return 0 if cache is None else cache.length

    def get_max_length(self) -> int:
        return -1

    # Abstract in transformers 5.17, so it must be here; 5.23 renamed it to get_max_length.
    def get_max_cache_shape(self) -> int:
        return -1


def _as_attended(states: Tensor) -> Tensor:
    """Keys or values as torch's attention reads them: under autocast, rounded to its dtype."""
    device = states.device.type
    if states.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return states.to(torch.get_autocast_dtype(device))
    return states


class SiblingCache(Cache):
    """Prefix KV of B rows plus scratch for `width` siblings; memory is prefix + k slots.

    `length` prefix slots are taken, of `capacity` (which grows if it must). `fused`: attention
    reads the prefix from here (attention.py), so a layer's `update` returns the siblings alone.
    What a step changes (`lengths`, `ends`) is also kept in device tensors, updated in place: a
    CUDA graph of a step replays on them.
    """

    def __init__(self, width: int, capacity: int, fused: bool = False) -> None:
        super().__init__(layer_class_to_replicate=SiblingLayer)
        self.layers: list[Any]  # SiblingLayer each, made by `update`
        self.width, self.capacity, self.fused = width, capacity, fused
        # One store per (device, dtype, shape) of keys or values: [n, B, Hkv, k + capacity, D], so
        # that `commit` is one gather and one copy for all layers of that shape.
        self.stores: list[Tensor] = []
        self.length = 0
        self.lengths: dict[torch.device, Tensor] = {}  # int64 [B], all equal to `length`
        self.ends: dict[torch.device, Tensor] = {}  # int64 [1], the store slot of the next token
        self.current: Any = None  # the layer whose attention runs next
        self.selection: Selection | None = None  # of the candidates in the forward; None: all
        # Of a compiled forward, for each store: the siblings' keys or values [n, B, Hkv, k, D],
        # which it gives instead of writing them into the scratch slots.
        self.fresh: list[Tensor] | None = None

    @property
    def packed(self) -> Selection | None:
        """The selection in the forward, where its tokens stand in one row."""
        return self.selection if self.selection is not None and self.selection.packed else None

    def finish_prefill(self, length: int, order: Tensor | None = None) -> None:
        """Move the prompt's keys and values, as the layers computed them, into the stores; slots in
        the order `order` [B, L], if given."""
        self.capacity = max(self.capacity, length)
        self.length = length
        groups: dict[tuple, list[tuple[SiblingLayer, str]]] = {}
        for layer in self.layers:
            for name in ("keys", "values"):
                t = getattr(layer, name)
                groups.setdefault((t.device, t.dtype, t.shape), []).append((layer, name))
        for (device, dtype, shape), members in groups.items():
            batch, heads, tokens, dim = shape
            if tokens != length:
                raise ValueError(f"the cache holds {tokens} prompt tokens, expected {length}")
            store = torch.empty(
                (len(members), batch, heads, self.width + self.capacity, dim),
                dtype=dtype,
                device=device,
            )
            for i, (layer, name) in enumerate(members):
                prompt = getattr(layer, name)
                if order is not None:
                    index = order.to(device).view(batch, 1, length, 1)
                    prompt = prompt.gather(2, index.expand(-1, heads, -1, dim))
                # A masked forward of fewer siblings reads these at weight 0; a NaN would spread.
                store[i, :, :, : self.width] = 0
                store[i, :, :, self.width : self.width + length] = prompt
                setattr(layer, name, store[i])
            self.stores.append(store)
            self.lengths[device] = torch.full((batch,), length, dtype=torch.int64, device=device)
            self.ends[device] = torch.full(
                (1,), self.width + length, dtype=torch.int64, device=device
            )
        for layer in self.layers:
            layer.cache = weakref.ref(self)
        self._set_prefixes()

    def commit(self, slot: Tensor) -> None:
        """Append sibling `slot` [B] of every row to its prefix, in all layers."""
        if self.selection is not None:
            slot = self.selection.places_of(slot)
        if self.length == self.capacity:
            self._replace_stores(lambda s: self._grown(s))
            self.capacity += self._extra()
        for store, siblings in zip(self.stores, self.fresh or self.stores, strict=True):
            index = slot.to(store.device).view(1, -1, 1, 1, 1)
            n, _, heads, _, dim = store.shape
            winner = siblings.gather(3, index.expand(n, -1, heads, 1, dim))
            store.index_copy_(3, self.ends[store.device], winner)
        self.length += 1
        for device, lengths in self.lengths.items():
            lengths += 1
            self.ends[device] += 1

    def keep_rows(self, rows: Tensor) -> None:
        """Keep rows `rows` int64 [n], in that order, and free the others."""
        self._replace_stores(lambda store: store.index_select(1, rows.to(store.device)))
        for device, lengths in self.lengths.items():
            self.lengths[device] = lengths[: len(rows)].clone()

    def crop(self, max_length: int) -> None:
        """Forget all but the first `max_length` prefix slots."""
        self.length = min(max_length, self.length)
        for device, lengths in self.lengths.items():
            lengths.fill_(self.length)
            self.ends[device].fill_(self.width + self.length)

    def prefix_of(self, layer: Any) -> tuple[Tensor, Tensor]:
        """The live keys and values [B, Hkv, L, D] of a layer, as views."""
        live = slice(self.width, self.width + self.length)
        return layer.keys[:, :, live], layer.values[:, :, live]

    def nbytes(self) -> int:
        """Bytes of the stores."""
        return sum(store.nbytes for store in self.stores)

    def _extra(self) -> int:
        return max(64, self.capacity // 2)

    def _grown(self, store: Tensor) -> Tensor:
        room = store.new_empty((*store.shape[:3], self._extra(), store.shape[4]))
        return torch.cat([store, room], dim=3)

    def places(self) -> list[tuple[int, int]]:
        """Of the keys and then the values of each layer: which store, and which part of it."""
        where = {store.untyped_storage().data_ptr(): i for i, store in enumerate(self.stores)}
        views = [view for layer in self.layers for view in (layer.keys, layer.values)]
        found = [(where[v.untyped_storage().data_ptr()], v.storage_offset()) for v in views]
        return [(i, offset // self.stores[i].stride(0)) for i, offset in found]

    def _replace_stores(self, change: Any) -> None:
        places = iter(self.places())
        self.stores = [change(store) for store in self.stores]
        for layer in self.layers:
            for name in ("keys", "values"):
                store, part = next(places)
                setattr(layer, name, self.stores[store][part])
        self._set_prefixes()

    def _set_prefixes(self) -> None:
        for layer in self.layers:
            layer.prefix_keys = layer.keys[:, :, self.width :]
            layer.prefix_values = layer.values[:, :, self.width :]
