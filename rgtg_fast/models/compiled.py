"""The siblings' forward through `torch.compile`, kept over calls.

What is compiled is a function of tensors: the siblings' ids and positions, each row's first visible
slot, the stores of the cache and their length. It writes nothing: it returns the siblings' keys and
values beside their hidden states, and `SiblingCache.commit` takes the winner's from there. Modules
and their parameters are arguments too, so weights changed in place are seen, and dynamo's guards
compile anew for whatever else of a model has changed.
The number of rows (from two on) and the capacity are dynamic: one compilation serves them all.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .attention import TRACED
from .foreign import mark_dynamic
from .parts import ModelParts, numerics

MOST = 8  # forwards kept for a model
# Our own capture (decode/graphs.py) is of the whole step.
COMPILER: Callable[..., Any] = functools.partial(
    torch.compile, fullgraph=True, dynamic=False, options={"triton.cudagraphs": False}
)


class _Layer:
    """The prefix of one layer, [B, Hkv, capacity, D] each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.prefix_keys, self.prefix_values = keys, values
        self.key_pool = keys


class TracedCache(Cache):
    """What a forward that is being traced sees of a `SiblingCache`."""

    packed = seen = None

    def __init__(self, prefixes: list[_Layer], lengths: Tensor) -> None:
        self.layers: list[Any] = prefixes
        self.lengths = {lengths.device: lengths}
        self.current: Any = None
        self.fresh: list[Any] = [None] * (2 * len(prefixes))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.fresh[2 * layer_idx : 2 * layer_idx + 2] = key_states, value_states
        self.current = self.layers[layer_idx]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        # A tensor: as a number it would be part of the compiled code.
        return next(iter(self.lengths.values()))[0]

    def itself(self) -> TracedCache:
        return self


def siblings(
    parts: Any,
    configs: list[Any],
    kernel: Callable[..., Tensor],
    width: int,
    places: list[tuple[int, int]],
    ids: Tensor,
    position: Tensor,
    starts: Any,
    stores: list[Tensor],
    lengths: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states [B, n, H] of `SiblingForward.siblings`, and what `SiblingCache.fresh` is."""
    prefixes = [stores[store][part][:, :, width:] for store, part in places]
    layers = [_Layer(*pair) for pair in zip(prefixes[::2], prefixes[1::2], strict=True)]
    cache = TracedCache(layers, lengths)
    for config in configs:
        config.__dict__[TRACED] = cache.itself, kernel
    position = position.expand(-1, ids.shape[1])
    hidden = parts.forward_base(
        ids, attention_mask=starts, position_ids=position, cache=cache, use_cache=True
    )[0]
    for config in configs:
        config.__dict__[TRACED] = None
    members: list[list[Tensor]] = [[] for _ in stores]
    for (store, _), states in zip(places, cache.fresh, strict=True):
        members[store].append(states.to(stores[store].dtype))
    return hidden, [torch.stack(states) for states in members]


class Kept:
    """One compiled forward. Its first run, which compiles it, is one thread's."""

    def __init__(self) -> None:
        # A code object of its own: dynamo keeps what it compiled with the code, and frees it so.
        own = FunctionType(siblings.__code__.replace(), siblings.__globals__)
        self.run = COMPILER(own)
        self.compiling = threading.Lock()
        self.ready = False

    def __call__(self, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
        if self.ready:
            return self.run(*arguments)
        with self.compiling:
            out = self.run(*arguments)
            self.ready = True
            return out


class CompiledSiblings:
    """The compiled forward of one call.

    Where it cannot be compiled the call goes on without it, with a warning if it was `asked` for.
    """

    def __init__(self, of: ModelParts, asked: bool) -> None:
        self.model, self.kind, self.asked = of.model, (type(of), of.layer), asked
        self.batch: int | None = None  # rows that `kept` has run with in this call
        self.kept: Kept
        self.places: list[tuple[int, int]]

    def __call__(self, forward: Any, ids: Tensor) -> Tensor | None:
        """`forward.siblings(ids)`; None where there is no compiled forward."""
        if self.batch == len(ids):
            return self._run(forward, ids)
        forwards = _forwards_of(self.model)
        key = self.kind, *_key(forward, ids)
        reason = forwards.hopeless(key)
        if reason is None:
            self.kept = forwards.get(key)
            self.places = forward.cache.parts_of_layers()
            _mark_dynamic(forward, ids)
            try:
                hidden = self._run(forward, ids)
                self.batch = len(ids)
                return hidden
            except Exception as error:  # a model may hold anything that no compiler takes
                reason = forwards.failed(key, error)
        forward.compiled = None
        if self.asked:
            warnings.warn(
                f"compile=True has no effect on {type(self.model).__name__}: {reason}",
                stacklevel=2,
            )
        return None

    def _run(self, forward: Any, ids: Tensor) -> Tensor:
        cache = forward.cache
        (lengths,) = cache.lengths.values()
        hidden, cache.fresh = self.kept(
            forward.parts,
            forward.parts.twins.configs,
            forward.kernel,
            forward.width,
            self.places,
            ids,
            forward.position,
            forward.mask.current(),
            cache.by_row,
            lengths,
        )
        return hidden


def _mark_dynamic(forward: Any, ids: Tensor) -> None:
    """The capacity of the stores, and the number of rows where it is not 1."""
    cache, starts = forward.cache, forward.mask.current()
    for store in cache.by_row:
        mark_dynamic(store, 3)
    if len(ids) > 1:
        for store in cache.by_row:
            mark_dynamic(store, 1)
        of_types = starts.values() if isinstance(starts, dict) else [starts]
        for tensor in (ids, forward.position, *cache.lengths.values(), *of_types):
            mark_dynamic(tensor, 0)


def _key(forward: Any, ids: Tensor) -> tuple:
    """What a compiled forward of a model is for."""
    parts, device = forward.parts, ids.device
    modes = numerics(device), torch.is_inference_mode_enabled()
    sizes = len(ids) > 1, ids.shape[1], forward.width
    return parts.dtype, device, forward.kernel, sizes, modes


class _Forwards:
    """The compiled forwards of one model, and what came of failed tries."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple, Kept] = OrderedDict()
        self.failures: dict[tuple, tuple[str, int]] = {}  # the last one, and how often in a row

    def get(self, key: tuple) -> Kept:
        with _looking:
            kept = self.kept.pop(key, None) or Kept()
            self.kept[key] = kept  # the newest
            while len(self.kept) > MOST:
                self.kept.popitem(last=False)
            return kept

    def failed(self, key: tuple, error: Exception) -> str:
        """Note a failure; the reason in one line."""
        lines = [line for line in str(error).splitlines() if line.strip()]
        # What a backend raised comes in the second line.
        text = " ".join(lines[: 2 if lines and lines[0].rstrip().endswith(":") else 1])
        reason = f"{type(error).__name__}: {text[:300]}"
        with _looking:
            self.kept.pop(key, None)
            last, times = self.failures.get(key, ("", 0))
            self.failures[key] = reason, times + 1 if reason == last else 1
        return reason

    def hopeless(self, key: tuple) -> str | None:
        """The reason of two failures in a row, None where it is worth a try. One alone may have had
        other reasons than the model (memory, what else the process does)."""
        reason, times = self.failures.get(key, ("", 0))
        return reason if times >= 2 else None


_of_models: weakref.WeakKeyDictionary[Any, _Forwards] = weakref.WeakKeyDictionary()
_looking = threading.Lock()


def _forwards_of(model: nn.Module) -> _Forwards:
    with _looking:
        return _of_models.setdefault(model, _Forwards())
