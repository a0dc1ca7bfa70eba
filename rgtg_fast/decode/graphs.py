"""The guided step as a CUDA graph: captured once for a number of rows, then replayed.

Launch overhead dominates a small step; a graph replays it with one launch. What it takes: every
tensor of the step stays where it is (rows, record and caches are updated in place), and nothing in
it waits for the device or depends on the host's counters (capture.py says what does).

The first steps of the answer run eagerly, on the capture's stream: they warm up what allocates or
compiles on first use, and count as steps. A capture itself computes nothing; the host's state that
it changes are the caches' lengths, which are put back. So where a step cannot be captured the eager
steps simply go on. When rows leave the batch (at halves, so at most
log2(B) times) tensors have moved, and the next steps warm up and capture again.
"""

from __future__ import annotations

import traceback
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import cuda

from ..models import foreign
from .waits import module_at, waits_noted

WARM_UP = 2  # eager steps before a capture; the last of them is watched
WORTH = 16  # fewest steps to come that repay a capture


class Graph(Protocol):
    """What records the launches of a step: `TorchGraph`."""

    device: torch.device

    def __init__(self, device: torch.device) -> None: ...

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run a step as it is, where the capture will run."""

    def rehearse(self, step: Callable[[], None]) -> list[str]:
        """As `warm_up`; where in it the host waited for the device, which no capture takes."""

    def capture(self, step: Callable[[], None]) -> None:
        """Record a step without computing it; a failure leaves the device as it was."""

    def replay(self) -> None:
        """Compute the recorded step."""


class TorchGraph:
    """A `torch.cuda.CUDAGraph`; captures after the first share its memory and its stream.

    Those before are kept until this object goes: torch 2.12 and 2.13 free the cuBLAS workspace of
    a graph's capture stream with the graph, though later ones of that stream replay on it. So no
    two objects share a stream either. One that has gone hands its stream on: for each stream that
    has been used, torch up to 2.11 keeps a workspace (32 MiB on an H200) for ever.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs: list[cuda.CUDAGraph] = []
        self.current = -1  # the place of the one that replays; no reference, see `_hand_on`
        with cuda.device(device):
            self.index = cuda.current_device()
            self.stream, self.pool = _take_stream(self.index), cuda.graph_pool_handle()
        end = weakref.finalize(self, _hand_on, self.index, self.stream, self.graphs)
        end.atexit = False  # at exit the driver may be gone

    def warm_up(self, step: Callable[[], None]) -> None:
        outside = cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with cuda.device(self.device), cuda.stream(self.stream):
            step()
        outside.wait_stream(self.stream)

    def rehearse(self, step: Callable[[], None]) -> list[str]:
        with waits_noted() as places:
            self.warm_up(step)
        return places

    def capture(self, step: Callable[[], None]) -> None:
        graph, failure = cuda.CUDAGraph(), None
        self.graphs.append(graph)
        # "thread_local": allocations by other threads would break a capture in the default mode.
        mode: dict[str, Any] = {"stream": self.stream, "capture_error_mode": "thread_local"}
        recording = cuda.graph(graph, pool=self.pool, **mode)
        try:
            # A capture whose end raises leaves its stream current; the outer context resets it.
            with cuda.device(self.device), cuda.stream(self.stream), recording:
                try:
                    step()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            self._clean_up()
            if failure is None or failure is error:
                raise
            # The end of a failed capture raises too, with `failure` among its frame's arguments.
            error.__traceback__ = None
            raise failure from None
        finally:
            failure = None  # a cycle through its traceback would keep the call's caches alive
        self.current = len(self.graphs) - 1

    def replay(self) -> None:
        with cuda.device(self.device):
            self.graphs[self.current].replay()

    def _clean_up(self) -> None:
        """What torch leaves undone where the end of a capture raises."""
        # Up to 2.12 the generator stays in capture: every random op of the process would raise
        # "Offset increment outside graph capture". A copy of its state does not.
        generator = cuda.default_generators[self.index]
        generator.graphsafe_set_state(generator.clone_state())
        # Allocations would go on into the pool, as a filter of the graph says that may be gone by
        # then, and the pool would never be freed.
        foreign.leave_pool(self.index, self.pool)


