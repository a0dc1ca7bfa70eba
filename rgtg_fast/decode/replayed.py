"""A function of tensors by replays of a CUDA graph: the forwards of a round of speculation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .graphs import WORTH, Graph, Runner

Function = Callable[..., tuple[Tensor, ...]]


class _Step:
    """The function on inputs that stay where they are. (By itself, not a part of `Replayed`, or
    that and its runner would be a cycle that keeps the caches alive after the call.)"""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.inputs: list[Tensor] = []
        self.results: tuple[Tensor, ...] = ()

    def __call__(self) -> None:
        self.results = self.function(*self.inputs)


class Replayed:
    """`function(*inputs)`, of tensors whose shapes stay the same, gives a tuple of tensors and
    changes state in place. With a `graph` its inputs are copied to where the graph reads them, and
    its results are good until the next call; without one it is called as it is.

    `caches()` must have room for `tokens` more; where it `commits`, they get one token in a call.
    """

    def __init__(
        self,
        function: Function,
        graph: Graph | None,
        caches: Callable[[], Sequence[Any]],
        tokens: int,
        commits: bool,
    ) -> None:
        self.step, self.caches, self.tokens = _Step(function), caches, tokens
        self.runner = Runner(self.step, graph, caches if commits else list)  # type: ignore[arg-type]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        step = self.step
        if self.runner.graph is None:
            return step.function(*inputs)
        if [t.shape for t in inputs] != [t.shape for t in step.inputs]:
            step.inputs = [t.clone() for t in inputs]
            self.moved()
        for held, given in zip(step.inputs, inputs, strict=True):
            held.copy_(given)
        for cache in self.caches():
            before = cache.stores[0]
            cache.reserve(self.tokens)  # a replay could not
            if cache.stores[0] is not before:
                self.moved()
        self.runner(WORTH)
        return step.results

    def moved(self) -> None:
        """Capture again: tensors of the function have been replaced."""
        self.runner.moved()
