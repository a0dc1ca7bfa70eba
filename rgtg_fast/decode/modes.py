"""The modes of torch that a run goes on under, whatever its caller turns on and off meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Modes:
    """Autocast as it is now on the kinds of device `kinds`, and never inference mode.

    Half a cache under autocast and half without it would be of two dtypes; and tensors made in
    inference mode cannot be written to outside of it.
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted(set(kinds))
        ]
        self.caches = torch.is_autocast_cache_enabled()

    @contextmanager
    def on(self) -> Iterator[None]:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())  # the line before turns gradients on
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self.caches))
            yield

    def within(self, items: Iterator[T]) -> Iterator[T]:
        """The items, each made under these modes, and handed out under those of whoever asks."""
        while True:
            with self.on():
                item = next(items, items)
            if item is items:
                return
            yield item  # type: ignore[misc]
