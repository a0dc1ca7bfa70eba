"""Turns on a scorer: it holds the text of the call that it serves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .factory import is_scorer

# By the id of a scorer, which need not be hashable: its lock, how many calls want it, and the
# thread of the call that has it.
_in_use: dict[int, list[Any]] = {}
_looking = threading.Lock()


class Turn:
    """The turn of a call, whose thread must not wait for it."""

    def __init__(self, entry: list[Any]) -> None:
        self.entry = entry

    def taken(self) -> None:
        """It is this thread that goes on with the call."""
        self.entry[2] = threading.get_ident()


@contextmanager
def alone(reward_model: Any) -> Iterator[Turn]:
    """One call at a time on a scorer.

    Calls of other threads wait for the one before to end. (What is made of a reward model is made
    for each call, and needs no turn.) A call made by the scorer, or by a callback of the call that
    it serves, would overwrite that call's text: it is a `ValueError`.
    """
    if not is_scorer(reward_model):
        yield Turn([None, 0, None])
        return
    key = id(reward_model)
    with _looking:
        entry = _in_use.setdefault(key, [threading.Lock(), 0, None])
        if entry[2] == threading.get_ident():
            raise ValueError(
                f"reward_model {type(reward_model).__name__} serves the call within which this one "
                "is made, or a generate_many that this thread has begun and not ended; pass one of "
                "the two a scorer object of its own"
            )
        entry[1] += 1
    try:
        with entry[0]:
            turn = Turn(entry)
            try:
                turn.taken()
                yield turn
            finally:
                entry[2] = None
    finally:
        with _looking:
            entry[1] -= 1
            if not entry[1]:
                del _in_use[key]
