"""CUDA graphs of guided steps, kept over calls.

A call that captures its step leaves the graph here, with the tensors that it runs on; the next call
of the same kind pours its prompts into them and replays from its second token on. What has to be
the same is in `_kind` (shapes but for lengths, options, numerics) and `_snapshot` (where the
weights are, how the models are made and set up): a graph sees weights that changed in place, and is
dropped where they were replaced. A graph is in one call at a time, and comes back only from one
that ended well. It goes with any of its models.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..models.cache import SiblingCache
from ..models.foreign import CACHE
from ..models.on_base import OnBase
from ..models.parts import numerics
from ..scorers.next_token import NextTokenScorer
from .call import Call
from .graphs import Graph, Runner

MOST = 8  # graphs
MOST_BYTES = 4 << 30  # of the tensors that they run on
ROUND = 256  # capacities are multiples of it, so that other lengths of prompts and answers fit in

# By class: the attributes that a step changes in place, or reads and the next call has other values
# in. They hold tensors, dicts of tensors, caches, or objects that are listed here too.
_IN_PLACE = {
    "Rows": ("ids", "origin", "unfinished", "position", "end", "steps", "pad", "eos"),
    "ChoiceCheck": ("first_bad",),
    "RatioPolicy": ("beta", "temperature", "seeds"),
    "Record": ("columns",),
    "CachedLogits": ("static",),
    "JointLogits": (),
    "StaticForward": ("forward", "slot"),
    "SiblingForward": ("position", "mask", "cache"),
    "SiblingStarts": ("left_padding", "hidden", "live_before", "starts"),
    "Texts": ("ids", "counts"),
    "TreeScorer": ("last_reward", "eos_ids", "texts", "forward"),
    "JointScorer": ("last_reward", "eos_ids", "texts", "forward", "next_hidden"),
    "AutoregressiveScorer": ("static", "texts", "chosen"),
    "VocabRewardScorer": ("static", "texts", "chosen"),
}
_WALKED = ("rgtg_fast.", "transformers.")
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass
class Kept:
    """A graph; `state` is what a call pours its own into, `alive` what only has to stay where it
    is. `width`: columns of the rows; `capacities`: of the caches."""

    graph: Graph
    state: list[Tensor]
    alive: list[Any]
    width: int
    capacities: list[int]

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state)


class _Shelf:
    """The kept graphs that no call has, the newest last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a model may go, and call `_drop`, in any line
        self.entries: list[tuple[tuple, list[weakref.ref[Any]], Any, Kept]] = []

    def take(
        self, kind: tuple, owners: list[Any], seen: Any, width: int, needs: list[int]
    ) -> Kept | None:
        """One of this kind for these models that has room; one for models that have changed since
        goes."""
        with self.lock:
            for entry in reversed(self.entries):
                same, refs, before, kept = entry
                if same != kind or any(r() is not o for r, o in zip(refs, owners, strict=True)):
                    continue
                fits = zip(kept.capacities, needs, strict=True)
                if before == seen and (kept.width < width or any(c < n for c, n in fits)):
                    continue
                self._drop(entry)
                if before == seen:
                    return kept
        return None

    def put(self, kind: tuple, owners: list[Any], seen: Any, kept: Kept) -> None:
        if kept.nbytes() > MOST_BYTES:
            return
        refs = [weakref.ref(owner, self._gone) for owner in owners]
        with self.lock:
            self.entries.append((kind, refs, seen, kept))
            while len(self.entries) > MOST or self.nbytes() > MOST_BYTES:
                self._drop(self.entries[0])

    def nbytes(self) -> int:
        return sum(entry[-1].nbytes() for entry in self.entries)

    def clear(self) -> None:
        with self.lock:
            self.entries = []

    def _drop(self, entry: Any) -> None:
        self.entries = [other for other in self.entries if other is not entry]

    def _gone(self, ref: weakref.ref[Any]) -> None:
        with self.lock:
            self.entries = [e for e in self.entries if all(r is not ref for r in e[1])]


