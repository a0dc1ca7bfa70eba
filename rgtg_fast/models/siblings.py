"""The base of a model, run on k siblings of one shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
from .foreign import Unsupported, attention_of, set_attention
from .padding import left_padded, positions_of
from .selection import Selection


class SiblingForward:
    """The base of a model, run on siblings: `prefill`, then `siblings` and `commit` in turn.

    `parts` is a twin (`ModelParts.twin`), which is the forward's own from then on. `fused`: by the
    attention plug-in, without masks (see attention.py). All per-step state is in tensors that are
    updated in place.

    Rows are numbered as they come in (`prefill`, `join`), and those behind one that leaves
    (`keep_rows`) move up. `rows` int64 [n] are those that a call is about, None all of them.
    """

    def __init__(
        self, parts: Any, width: int, capacity: int, fused: bool, backend: Any = "auto"
    ) -> None:
        self.parts, self.width, self.capacity = parts, width, capacity
        self.compiled: CompiledSiblings | None = None
        self.kernel = attention_kernel(backend, parts.device) if fused else None
        if fused and self.kernel is None:
            raise Unsupported(f"no compiled kernel of candidate_attention runs on {parts.device}")
        self.attention = [(config, attention_of(config)) for config in parts.twins.configs]
        self.position: Tensor | None = None  # [B, 1], real tokens so far
        # [B, 1], the last position a row may have; rows that have ended are run behind it too.
        self.furthest: Tensor | None = None

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, copies: Tensor | None = None
    ) -> Tensor:
        """Hidden states [N, P, H] of the prompts [N, P], which fill the cache: row i with prompt
        `copies[i]`, where `copies` int64 [B] is given."""
        self.attend_as_before()
        length = input_ids.shape[1]
        fused = self.kernel is not None
        self.cache = SiblingCache(self.width, max(self.capacity, length + 1), fused)
        hidden = self._prompts(input_ids, attention_mask, self.cache)
        mask = attention_mask if copies is None else attention_mask[copies]
        self._begin(mask, length, copies)
        return hidden

    def join(self, prompts: Sequence[Tensor]) -> Tensor:
        """Rows with these prompts (int64 [P] each) come in behind the others. Hidden states
        [n, P, H] of the prompts, padded on the left."""
        ids, mask = left_padded(prompts)
        self.attend_as_before()
        fused, begun = self.kernel is not None, self.position is not None
        prefilled = SiblingCache(self.width, 0, fused)
        try:
            hidden = self._prompts(ids, mask, prefilled)
        finally:
            if begun:
                self._plug_in()
        if not begun:
            self.cache = SiblingCache(self.width, 0, fused)
        self.cache.join(prefilled, [len(prompt) for prompt in prompts])
        counts = mask.sum(-1, keepdim=True)
        if begun:
            assert self.position is not None
            self.position = torch.cat([self.position, counts])
            self.mask.join(len(ids))
            self._follow()
        else:
            self._set_mask(mask.new_ones((len(ids), 1)), counts)
            self._plug_in()
        return hidden

    def siblings(
        self, ids: Tensor, selection: Selection | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Hidden states [n, k, H] of `ids` [n, k], each right after its row's prefix.

        Of a `selection` of them, those of its tokens: [n, m, H], or [1, N, H] where it is packed.
        """
        if self.compiled is not None and selection is None and rows is None:
            hidden = None if self.cache.ragged else self.compiled(self, ids)
            if hidden is not None:
                return hidden
        position = self._position(rows)
        if self.furthest is not None:
            position = torch.minimum(position, self.furthest)
        position = position.expand(-1, ids.shape[1])
        if selection is not None:
            ids, position = selection.take(ids), selection.take(position)
        self.cache.selection, self.cache.fresh = selection, None
        siblings = ids.shape[1] if selection is None else selection.width
        self.cache.begin(rows, siblings)
        if isinstance(self.mask, SiblingStarts):
            return self._forward(ids, position, self.mask.current(rows))
        return self._forward(ids, position, self.mask.current(ids.shape[1], rows))

    def commit(self, slot: Tensor, rows: Tensor | None = None) -> None:
        """Sibling `slot` [n] of the last forward joins its row's prefix."""
        self.cache.commit(slot, rows)
        if rows is None:
            self._position(None).add_(1)
            self.mask.advance()
        else:
            self.position[rows] += 1  # type: ignore[index]
            self._follow()

    def extend(self, ids: Tensor, counts: Tensor, rows: Tensor | None = None) -> Tensor:
        """Hidden states [n, m, H] of the next `counts` [n] tokens of the rows, `ids` [n, m] (padded
        on the right), which join their prefixes."""
        self.cache.selection = None
        step = ids.shape[1] if self.kernel is not None else self.width
        hidden = []
        for begin in range(0, ids.shape[1], step):
            chunk = ids[:, begin : begin + step]
            tokens = chunk.shape[1]
            real = (counts - begin).clamp(0, tokens)
            ahead = torch.arange(tokens, device=ids.device)
            position = self._position(rows) + torch.minimum(ahead, real[:, None] - 1)
            position = position.clamp(min=0)  # padding must not look past the positions there are
            if isinstance(self.mask, SiblingStarts):
                self.cache.begin_extending(rows, tokens)
                hidden.append(self._forward(chunk, position, self.mask.current(rows, tokens)))
                self.cache.advance(real, rows, tokens)
            else:
                self.cache.begin(rows, tokens)
                hidden.append(self._forward(chunk, position, self.mask.causal(tokens, rows)))
                self.cache.append(real, rows, tokens)
            if rows is None:
                self._position(None).add_(real[:, None])
            else:
                self.position[rows] += real[:, None]  # type: ignore[index]
            self._follow()
        return torch.cat(hidden, dim=1)

    def comb(self, ids: Tensor, chain: Tensor, selection: Selection | None = None) -> Tensor:
        """Hidden states [B * m, k, H] of `ids` [B, m, k], k siblings at each of the next m
        positions (m * k <= width; by fused attention alone). Those at a position are behind the
        siblings `chain` [B, m - 1] at the positions before it. Of a `selection` of the [B * m, k],
        those of its tokens, as in `siblings`; `chain` then counts the selected ones of a position.
        """
        _, depths, siblings = ids.shape
        ids = ids.flatten(0, 1)
        position = self._position(None) + torch.arange(depths, device=ids.device)
        if self.furthest is not None:
            position = torch.minimum(position, self.furthest)
        position = position.reshape(-1, 1).expand(-1, siblings)
        if selection is not None:
            ids, position, siblings = selection.take(ids), selection.take(position), selection.width
        self.cache.selection, self.cache.fresh = selection, None
        self.cache.begin_comb(chain, depths, siblings)
        assert isinstance(self.mask, SiblingStarts)
        return self._forward(ids, position, self.mask.current(None, depths))

    def commit_comb(self, counts: Tensor, slot: Tensor, depths: int, siblings: int) -> None:
        """The first `counts` [B] tokens of the last comb's chain join the prefixes, with sibling
        `slot` [B] for the last of them."""
        self.cache.commit_comb(counts, slot, depths, siblings)
        self._position(None).add_(counts[:, None])
        self._follow()

    def crop(self, lengths: Tensor, rows: Tensor | None = None) -> None:
        """Keep the first `lengths` [n] tokens of each of the rows; `ValueError` for fewer than
        those of a prompt whose mask has holes."""
        least = self.mask.least_tokens
        if least is not None and (lengths < (least if rows is None else least[rows])).any():
            raise ValueError("a row cannot be cropped into a prompt whose mask hides tokens of it")
        hidden = self.mask.hidden if rows is None else self.mask.hidden[rows]
        self.cache.crop_rows(lengths + hidden, rows)
        if rows is None:
            self.position.copy_(lengths[:, None])  # type: ignore[union-attr]
        else:
            self.position[rows] = lengths[:, None]  # type: ignore[index]
        self._follow()

    def keep_rows(self, rows: Tensor) -> None:
        self.cache.keep_rows(rows)
        self.position = self._position(rows)
        self.furthest = None if self.furthest is None else self.furthest[rows]
        self.mask.keep_rows(rows)

    def attend_as_before(self) -> None:
        """Have the twin attend as it did when it was made, as a prompt is run."""
        for config, name in self.attention:
            set_attention(config, name)

    def _plug_in(self) -> None:
        if self.kernel is not None:
            plug_in(self.parts.twins.configs, self.cache, self.kernel)

    def _prompts(self, ids: Tensor, mask: Tensor, cache: SiblingCache) -> Tensor:
        hidden, out = self.parts.forward_base(
            ids,
            attention_mask=mask,
            position_ids=positions_of(mask),
            cache=cache,
            use_cache=True,
        )
        self.output_type = type(out)
        return hidden

    def _begin(self, attention_mask: Tensor, length: int, copies: Tensor | None) -> None:
        counts = attention_mask.long().sum(-1, keepdim=True)
        if self.kernel is None:
            self.cache.finish_prefill(length, None, copies)
            self._set_mask(attention_mask, counts)
        else:
            self._set_mask(attention_mask, counts)
            assert isinstance(self.mask, SiblingStarts)
            self.cache.finish_prefill(length, self.mask.order, copies)
            self._plug_in()
            self.mask.advance()

    def _set_mask(self, attention_mask: Tensor, counts: Tensor) -> None:
        self.position = counts
        spans = attention_spans(self.parts.text_config)
        self.mask: SiblingStarts | SiblingMask
        if self.kernel is None:
            self.mask = SiblingMask(attention_mask, spans, self.cache, self.parts.dtype)
        else:
            self.mask = SiblingStarts(attention_mask, spans, self.cache)

    def _forward(self, ids: Tensor, position: Tensor, mask: Any) -> Tensor:
        arguments = {
            "attention_mask": mask,
            "position_ids": position,
            "cache": self.cache,
            "use_cache": True,
        }
        return self.parts.forward_base(ids, **arguments)[0]

    def _position(self, rows: Tensor | None) -> Tensor:
        assert self.position is not None
        return self.position if rows is None else self.position[rows]

    def _follow(self) -> None:
        """Have the masks follow a change of the lengths that is more than one step of all rows."""
        if isinstance(self.mask, SiblingMask):
            self.mask.rebuild()
        else:
            self.mask.advance()


def fill_cache(given: DynamicCache, own: SiblingCache, length: int, rows: int) -> DynamicCache:
    """Put the first `length` tokens of the first `rows` rows into an empty cache of HF's."""
    for i, layer in enumerate(own.layers):
        keys, values = (t[:rows] for t in own.prefix_of(layer, length))
        theirs = given.layers[i] if i < len(given.layers) else None
        if type(theirs) is DynamicLayer:  # can be given the tensors themselves, without a copy
            theirs.lazy_initialization(keys, values)
            theirs.keys, theirs.values = keys, values
        else:
            given.update(keys, values, i)
    return given
