"""One layer of a `SiblingCache`: where a model's attention puts keys and values, and gets them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class SiblingLayer(CacheLayerMixin):
    """One layer's view of the stores: `keys` and `values` are [B, Hkv, k + capacity, D], and in a
    ragged store [Hkv, N, D]."""

    is_sliding = False
    key_pool: Tensor  # [Hkv, N, D], a layer's part of a store
    value_pool: Tensor
    # Set after the prompt. Weakly: a reference cycle would keep the stores alive after the call.
    cache: weakref.ref[Any] | None = None

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
        if cache.places is None:  # all rows, in extents of one size
            siblings = key_states.shape[2]
            self.keys[:, :, :siblings] = key_states
            self.values[:, :, :siblings] = value_states
        else:
            for pool, states in ((self.key_pool, key_states), (self.value_pool, value_states)):
                flat = states.transpose(0, 1).flatten(1, 2).to(pool.dtype)
                pool.index_copy_(1, cache.places[pool.device], flat)
                if cache.chain is not None:
                    nodes, slots = cache.chain[pool.device]
                    pool.index_copy_(1, slots, flat.index_select(1, nodes))
        if cache.fused:
            cache.current = self
            return key_states, value_states
        live = cache.width + cache.length
        if cache.rows is None:
            return self.keys[:, :, :live], self.values[:, :, :live]
        rows = cache.rows.to(self.keys.device)
        return self.keys[rows, :, :live], self.values[rows, :, :live]

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
