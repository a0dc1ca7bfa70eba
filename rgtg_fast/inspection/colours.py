"""Colours of tokens: blue above the mean, orange below, which the colour-blind can tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .texts import Text

STEPS = 4  # to each side
# Light at no gain, and text on them stays readable in black: contrast 7 to 1 or more.
BACKGROUNDS = {
    -4: "#f5a04c",
    -3: "#f8b878",
    -2: "#fbd0a4",
    -1: "#fde8d1",
    0: "",
    1: "#dbe9f7",
    2: "#b7d3ef",
    3: "#93bde7",
    4: "#6fa7df",
}
_KL = (0.1, 0.5, 2.0)  # nats


def scale(rows: Sequence[Mapping[str, Text]]) -> float:
    """The gain that has the full colour: nineteen of twenty tokens gain or lose less."""
    tokens = [t for row in rows for text in row.values() for t in text.tokens]
    gains = sorted(abs(t.gain) for t in tokens if math.isfinite(t.gain))
    return gains[int(0.95 * (len(gains) - 1))] if gains else 0.0


def step_of(gain: float, largest: float) -> int:
    """-4 to 4; 0 for an unknown gain."""
    if not math.isfinite(gain) or not largest:
        return 0
    return max(-STEPS, min(STEPS, round(gain / largest * STEPS)))


def kl_class(kl: float) -> int:
    """0 to 3, by 0.1, 0.5 and 2 nats; 0 for an unknown one."""
    return sum(kl >= bound for bound in _KL)
