"""Calls of several threads on one scorer take turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .factory import is_scorer

# By the id of a scorer, which need not be hashable: its lock, and how many calls want it.
_in_use: dict[int, list[Any]] = {}
_looking = threading.Lock()


@contextmanager
def alone(reward_model: Any) -> Iterator[None]:
    """One call at a time on a scorer: it holds the text of the call that it serves.

    Calls of other threads wait for the one before to end. (What is made of a reward model is made
    for each call, and needs no turn.)
    """
    if not is_scorer(reward_model):
        yield
        return
    key = id(reward_model)
    with _looking:
        entry = _in_use.setdefault(key, [threading.RLock(), 0])
        entry[1] += 1
    try:
        with entry[0]:
            yield
    finally:
        with _looking:
            entry[1] -= 1
            if not entry[1]:
                del _in_use[key]
