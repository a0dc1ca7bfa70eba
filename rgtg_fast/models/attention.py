"""What k siblings may attend to: through an attention function of our own, or through masks.

Fused: the twin of one call (twin.py) attends by the op `candidate_attention`, registered with
transformers as an attention function, from the first step after the prompt on. The op reads the
prefix in the `SiblingCache`; in place of a mask the model is given each row's first visible slot as
a [B, 1, 1, 1] tensor, which transformers passes through, as it does any 4D mask. Masked: models
whose attention cannot be replaced, or does more than softmax over scaled products, get a dense
additive mask [B, 1, k, k + L].
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from .. import ops
from .cache import SiblingCache
from .foreign import Unsupported, set_attention
from .padding import has_holes

NAME = "rgtg_candidates"
# Attribute of a twin's configuration: weak reference to the cache, kernel.
_DECODING = "rgtg_decoding"
# The same while `compiled.siblings` is traced, whose cache is a `TracedCache`; else None.
TRACED = "rgtg_traced"
Spans = dict[str, int | None]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, Hq, k, D], key and value [B, Hkv, k, D].

    Returns [B, k, Hq, D]; for a packed selection, whose query is [1, Hq, N, D], [1, N, Hq, D].
    Raises `Unsupported` for attention that is more than softmax over scaled, capped products; the
    probe then chooses masks for the model.
    """
    decoding = module.config.__dict__
    held, kernel = decoding[TRACED] or decoding[_DECODING]
    if attention_mask is None or attention_mask.dtype != torch.int64:
        raise Unsupported(f"{type(module).__name__} makes an attention mask of its own")
    if kwargs.get("s_aux") is not None:
        raise Unsupported(f"{type(module).__name__} has attention sinks")
    if value.shape[-1] != query.shape[-1]:
        raise Unsupported(f"{type(module).__name__} has values of another width than its keys")
    cache = held()
    layer, packed = cache.current, cache.packed
    dtype = layer.key_pool.dtype
    if query.dtype is not dtype or key.dtype is not dtype or value.dtype is not dtype:
        # Under autocast rotary embeddings give fp32 queries and keys. The kernel wants one dtype;
        # torch's own attention rounds them in the same way.
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if packed is not None:  # keys and values were spread by the cache
        query = packed.spread(query)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if cache.seen is None:
        prefix, length = (layer.prefix_keys, layer.prefix_values), cache.lengths[query.device]
    else:  # rows are ranges of one store, which all of them look at
        length, shape = cache.seen[query.device], query.shape
        prefix = tuple(
            pool.expand(len(length), -1, -1, -1) for pool in (layer.key_pool, layer.value_pool)
        )
        if len(length) != len(query):  # each token of an extended row is a query by itself
            query, key, value = (x.flatten(0, 1)[:, None] for x in (query, key, value))
    out = kernel(
        query,
        *prefix,
        key,
        value,
        attention_mask.view(-1),
        length,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        None,
        softcap,
    )
    if cache.seen is not None:
        out = out.view(*shape[:3], -1)
    return out if packed is None else packed.pack(out), None


AttentionInterface.register(NAME, attend)


_kernels: dict[tuple, Callable[..., Tensor] | None] = {}


def attention_kernel(backend: ops.Backend, device: torch.device) -> Callable[..., Tensor] | None:
    """The kernel that fused attention runs on, or None where there is none but the reference."""
    key = ops.requested(backend), device.type
    if key not in _kernels:
        kernel = ops.kernel_or_auto("candidate_attention", backend, device)
        _kernels[key] = None if kernel is ops.OPS["candidate_attention"] else kernel
    return _kernels[key]


def plug_in(configs: list[Any], cache: SiblingCache, kernel: Callable[..., Tensor]) -> None:
    """Have the modules with a twin's `configs` attend by `attend` on `cache`."""
    for config in configs:
        set_attention(config, NAME)
        # Weakly, or a twin that outlives its call would keep the keys and values alive.
        config.__dict__[_DECODING] = weakref.ref(cache), kernel
        config.__dict__[TRACED] = None


def plain_attention(implementation: str | None) -> bool:
    """Whether the attention named takes a dense additive 4D mask (FlashAttention takes 2D ones
    only, and flex_attention with a dense one has crashed the process on CPU)."""
    return implementation in (None, "eager", "sdpa")


