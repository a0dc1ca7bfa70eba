"""Where a step makes the host wait for the device, which no CUDA graph can hold."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import cuda, nn

WAITED = "called a synchronizing CUDA operation"  # how torch's warning begins

_noting = threading.RLock()


@contextmanager
def waits_noted() -> Iterator[list[str]]:
    """Collects where this thread makes the host wait, as torch's sync debug mode tells it.

    The mode belongs to the whole process, and so do the filters and the function that its warnings
    go through. So one thread at a time switches it on; a mode that the user has set stays; what
    other threads warn of is shown as before, but for the mode's warnings, for which they did not
    ask. A step that is refused wrongly or let through wrongly costs time, never a result.
    """
    places: list[str] = []
    me, noting = threading.get_ident(), True
    with _noting:
        mode = cuda.get_sync_debug_mode()
        show, filters = warnings.showwarning, warnings.filters

        def note(message: Any, category: Any, filename: str, lineno: int, *where: Any) -> None:
            own = noting and str(message).startswith(WAITED)
            if own and threading.get_ident() == me:
                place = f" at {filename.rsplit('/', 1)[-1]}:{lineno}"
                places.append(module_at(frames()) or place)
            if not own or mode:
                show(message, category, filename, lineno, *where)

        # "always", as a place that has warned once is silent by default.
        warnings.filterwarnings("always", message=WAITED)
        entry = warnings.filters[0]
        warnings.showwarning = note  # type: ignore[assignment]
        try:
            if not mode:
                cuda.set_sync_debug_mode("warn")
            yield places
        finally:
            if not mode:
                cuda.set_sync_debug_mode("default")
            # Another thread's `catch_warnings` may have put copies or older ones in their places;
            # if it brings `note` back later, that only hands on.
            noting = False
            if warnings.showwarning is note:
                warnings.showwarning = show
            for entries in (filters, warnings.filters):
                if entry in entries:
                    entries.remove(entry)  # type: ignore[attr-defined]


def frames() -> Iterator[tuple[FrameType, int]]:
    """The caller's frames and lines, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def module_at(places: Iterable[tuple[FrameType, int]]) -> str:
    """ " in Name (file:line)", of the first of the frames that is a module's forward, or ""."""
    for frame, line in places:
        # Of no other frame: reading them makes a copy of its variables, which lives as it does.
        if frame.f_code.co_name == "forward":
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                file = frame.f_code.co_filename.rsplit("/", 1)[-1]
                return f" in {type(owner).__name__} ({file}:{line})"
    return ""
