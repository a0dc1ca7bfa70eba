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
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

WARM_UP = 2  # eager steps before a capture
WORTH = 16  # fewest steps to come that repay a capture


class Graph(Protocol):
    """What records the launches of a step; `TorchGraph`, and in the tests its emulation on CPU."""

    def __init__(self, device: torch.device) -> None: ...

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run a step as it is, where the capture will run."""

    def capture(self, step: Callable[[], None]) -> None:
        """Record a step without computing it; a failure leaves the device as it was."""

    def replay(self) -> None:
        """Compute the recorded step."""


class TorchGraph:
    """A `torch.cuda.CUDAGraph`; captures after the first share its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], None]) -> None:
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            step()
        outside.wait_stream(self.stream)

    def capture(self, step: Callable[[], None]) -> None:
        graph, failure = torch.cuda.CUDAGraph(), None
        # "thread_local": allocations by other threads would break a capture in the default mode.
        mode: dict[str, Any] = {"stream": self.stream, "capture_error_mode": "thread_local"}
        recording = torch.cuda.graph(graph, pool=self.pool, **mode)
        try:
            # A capture whose end raises leaves its stream current; the outer context resets it.
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream), recording:
                try:
                    step()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:  # the end of a failed capture raises too: not that error
            raise failure or error from None
        self.graph = graph  # frees the graph before: its memory pool must stay in use until now

    def replay(self) -> None:
        assert self.graph is not None
        with torch.cuda.device(self.device):
            self.graph.replay()


GRAPHS: dict[str, type[Graph]] = {"cuda": TorchGraph}


class Runner:
    """Runs a step: eagerly at first, and then, where there is a `graph`, by replays. A replay
    advances the counts on the device alone; the lengths of the `caches()` are advanced here."""

    def __init__(
        self, step: Callable[[], None], graph: Graph | None, caches: Callable[[], list[Any]]
    ) -> None:
        self.step, self.graph, self.caches = step, graph, caches
        self.captured = self.failed = False
        self.warm = 0

    def __call__(self, left: int) -> None:
        """One step, with `left` to come, this one included."""
        if self.graph is None:
            self.step()
        elif self.captured:
            self._replay(self.graph)
        elif self.failed or left < WORTH:
            self.step()
        elif self.warm < WARM_UP:
            self.graph.warm_up(self.step)
            self.warm += 1
        else:
            self._capture(self.graph)
            self(left)

    def moved(self) -> None:
        """Capture again: the tensors of the step have been replaced."""
        self.captured, self.warm = False, 0

    def _replay(self, graph: Graph) -> None:
        graph.replay()
        for cache in self.caches():
            cache.length += 1

    def _capture(self, graph: Graph) -> None:
        lengths = [cache.length for cache in self.caches()]
        try:
            graph.capture(self.step)
            self.captured = True
        except Exception as error:  # whatever a foreign model does that no graph can hold
            self.failed = True
            warnings.warn(
                f"no CUDA graph could be made of the guided step: {_explain(error)}; steps are "
                "launched one by one (pass cuda_graph=False not to try)",
                stacklevel=2,
            )
        for cache, length in zip(self.caches(), lengths, strict=True):
            cache.length = length


def _explain(error: BaseException) -> str:
    """The error, and the module and line it came from."""
    text = str(error).strip().splitlines()
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if isinstance(owner := frame.f_locals.get("self"), nn.Module):
            file = frame.f_code.co_filename.rsplit("/", 1)[-1]
            where = f" in {type(owner).__name__} ({file}:{line})"
    return f"{type(error).__name__}{where}: {text[0][:200] if text else ''}"
