"""Turns on a scorer: it holds the text of the call that it serves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from .sources import is_scorer, scorers_in


class _Use:
    """Of a scorer: its lock, and the thread of the call that has it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread: int | None = None


# By the id of a scorer, which need not be hashable. The calls that want a scorer hold its entry:
# with the last of them it goes, however that ended, and before the id can be another scorer's.
_in_use: WeakValueDictionary[int, _Use] = WeakValueDictionary()
_looking = threading.Lock()


class Turn:
    """The turn of a call on its scorers, whose thread must not wait for it."""

    def __init__(self, uses: list[_Use]) -> None:
        self.uses = uses

    def taken(self) -> None:
        """It is this thread that goes on with the call."""
        for use in self.uses:
            use.thread = threading.get_ident()


@contextmanager
def alone(reward_model: Any) -> Iterator[Turn]:
    """One call at a time on each of the scorers that a reward is made of.

    Calls of other threads wait for the one before to end. (What is made of a reward model is made
    for each call, and needs no turn.) A call made by the scorer, or by a callback of the call that
    it serves, would overwrite that call's text: it is a `ValueError`.
    """
    if isinstance(reward_model, nn.Module) and not is_scorer(reward_model):
        yield Turn([])
        return
    with ExitStack() as turns:
        # In one order for all calls: else two of them might wait for each other.
        scorers = sorted(scorers_in(reward_model), key=id)
        yield Turn([turns.enter_context(_turn(scorer)) for scorer in scorers])


@contextmanager
def _turn(scorer: Any) -> Iterator[_Use]:
    with _looking:
        use = _in_use.setdefault(id(scorer), _Use())
    # An interrupted call may have left its thread's number here, but never the lock.
    if use.thread == threading.get_ident() and use.lock.locked():
        raise ValueError(
            f"reward_model {type(scorer).__name__} serves the call within which this one "
            "is made, or a generate_many that this thread has begun and not ended; pass one of "
            "the two a scorer object of its own"
        )
    with use.lock:
        try:
            use.thread = threading.get_ident()
            yield use
        finally:
            use.thread = None