def attention_spans(config: Any) -> Spans:
    """Layer type -> how far back a query sees: None for all, a window or chunk size otherwise.

    Raises `Unsupported` for a layer type whose mask is not known here.
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
        raise Unsupported(f"layers of type {unknown} have no sibling mask")
    return {t: known[t] for t in types}


def first_visible(name: str, span: int | None, left_padding: Tensor, length: Tensor) -> Tensor:
    """The first prefix slot int64 [B] that a sibling at slot `length` sees in a layer of a type."""
    if not span:
        return left_padding
    if name == "chunked_attention":  # chunks are counted from the row's first real token
        return left_padding + (length - left_padding) // span * span
    return torch.maximum(left_padding, length - span + 1)


class _Rows:
    """What is the same in both ways: how many slots of each row are hidden.

    `left_padding` int64 [B]: slots before a row's first real token; `hidden`: those and the ones
    that its mask hides after it.
    """

    def __init__(self, attention_mask: Tensor, spans: Spans) -> None:
        real = attention_mask != 0
        self.spans = spans
        self.left_padding = real.long().argmax(-1)  # [B]
        self.hidden = (~real).sum(-1)  # [B]
        # Slots of a prompt with holes are not its tokens: how many of these each row must keep.
        self.least_tokens = real.sum(-1) if has_holes(attention_mask) else None  # [B]

    def keep_rows(self, rows: Tensor) -> None:
        self.left_padding, self.hidden = self.left_padding[rows], self.hidden[rows]
        if self.least_tokens is not None:
            self.least_tokens = self.least_tokens[rows]

    def join(self, rows: int) -> None:
        """Rows without a hidden slot come in behind the others."""
        zeros = self.hidden.new_zeros(rows)
        self.left_padding = torch.cat([self.left_padding, zeros])
        self.hidden = torch.cat([self.hidden, zeros])
        if self.least_tokens is not None:
            self.least_tokens = torch.cat([self.least_tokens, zeros])


class SiblingStarts(_Rows):
    """For fused attention: each row's first visible slot, int64 [B, 1, 1, 1] for each layer type.

    Updated in place, from the cache's lengths alone, so that a captured CUDA graph of a step stays
    valid. The op sees one contiguous range. So where a mask hides slots after the first real token,
    the cache is filled in `order`, hidden slots first, and the visible ones end the row.
    """

    def __init__(self, attention_mask: Tensor, spans: Spans, cache: SiblingCache) -> None:
        super().__init__(attention_mask, spans)
        self.cache = cache
        self.order = self.live_before = None
        if self.least_tokens is not None:
            real = attention_mask != 0
            self.order = real.int().argsort(dim=-1, stable=True)
            before = torch.nn.functional.pad(real.long().cumsum(-1), (1, 0))
            self.live_before = self.hidden[:, None] + before  # [B, P + 1]
        self.starts = {name: self.hidden.view(-1, 1, 1, 1).clone() for name in spans}

    def current(
        self, rows: Tensor | None = None, tokens: int | None = None
    ) -> Tensor | dict[str, Tensor]:
        """The starts for the siblings of the rows (None: all), or for each of the next `tokens` of
        theirs, [n * tokens, 1, 1, 1]; a dict by layer type if the model has several."""
        starts = self.starts
        if self.cache.seen is not None:  # slots are counted from the begin of the store
            rows = (
                torch.arange(len(self.hidden), device=self.hidden.device) if rows is None else rows
            )
            device = self.hidden.device
            lengths, origin = self.cache.lengths[device][rows], self.cache.offsets[device][rows]
            origin = origin + self.cache.width
            if tokens is not None:
                ahead = torch.arange(tokens, device=device)
                lengths = (lengths[:, None] + ahead).flatten()
                rows, origin = (x.repeat_interleave(tokens) for x in (rows, origin))
            starts = {
                name: (self._start(name, lengths, rows) + origin).view(-1, 1, 1, 1)
                for name in self.spans
            }
        return starts if len(starts) > 1 else next(iter(starts.values()))

    def advance(self) -> None:
        """Follow a change of the cache's lengths."""
        if self.cache.ragged:
            return
        for name, span in self.spans.items():
            if span:
                lengths = self.cache.lengths[self.hidden.device]
                self.starts[name].copy_(self._start(name, lengths).view(-1, 1, 1, 1))

    def keep_rows(self, rows: Tensor) -> None:
        super().keep_rows(rows)
        if self.live_before is not None:
            self.live_before = self.live_before[rows]
        if not self.cache.ragged:
            self.starts = {name: start[rows] for name, start in self.starts.items()}

    def join(self, rows: int) -> None:
        super().join(rows)
        if self.live_before is not None:
            slots = torch.arange(self.live_before.shape[1], device=self.hidden.device)
            self.live_before = torch.cat([self.live_before, slots.expand(rows, -1)])

    def _start(self, name: str, lengths: Tensor, rows: Tensor | None = None) -> Tensor:
        """The first visible slot [n] of siblings behind prefixes of `lengths` [n] of the rows."""
        left, hidden, before = self.left_padding, self.hidden, self.live_before
        if rows is not None:
            left, hidden = left[rows], hidden[rows]
            before = None if before is None else before[rows]
        if not self.spans[name]:
            return hidden
        start = first_visible(name, self.spans[name], left, lengths)
        if before is None:
            return start
        prompt = before.shape[1] - 1
        within = start.clamp(max=prompt)[:, None]
        return before.gather(1, within)[:, 0] + (start - prompt).clamp(min=0)


