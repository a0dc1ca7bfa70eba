"""Diversity of answers as token ids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

Ids = Sequence[int]


def ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    """All n-grams of an answer, in order."""
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def repetition(ids: Ids, n: int) -> float:
    """rep-n of one answer, 1 - |different n-grams| / |n-grams|; 0 where it has none."""
    grams = ngrams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def diversity(ids: Ids) -> float:
    """The product of (1 - rep-n) over n = 2, 3, 4 of one answer."""
    return math.prod(1 - repetition(ids, n) for n in (2, 3, 4))


def distinct(answers: Sequence[Ids], n: int) -> float:
    """distinct-n: |different n-grams| / |n-grams| over all answers together; 0 without n-grams."""
    grams = [gram for ids in answers for gram in ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_without(answers: Sequence[Ids], n: int) -> np.ndarray:
    """`distinct` with each answer left out in turn, [len(answers)]: for the jackknife. The repeated
    answers of a bootstrap would lower it."""
    counts = [Counter(ngrams(ids, n)) for ids in answers]
    total: Counter[Any] = Counter()
    for count in counts:
        total.update(count)
    size = sum(total.values())
    left_out = []
    for count in counts:
        lost = sum(total[gram] == times for gram, times in count.items())
        rest = size - sum(count.values())
        left_out.append((len(total) - lost) / rest if rest else 0.0)
    return np.array(left_out)
