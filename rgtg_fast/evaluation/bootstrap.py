"""Intervals over prompts: paired BCa bootstrap for means, Wilson's for shares, the jackknife."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()
_CHUNK = 1 << 23  # resampled counts held in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A mean (or other statistic) with its interval, standard error and number of prompts."""

    mean: float
    low: float
    high: float
    se: float
    n: int


class Bootstrap:
    """Resamples of n prompts, drawn once from `seed`: everything measured on the same prompts is
    resampled together, so intervals of differences are paired.

    `interval` is bias-corrected and accelerated (BCa, Efron 1987).
    """

    def __init__(
        self, n: int, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
    ) -> None:
        self.n, self.resamples, self.confidence, self.seed = n, resamples, confidence, seed
        self._kept: list[np.ndarray] | None = None

    def interval(self, values: np.ndarray) -> Estimate:
        """The mean of `values` [n] over the prompts where it is known (not NaN)."""
        values = np.asarray(values, dtype=np.float64)
        known = np.isfinite(values)
        count = int(known.sum())
        if count == 0:
            return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
        inside = values[known]
        mean = float(inside.mean())
        if count == 1:
            return Estimate(mean, math.nan, math.nan, math.nan, 1)
        # Of deviations from the mean, so that equal values give a spread of exactly 0.
        boot = self._means(np.where(known, values - mean, 0.0), known)
        boot = boot[np.isfinite(boot)]
        low, high = (mean + float(np.quantile(boot, p)) for p in self._levels(boot, inside - mean))
        # Rounding may put a resampled mean outside the range of the values.
        low, high = (min(max(x, inside.min()), inside.max()) for x in (low, high))
        return Estimate(mean, low, high, float(boot.std(ddof=1)), count)

    def _means(self, values: np.ndarray, known: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.concatenate([w @ values / (w @ known) for w in self._weights()])

    def _weights(self) -> list[np.ndarray] | Iterator[np.ndarray]:
        """How often each prompt is in each resample, [.., n]; kept where it fits."""
        if self._kept is None and self.resamples * self.n <= _CHUNK:
            self._kept = list(self._draw())
        return self._draw() if self._kept is None else self._kept

    def _draw(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(self.seed)
        step = max(1, _CHUNK // self.n)
        even = np.full(self.n, 1 / self.n)
        for at in range(0, self.resamples, step):
            size = min(step, self.resamples - at)
            yield rng.multinomial(self.n, even, size=size).astype(np.float64)

    def _levels(self, boot: np.ndarray, spread: np.ndarray) -> tuple[float, float]:
        tail = (1 - self.confidence) / 2
        below = float((boot < 0).mean() + (boot == 0).mean() / 2)
        if not 0 < below < 1:
            return tail, 1 - tail
        bias = _NORMAL.inv_cdf(below)
        square = float((spread**2).sum())
        skew = float((spread**3).sum()) / (6 * square**1.5) if square else 0.0

        def level(p: float) -> float:
            z = bias + _NORMAL.inv_cdf(p)
            return _NORMAL.cdf(bias + z / (1 - skew * z))

        return level(tail), level(1 - tail)


def share(values: np.ndarray, confidence: float = 0.95) -> Estimate:
    """The mean of `values` [n] in [0, 1], such as wins, with Wilson's interval (1927).

    It stays in [0, 1] and does not shrink to a point where all values are equal, as resampling
    does: 8 wins of 8 are [0.68, 1] at 95 %.
    """
    values = np.asarray(values, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    se = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return wilson(mean, se, n, confidence)


def wilson(mean: float, se: float, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson's interval for a `mean` in [0, 1] of n prompts, whose standard error is `se`.

    n counts as p (1 - p) / se² prompts where that is more: values between 0 and 1, such as means
    over seeds, spread less than those of a coin.
    """
    if n < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, n)
    size = max(n, mean * (1 - mean) / se**2) if se > 0 else n
    z2 = _NORMAL.inv_cdf((1 + confidence) / 2) ** 2 / size
    centre = (mean + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (mean * (1 - mean) + z2 / 4)) / (1 + z2)
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half), se, n)


def jackknife(full: float, left_out: np.ndarray, confidence: float = 0.95) -> Estimate:
    """A statistic of all prompts, `left_out` [n] that of all but one; a normal interval."""
    n = len(left_out)
    if n < 2:
        return Estimate(full, math.nan, math.nan, math.nan, n)
    se = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    half = _NORMAL.inv_cdf((1 + confidence) / 2) * se
    return Estimate(full, full - half, full + half, se, n)