class SiblingMask(_Rows):
    """Additive masks [B, 1, k, k + L] over the slots of a `SiblingCache`, by layer type.

    Each sibling sees the live prefix and itself. Always floating point: eager attention adds a
    boolean mask as 0/1, silently.
    """

    def __init__(
        self, attention_mask: Tensor, spans: Spans, cache: SiblingCache, dtype: torch.dtype
    ) -> None:
        super().__init__(attention_mask, spans)
        self.cache, self.dtype = cache, dtype
        self.least = torch.finfo(dtype).min
        self.dead = attention_mask == 0  # [B, P]
        self.rebuild()

    def rebuild(self) -> None:
        """The masks anew, after any change of the rows or of the cache."""
        width, capacity, device = self.cache.width, self.cache.capacity, self.hidden.device
        slots = torch.arange(capacity, device=device)
        lengths = self.cache.lengths_on(device)
        dead = slots >= lengths[:, None]
        prompt = self.dead.shape[1]
        dead[:, :prompt] |= self.dead
        prefix = torch.zeros(dead.shape, dtype=self.dtype, device=device)
        prefix = prefix.masked_fill_(dead, self.least)[:, None, None]
        shape = len(lengths), 1, width, width
        own = prefix.new_full(shape[2:], self.least).fill_diagonal_(0).expand(shape)
        full = torch.cat([own, prefix.expand(-1, 1, width, -1)], dim=-1)
        self.buffers = {name: full.clone() for name in self.spans}
        self._hide_out_of_span()

    def current(
        self, siblings: int | None = None, rows: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """The mask of this step for the first `siblings` (None: all of them) of the rows (None:
        all); a dict by layer type where the model has several."""
        live = self.cache.width + self.cache.length
        masks = {name: buffer[..., :siblings, :live] for name, buffer in self.buffers.items()}
        if rows is not None:
            masks = {name: mask[rows] for name, mask in masks.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def causal(self, tokens: int, rows: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """The mask of the next `tokens` of the rows, which see those of them before them."""
        device, width = self.hidden.device, self.cache.width
        rows = torch.arange(len(self.hidden), device=device) if rows is None else rows
        lengths, left = self.cache.lengths_on(device)[rows], self.left_padding[rows]
        ahead = torch.arange(tokens, device=device)
        masks = {}
        for name, span in self.spans.items():
            mask = self.buffers[name][rows][..., :tokens, : width + self.cache.length]
            start = first_visible(name, span, left[:, None], lengths[:, None] + ahead)  # [n, t]
            start = start.expand(-1, tokens)
            slots = torch.arange(mask.shape[-1] - width, device=device)
            mask[..., width:].masked_fill_((slots < start[..., None])[:, None], self.least)
            at = lengths[:, None, None] + ahead  # the tokens' own slots
            seen = (ahead[:, None] >= ahead) & (at >= start[..., None])
            own = torch.full(seen.shape, self.least, dtype=self.dtype, device=device)
            mask[..., :width] = self.least
            mask[..., :tokens] = own.masked_fill_(seen, 0)[:, None]
            masks[name] = mask
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def advance(self) -> None:
        """One more token is committed to every row."""
        width, device = self.cache.width, self.hidden.device
        if width + self.cache.length > next(iter(self.buffers.values())).shape[-1]:
            return self.rebuild()
        newest = (width - 1 + self.cache.lengths_on(device)).view(-1, 1, 1, 1)
        for buffer in self.buffers.values():
            buffer.scatter_(3, newest.expand(-1, 1, width, 1), 0.0)
        if any(self.spans.values()):
            self._hide_out_of_span()

    def keep_rows(self, rows: Tensor) -> None:
        super().keep_rows(rows)
        self.dead = self.dead[rows]
        self.buffers = {name: buffer[rows] for name, buffer in self.buffers.items()}

    def join(self, rows: int) -> None:
        super().join(rows)
        self.dead = torch.cat([self.dead, self.dead.new_zeros((rows, self.dead.shape[1]))])

    def _hide_out_of_span(self) -> None:
        length, width = self.cache.length, self.cache.width
        lengths = self.cache.lengths_on(self.hidden.device)
        slots = torch.arange(length, device=self.hidden.device)
        for name, span in self.spans.items():
            if not span:
                continue
            start = first_visible(name, span, self.left_padding, lengths)
            view = self.buffers[name][..., width : width + length]
            view.masked_fill_((slots < start[:, None])[:, None, None, :], self.least)


def last_attention(rm: Any, out: Any) -> Tensor:
    """Weights [N, heads, n, S] of the last layer below the head, in the output of a forward with
    `output_attentions=True`. Raises `ValueError` where the model gives none."""
    layers = getattr(out, "attentions", None) or ()
    layers = [w for w in (layers if rm.layer < 0 else layers[: rm.layer]) if w is not None]
    if not layers or layers[-1].dim() != 4:
        raise ValueError(
            f"{type(rm.model).__name__} gives no attention weights [N, heads, n, S] below its head "
            "with output_attentions=True; attention-based credit needs a transformer with eager "
            "attention"
        )
    return layers[-1]