_shelf = _Shelf()


def free_graphs() -> None:
    """Free the CUDA graphs that are kept for later calls, with their key/value caches.

    At most 8 are kept, on up to 4 GiB, beside the activations of one step of each and a cuBLAS
    workspace (32 MiB on an H200). A graph goes with its models too, and when others are newer.
    """
    _shelf.clear()


class Reuse:
    """What one call takes from, and leaves on, the shelf."""

    def __init__(self, call: Call, kind: tuple, prompt: int) -> None:
        self.call, self.kind, self.prompt = call, kind, prompt
        self.owners = _owners(call)
        self.seen = [_snapshot(owner) for owner in self.owners]
        self.kept: Kept | None = None

    def begin(self) -> int:
        """Takes a graph that fits, if there is one. The room that the rows are to have, in steps:
        of what is poured into other tensors, as the caches too, little."""
        call, width = self.call, self.prompt + self.call.plan.steps
        holders = _holders(call)
        needs = [getattr(holder, name) for holder, name in holders]
        self.kept = _shelf.take(self.kind, self.owners, self.seen, width, needs)
        for (holder, name), need in zip(holders, needs, strict=True):
            setattr(holder, name, 0 if self.kept is not None else _rounded(need))
        # These may be the caller's own, and must not be poured into.
        for owner, names in (
            (call.policy, ("beta", "temperature", "seeds")),
            (call.plan, ("pad", "eos")),
            (call.scorer, ("eos_ids",)),
        ):
            for name in names:
                tensor = getattr(owner, name, None)
                if tensor is not None:
                    setattr(owner, name, tensor.clone())
        return 2 if self.kept is not None else _rounded(width) - self.prompt

    def follow(self, run: Runner, state: list[Any]) -> None:
        """Have the steps of the call, whose state is that of these objects, replay the graph taken,
        and what they capture kept."""
        run.resume = lambda: self._resume(state)
        run.on_capture = lambda graph: self._captured(graph, state)

    def _resume(self, objects: list[Any]) -> Graph | None:
        """Pours the state of the call into the kept tensors, and has the call go on in them; the
        graph that runs on them. None where none was taken."""
        if self.kept is None:
            return None
        state = iter(self.kept.state)
        for holder, key in _slots(objects):
            if isinstance(holder, SiblingCache):
                holder.move_into([next(state) for _ in holder.in_place()])
                continue
            own, kept = holder[key], next(state)
            # Texts may have been given more room by now than the graph's; it has what is needed.
            part = tuple(slice(min(sizes)) for sizes in zip(own.shape, kept.shape, strict=True))
            kept[part].copy_(own[part])
            holder[key] = kept
        return self.kept.graph

    def _captured(self, graph: Graph, objects: list[Any]) -> None:
        """The call has captured its step: keep that."""
        state: list[Tensor] = []
        for holder, key in _slots(objects):
            state += holder.in_place() if isinstance(holder, SiblingCache) else [holder[key]]
        capacities = [cache.capacity for cache in self.call.caches()]
        alive = list(_reachable([*objects, *self.call.processors, self.call.policy.warpers]))
        self.kept = Kept(graph, state, alive, objects[0].ids.shape[1], capacities)

    def leave(self, result: Any = None) -> None:
        """The call ended well with this `result`, or has left the tensors: others may have the
        graph. A key/value cache in the result has views of them, and gets copies."""
        if self.kept is not None:
            if isinstance(result, dict):
                for layer in result[CACHE].layers:
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            _shelf.put(self.kind, self.owners, self.seen, self.kept)
            self.kept = None


def reuse_of(call: Call, input_ids: Tensor) -> Reuse | None:
    """What the call takes over and leaves; None where its graph cannot be kept."""
    kind = _kind(call, input_ids) if call.graph is not None and call.keeps_graph else None
    return None if kind is None else Reuse(call, kind, input_ids.shape[1])


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND


def _holders(call: Any) -> list[tuple[Any, str]]:
    """Where the capacity of each cache is set."""
    scorer = call.scorer, "reserved" if isinstance(call.scorer, NextTokenScorer) else "capacity"
    return [(call.source.forward, "capacity"), scorer] if call.source.owns_cache else [scorer]


def _owners(call: Any) -> list[Any]:
    """The models of a call."""
    rm = call.scorer.rm
    heads = [rm.head] if isinstance(getattr(rm, "head", None), nn.Module) else []
    return [call.source.view.model, rm if isinstance(rm, OnBase) else rm.model, *heads]


def _kind(call: Call, input_ids: Tensor) -> tuple | None:
    """What of a call a captured step has in it, but for the models; None where that cannot be
    told (a reward head may be any function)."""
    scorer: Any = call.scorer
    policy, record, rm = call.policy, call.record, getattr(scorer, "rm", None)
    if policy.schedule is not None or policy.kl_budget is not None:
        return None
    names = type(call.source).__name__, type(scorer).__name__
    head = getattr(rm, "head", None)
    if not all(name in _IN_PLACE for name in names) or not isinstance(head, nn.Module | None):
        return None
    holes = (call.reward_prompt[1] == 0).long().diff(dim=-1).clamp(min=0).any()
    if bool(holes):  # the slots that a window may see are those of one prompt
        return None
    eos = getattr(scorer, "eos_ids", None)
    k, dims = policy.k, (len(input_ids), len(call.plan.eos), None if eos is None else len(eos))
    compiled = [getattr(holder, "compiled", None) is not None for holder, _ in _holders(call)]
    return (
        *names,
        *(k, dims, call.plan.pad is None, call.epilogue, compiled),
        *(policy.do_sample, policy.check_nan, policy.reward_range, policy.backend, scorer.backend),
        *(policy.over, policy.top_p),
        *(record.on, record.output_candidates),
        *(
            getattr(scorer, "largest_id", None),
            getattr(rm, "label", None),
            getattr(rm, "problem", None),
        ),
        *map(_described, (*call.processors, policy.warpers)),
        *(input_ids.device, numerics(input_ids.device), torch.is_inference_mode_enabled()),
        *(torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
    )


def _described(value: Any) -> Any:
    """The class and attributes of a logits processor, by value."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list):
        return [_described(v) for v in value]
    if not hasattr(value, "__dict__"):
        return value
    return type(value), [(name, _described(v)) for name, v in vars(value).items()]


def _snapshot(owner: Any) -> list[Any]:
    """Where the weights of a model are, what it is made of and how it is set up."""
    model: nn.Module = owner.model if isinstance(owner, OnBase) else owner
    seen: list[Any] = [(t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers())]
    configs = {}
    for module in model.modules():
        plain = {n: v for n, v in module.__dict__.items() if type(v) in _PLAIN}
        seen.append((type(module), plain))
        for value in module.__dict__.values():
            if isinstance(value, PreTrainedConfig):
                configs[id(value)] = value
    return seen + [repr(sorted(vars(c).items(), key=str)) for c in configs.values()]


def _slots(objects: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The tensors of a call's state, as (container, key), and its caches, as (cache, None)."""
    for owner in objects:
        for name in _IN_PLACE[type(owner).__name__]:
            value = owner.__dict__.get(name)
            if isinstance(value, Tensor):
                yield owner.__dict__, name
            elif isinstance(value, dict):
                yield from ((value, key) for key in value)
            elif isinstance(value, SiblingCache):
                yield value, None
            elif value is not None:
                yield from _slots([value])


def _reachable(roots: list[Any]) -> Iterator[Tensor]:
    """All tensors that this package's objects, modules and containers lead to, but parameters: a
    forward may have put some on a twin that a graph reads (tables, scratch)."""
    waiting, seen = list(roots), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, nn.Parameter):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, nn.Module) or type(value).__module__.startswith(_WALKED):
            waiting += getattr(value, "__dict__", {}).values()
