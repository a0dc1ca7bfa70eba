"""Whether drawn answers are of a distribution that was enumerated."""

from __future__ import annotations

from collections import Counter

import torch


def chi_square_p(counts: Counter, probs: dict[tuple[int, ...], float]) -> float:
    """p-value of the counts; answers expected fewer than 5 times share one cell."""
    n = sum(counts.values())
    assert set(counts) <= set(probs), f"impossible answers drawn: {set(counts) - set(probs)}"
    big = [a for a, p in probs.items() if n * p >= 5]
    observed = [counts[a] for a in big]
    expected = [n * probs[a] for a in big]
    rest = n - sum(expected)
    if rest > 1:
        observed.append(n - sum(observed))
        expected.append(rest)
    assert len(expected) > 5, "too few cells to test anything"
    chi2 = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    half = torch.tensor([(len(expected) - 1) / 2, chi2 / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
