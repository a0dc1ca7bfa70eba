"""A KV cache for scoring k sibling tokens on one shared prefix, and the masks that go with it.

Key slots are laid out as `[k siblings | prefix]`. The siblings' scratch slots come first, so the
prefix never moves: appending the winner writes one slot, and the attention mask of the step before
stays valid (the keys carry their rotary positions, so their order in memory means nothing).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

Spans = dict[str, int | None]


class SiblingLayer(CacheLayerMixin):
    """One layer's view of the store: `keys` and `values` are [B, Hkv, k + capacity, D]."""

    is_sliding = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prefix = 0
        self.width = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:  # the prompt: kept as computed until the store is built
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        self.keys[:, :, : self.width] = key_states
        self.values[:, :, : self.width] = value_states
        live = self.width + self.prefix
        return self.keys[:, :, :live], self.values[:, :, :live]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prefix + query_length, 0

    def get_seq_length(self) -> int:
        return self.prefix

    def get_max_length(self) -> int:
        return -1

    # transformers 5.17 declares this one abstract; 5.23 renamed it to get_max_length.
    def get_max_cache_shape(self) -> int:
        return -1


class SiblingCache(Cache):
    """Prefix KV of B rows plus scratch for k siblings; memory is prefix + k slots, whatever k."""

    def __init__(self, width: int, capacity: int) -> None:
        super().__init__(layer_class_to_replicate=SiblingLayer)
        self.layers: list[Any]  # SiblingLayer each, made by `update`
        self.width = width
        self.capacity = capacity
        # One store per (device, dtype, shape) of keys or values: [n, B, Hkv, k + capacity, D], so
        # that `commit` is one gather and one copy for all layers of that shape.
        self.stores: list[Tensor] = []
        self.length = 0

    def finish_prefill(self, length: int) -> None:
        """Move the prompt's keys and values, as the layers computed them, into the stores."""
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
                store[i, :, :, self.width : self.width + length] = getattr(layer, name)
                setattr(layer, name, store[i])
            self.stores.append(store)
        self._set_lengths()

    def commit(self, slot: Tensor) -> None:
        """Append sibling `slot` [B] of every row to its prefix, in all layers."""
        if self.length == self.capacity:
            self._grow()
        end = self.width + self.length
        for store in self.stores:
            index = slot.to(store.device).view(1, -1, 1, 1, 1)
            n, _, heads, _, dim = store.shape
            winner = store.gather(3, index.expand(n, -1, heads, 1, dim))
            store[:, :, :, end : end + 1] = winner
        self.length += 1
        self._set_lengths()

    def _grow(self) -> None:
        extra = max(64, self.capacity // 2)
        self.capacity += extra
        for i, store in enumerate(self.stores):
            bigger = store.new_empty((*store.shape[:3], store.shape[3] + extra, store.shape[4]))
            bigger[:, :, :, : store.shape[3]] = store
            self.stores[i] = bigger
            for layer in self.layers:
                for name in ("keys", "values"):
                    view = getattr(layer, name)
                    if view.untyped_storage().data_ptr() == store.untyped_storage().data_ptr():
                        row = view.storage_offset() // store.stride(0)
                        setattr(layer, name, bigger[row])

    def _set_lengths(self) -> None:
        for layer in self.layers:
            layer.prefix, layer.width = self.length, self.width


def attention_spans(config: Any) -> Spans:
    """Layer type -> how far back a query sees: None for all, a window or chunk size otherwise.

    Raises `ValueError` for a layer type whose mask is not known here.
    """
    window = getattr(config, "sliding_window", None)
    types = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if not types:
        return {"sliding_attention": window} if window else {"full_attention": None}
    known = {
        "full_attention": None,
        "sliding_attention": window,
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    unknown = [t for t in types if t not in known]
    if unknown:
        raise ValueError(f"layers of type {unknown} have no sibling mask")
    return {t: known[t] for t in types}


class SiblingMask:
    """Additive masks [B, 1, k, k + L] for `SiblingCache`.

    Each sibling sees the live prefix and itself.

    Always floating point: eager attention adds a boolean mask as 0/1, silently.
    """

    def __init__(
        self, attention_mask: Tensor, spans: Spans, width: int, capacity: int, dtype: torch.dtype
    ) -> None:
        batch, length = attention_mask.shape
        self.width, self.length, self.spans = width, length, spans
        self.hidden = torch.finfo(dtype).min
        self.left_padding = attention_mask.long().argmax(-1)  # [B]
        device = attention_mask.device
        prefix = torch.zeros((batch, 1, 1, max(capacity, length)), dtype=dtype, device=device)
        dead = attention_mask[:, None, None, :] == 0
        prefix[..., :length].masked_fill_(dead, self.hidden)
        own = torch.full((width, width), self.hidden, dtype=dtype, device=device).fill_diagonal_(0)
        full = torch.cat(
            [own.expand(batch, 1, width, width), prefix.expand(-1, 1, width, -1)], dim=-1
        )
        self.buffers = {name: full.clone() for name in spans}
        self._hide_out_of_span()

    def current(self) -> Tensor | dict[str, Tensor]:
        """The mask of this step; a dict by layer type where the model has several."""
        live = self.width + self.length
        masks = {name: buffer[..., :live] for name, buffer in self.buffers.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def advance(self) -> None:
        """One more token is committed to every row."""
        self.length += 1
        if self.width + self.length > next(iter(self.buffers.values())).shape[-1]:
            for name, buffer in self.buffers.items():
                grow = buffer.new_zeros((*buffer.shape[:3], max(64, self.length // 2)))
                self.buffers[name] = torch.cat([buffer, grow], dim=-1)
        if any(self.spans.values()):
            self._hide_out_of_span()

    def _hide_out_of_span(self) -> None:
        slots = torch.arange(self.length, device=self.left_padding.device)
        for name, span in self.spans.items():
            if not span:
                continue
            if name == "chunked_attention":  # chunks are counted from the row's first real token
                in_answer = self.length - self.left_padding
                start = self.left_padding + in_answer // span * span
            else:
                start = torch.full_like(self.left_padding, self.length - span + 1)
            gone = slots < start[:, None]  # [B, L]
            view = self.buffers[name][..., self.width : self.width + self.length]
            view.masked_fill_(gone[:, None, None, :], self.hidden)
