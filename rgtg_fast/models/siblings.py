"""The base of a model, run on k siblings of one shared prefix."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .attention import (
    SiblingMask,
    SiblingStarts,
    attention_kernel,
    attention_spans,
    plug_in,
)
from .cache import SiblingCache
from .compiled import CompiledSiblings
from .foreign import Unsupported
from .padding import positions_of
from .selection import Selection


class SiblingForward:
    """The base of a model, run on siblings: `prefill`, then `siblings` and `commit` in turn.

    `parts` is a twin (`ModelParts.twin`), which is the forward's own from then on. `fused`: by the
    attention plug-in, without masks (see attention.py). All per-step state is in tensors that are
    updated in place.
    """

    def __init__(
        self, parts: Any, width: int, capacity: int, fused: bool, backend: Any = "auto"
    ) -> None:
        self.parts, self.width, self.capacity = parts, width, capacity
        self.compiled: CompiledSiblings | None = None
        self.kernel = attention_kernel(backend, parts.device) if fused else None
        if fused and self.kernel is None:
            raise Unsupported(f"no compiled kernel of candidate_attention runs on {parts.device}")

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [B, P, H] of the prompts, which fill the cache."""
        length = input_ids.shape[1]
        fused = self.kernel is not None
        self.cache = SiblingCache(self.width, max(self.capacity, length + 1), fused)
        hidden, out = self.parts.forward_base(
            input_ids,
            attention_mask=attention_mask,
            position_ids=positions_of(attention_mask),
            cache=self.cache,
            use_cache=True,
        )
        self.output_type = type(out)
        spans = attention_spans(self.parts.text_config)
        self.mask: SiblingStarts | SiblingMask
        if self.kernel is not None:
            self.mask = SiblingStarts(attention_mask, spans, self.cache)
            self.cache.finish_prefill(length, self.mask.order)
            plug_in(self.parts.twins.configs, self.cache, self.kernel)
            self.mask.advance()
        else:
            self.cache.finish_prefill(length)
            capacity = self.cache.capacity
            self.mask = SiblingMask(attention_mask, spans, self.width, capacity, self.parts.dtype)
        self.position = attention_mask.long().sum(-1, keepdim=True)  # [B, 1], real tokens so far
        return hidden

    def siblings(self, ids: Tensor, selection: Selection | None = None) -> Tensor:
        """Hidden states [B, k, H] of `ids` [B, k], each right after its row's prefix.

        Of a `selection` of them, those of its tokens: [B, n, H], or [1, N, H] where it is packed.
        """
        if self.compiled is not None and selection is None:
            hidden = self.compiled(self, ids)
            if hidden is not None:
                return hidden
        position = self.position.expand(-1, ids.shape[1])
        if selection is not None:
            ids, position = selection.take(ids), selection.take(position)
        self.cache.selection, self.cache.fresh = selection, None
        arguments = {
            "attention_mask": self.mask.current(ids.shape[1]),
            "position_ids": position,
            "cache": self.cache,
            "use_cache": True,
        }
        return self.parts.forward_base(ids, **arguments)[0]

    def commit(self, slot: Tensor) -> None:
        """Sibling `slot` [B] of the last forward joins its row's prefix."""
        self.cache.commit(slot)
        self.mask.advance()
        self.position += 1

    def keep_rows(self, rows: Tensor) -> None:
        self.cache.keep_rows(rows)
        self.mask.keep_rows(rows)
        self.position = self.position[rows]


def fill_cache(given: DynamicCache, own: SiblingCache, length: int, rows: int) -> DynamicCache:
    """Put the first `length` tokens of the first `rows` rows into an empty cache of HF's."""
    own.crop(length)
    for i, layer in enumerate(own.layers):
        keys, values = (t[:rows] for t in own.prefix_of(layer))
        theirs = given.layers[i] if i < len(given.layers) else None
        if type(theirs) is DynamicLayer:  # can be given the tensors themselves, without a copy
            theirs.lazy_initialization(keys, values)
            theirs.keys, theirs.values = keys, values
        else:
            given.update(keys, values, i)
    return given