GRAPHS: dict[str, type[Graph]] = {"cuda": TorchGraph}
_streams: dict[int, list[cuda.Stream]] = {}  # by device: those that no object captures on


def _take_stream(device: int) -> cuda.Stream:
    try:
        return _streams[device].pop()
    except (KeyError, IndexError):
        return cuda.Stream()


def _hand_on(device: int, stream: cuda.Stream, graphs: list[cuda.CUDAGraph]) -> None:
    graphs.clear()  # first, as each clears the workspaces of its stream
    _streams.setdefault(device, []).append(stream)


class Runner:
    """Runs a step: eagerly at first, and then, where there is a `graph`, by replays. A replay
    advances the counts on the device alone; the lengths of the `caches()` are advanced here."""

    def __init__(
        self,
        step: Callable[[], None],
        graph: Graph | None,
        caches: Callable[[], list[Any]],
    ) -> None:
        self.step, self.graph, self.caches = step, graph, caches
        self.captured = self.failed = False
        self.warm = 0
        # What gives a graph of an earlier call that runs on this call's tensors now, or None, asked
        # once; and what is told of a new graph.
        self.resume: Callable[[], Graph | None] | None = None
        self.on_capture: Callable[[Graph], None] | None = None

    def __call__(self, left: int) -> None:
        """One step, with `left` to come, this one included."""
        if self.resume is not None:
            earlier, self.resume = self.resume(), None
            if earlier is not None:
                self.graph, self.captured = earlier, True
        if self.graph is None:
            self.step()
        elif self.captured:
            self._replay(self.graph)
        elif self.failed or left < WORTH or not self._has_room(left):
            self.step()
        elif self.warm < WARM_UP - 1:
            self.graph.warm_up(self.step)
            self.warm += 1
        elif self.warm < WARM_UP:
            places = self.graph.rehearse(self.step)
            self.warm += 1
            if places:
                self._give_up(f"the host waits for the device{places[0]}")
        else:
            self._capture(self.graph)
            self(left)

    def moved(self) -> None:
        """Capture again: the tensors of the step have been replaced."""
        self.captured, self.warm = False, 0

    def part(self) -> None:
        """Capture into a graph of its own from now on: the one so far is left to others."""
        assert self.graph is not None
        self.graph, self.resume, self.on_capture = type(self.graph)(self.graph.device), None, None

    def _has_room(self, left: int) -> bool:
        """Whether no cache would have to grow, which a replay cannot have it do."""
        return all(cache.length + left <= cache.limit for cache in self.caches())

    def _replay(self, graph: Graph) -> None:
        graph.replay()
        for cache in self.caches():
            cache.length += 1

    def _capture(self, graph: Graph) -> None:
        lengths = [cache.length for cache in self.caches()]
        try:
            graph.capture(self.step)
            self.captured = True
            if self.on_capture is not None:
                self.on_capture(graph)
        except Exception as error:  # whatever a foreign model does that no graph can hold
            self._give_up(_explain(error))
        for cache, length in zip(self.caches(), lengths, strict=True):
            cache.length = length

    def _give_up(self, why: str) -> None:
        self.failed = True
        warnings.warn(
            f"no CUDA graph could be made of the guided step: {why}; steps are launched one by one "
            "(pass cuda_graph=False not to try)",
            stacklevel=2,
        )


def _explain(error: BaseException) -> str:
    """The error, and the module and line it came from."""
    text = str(error).strip().splitlines()
    where = module_at(reversed(list(traceback.walk_tb(error.__traceback__))))
    return f"{type(error).__name__}{where}: {text[0][:200] if text else ''}"
