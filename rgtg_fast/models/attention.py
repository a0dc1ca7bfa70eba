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
    dtype = layer.prefix_keys.dtype
    if query.dtype is not dtype or key.dtype is not dtype or value.dtype is not dtype:
        # Under autocast rotary embeddings give fp32 queries and keys. The kernel wants one dtype;
        # torch's own attention rounds them in the same way.
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if packed is not None:  # keys and values were spread by the cache
        query = packed.spread(query)
    out = kernel(
        query.transpose(1, 2),
        layer.prefix_keys,
        layer.prefix_values,
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask.view(-1),
        cache.lengths[query.device],
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        None,
        softcap,
    )
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


class SiblingStarts:
    """For fused attention: each row's first visible slot, int64 [B, 1, 1, 1] for each layer type.

    Updated in place, from the cache's lengths alone, so that a captured CUDA graph of a step stays
    valid. The op sees one contiguous range. So where a mask hides slots after the first real token,
    the cache is filled in `order`, hidden slots first, and the visible ones end the row.
    """

    def __init__(self, attention_mask: Tensor, spans: Spans, cache: SiblingCache) -> None:
        self.spans, self.cache = spans, cache
        self.left_padding = attention_mask.long().argmax(-1)  # [B]
        self.order = self.live_before = None
        real = attention_mask != 0
        hidden = (~real).sum(-1)
        if has_holes(attention_mask):
            self.order = real.int().argsort(dim=-1, stable=True)
            before = real.long().cumsum(-1)
            self.live_before = hidden[:, None] + torch.nn.functional.pad(before, (1, 0))  # [B, P+1]
        self.starts = {name: hidden.view(-1, 1, 1, 1).clone() for name in spans}

    def current(self, siblings: int | None = None) -> Tensor | dict[str, Tensor]:
        """The starts, the same for all siblings; a dict by layer type if the model has several."""
        return self.starts if len(self.starts) > 1 else next(iter(self.starts.values()))

    def advance(self) -> None:
        """Follow a change of the cache's lengths."""
        for name, span in self.spans.items():
            if span:
                length = self.cache.lengths[self.left_padding.device]
                start = first_visible(name, span, self.left_padding, length)
                if self.live_before is not None:
                    prompt = self.live_before.shape[1] - 1
                    within = start.clamp(max=prompt)[:, None]
                    beyond = (start - prompt).clamp(min=0)
                    start = self.live_before.gather(1, within)[:, 0] + beyond
                self.starts[name].copy_(start.view(-1, 1, 1, 1))

    def keep_rows(self, rows: Tensor) -> None:
        self.left_padding = self.left_padding[rows]
        if self.live_before is not None:
            self.live_before = self.live_before[rows]
        self.starts = {name: start[rows] for name, start in self.starts.items()}


class SiblingMask:
    """Additive masks [B, 1, k, k + L] over the slots of a `SiblingCache`, by layer type.

    Each sibling sees the live prefix and itself. Always floating point: eager attention adds a
    boolean mask as 0/1, silently.
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

    def current(self, siblings: int | None = None) -> Tensor | dict[str, Tensor]:
        """The mask of this step for the first `siblings` (None: all of them); a dict by layer type
        where the model has several."""
        live = self.width + self.length
        masks = {name: buffer[..., :siblings, :live] for name, buffer in self.buffers.items()}
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

    def keep_rows(self, rows: Tensor) -> None:
        self.left_padding = self.left_padding[rows]
        self.buffers = {name: buffer[rows] for name, buffer in self.buffers.items()}

    def _hide_out_of_span(self) -> None:
        length = torch.full_like(self.left_padding, self.length)
        slots = torch.arange(self.length, device=self.left_padding.device)
        for name, span in self.spans.items():
            if not span:
                continue
            start = first_visible(name, span, self.left_padding, length)
            view = self.buffers[name][..., self.width : self.width + self.length]
            view.masked_fill_((slots < start[:, None])[:, None, None, :], self.hidden)


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
