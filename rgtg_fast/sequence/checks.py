"""Numbers that the decoders of whole sequences take."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

# More texts of a prompt than are asked for by anyone who has not mistyped.
MOST_TEXTS = 4096


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float; `ValueError` unless it is a finite number with low < value < high."""
    good = isinstance(value, Real) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not low < value < high:
        bounds = "" if math.isinf(low) else f" > {low:g}"
        bounds += "" if math.isinf(high) else f"{' and' * bool(bounds)} < {high:g}"
        raise ValueError(f"{name}={value!r}; pass a finite number{bounds}")
    return float(value)
