"""Device time of calls on a GPU: launched one by one, and replayed from a CUDA graph.

Two things would be measured with the call. The host's launching, where the device has nothing left
to do when the host comes: so it sleeps for a millisecond before the first event, and calls for
which that was not enough are counted. And hits in the L2 cache of what the last call left there: so
a buffer that is larger is read before (overwritten, its dirty lines would be written back during
the call).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..decode.graphs import GRAPHS, Graph
from ..ops.foreign import sleep_on_gpu

Call = Callable[[], Any]
FLUSH_BYTES = 512 * 2**20
SLEEP_CYCLES = 2_000_000  # a millisecond at 2 GHz


@dataclass
class Taken:
    """Microseconds of each call; `replayed` is None where no graph could hold it (`note`)."""

    launched: list[float]
    replayed: list[float] | None = None
    host: list[float] | None = None  # until the host has launched the call
    late: int = 0  # launched calls that the device waited for: their time is the host's
    note: str = ""


@dataclass
class _Timer:
    flush: torch.Tensor
    late: int = 0
    host: list[float] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def __call__(self, call: Call) -> None:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.sum()
        sleep_on_gpu(SLEEP_CYCLES)
        first.record()
        begin = time.perf_counter()
        call()
        self.host.append(1e6 * (time.perf_counter() - begin))
        last.record()
        self.late += first.query()
        self.pairs.append((first, last))

    def microseconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [1e3 * first.elapsed_time(last) for first, last in self.pairs]


def device_times(
    functions: list[Callable[..., Any]], inputs: list[tuple], device: torch.device, repeat: int
) -> list[Taken]:
    """`repeat` calls of each function in turns, on copies of the inputs in turns; then `repeat`
    replays of each. What compiles or allocates at first use has been called on every copy before.
    """
    flush = torch.ones(FLUSH_BYTES // 4, device=device)
    timers = [_Timer(flush) for _ in functions]
    warm = max(3, len(inputs))
    for turn in range(warm + repeat):
        for i, (function, timer) in enumerate(zip(functions, timers, strict=True)):
            arguments = inputs[(turn + i * len(inputs) // len(functions)) % len(inputs)]
            if turn < warm:
                function(*arguments)
            else:
                timer(lambda f=function, a=arguments: f(*a))  # type: ignore[misc]
    taken = [Taken(t.microseconds(), host=t.host, late=t.late) for t in timers]
    graphs = [_captured(f, inputs[0], device, t) for f, t in zip(functions, taken, strict=True)]
    replays = [_Timer(flush) for _ in functions]
    for _ in range(repeat + 1):
        for graph, timer in zip(graphs, replays, strict=True):
            if graph is not None:
                timer(graph.replay)
    for graph, timer, one in zip(graphs, replays, taken, strict=True):
        if graph is not None:
            one.replayed = timer.microseconds()[1:]  # the first uploads the graph
    return taken


def _captured(
    function: Callable[..., Any], arguments: tuple, device: torch.device, taken: Taken
) -> Graph | None:
    """A graph of the call; None, with a note, where it waits for the host."""

    def step() -> None:
        function(*arguments)

    graph = GRAPHS[device.type](device)
    try:
        graph.warm_up(step)
        waits = graph.rehearse(step)
        if waits:
            taken.note = f"no graph: the host waits for the device{waits[0]}"
            return None
        graph.capture(step)
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        taken.note = f"no graph: {lines[0] if lines else type(error).__name__}"
        return None
    return graph
