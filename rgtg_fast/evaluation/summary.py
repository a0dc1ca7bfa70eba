"""From rows to figures: every mean and every difference to the baseline with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import metrics
from .bootstrap import Bootstrap, Estimate, jackknife, share, wilson
from .settings import Settings


def _ended(row: dict[str, Any]) -> bool:
    return row["end"] is not None


# The value of a row, None where it is unknown.
MEASURES: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "reward": lambda row: row["reward"],
    "kl": lambda row: row["kl"],
    "log_ratio": lambda row: row["log_ratio"],
    "proxy": lambda row: row["proxy"],
    "nll": lambda row: -row["logp"] / (len(row["ids"]) + _ended(row)),
    "length": lambda row: float(len(row["ids"])),
    "finished": lambda row: float(_ended(row)),
    "rep_2": lambda row: metrics.repetition(row["ids"], 2),
    "rep_3": lambda row: metrics.repetition(row["ids"], 3),
    "rep_4": lambda row: metrics.repetition(row["ids"], 4),
    "diversity": lambda row: metrics.diversity(row["ids"]),
}
DISTINCT = (1, 2, 3)


@dataclass
class RunRows:
    """A run's rows by seed, each in the order of the prompts, with `reward` in every row, and its
    wins over the baseline by seed (None: not judged)."""

    by_seed: dict[int, list[dict[str, Any]]]
    wins: dict[int, list[dict[str, Any]]] | None = None

    def values(self, name: str) -> np.ndarray:
        """A measure [seeds, prompts], NaN where it is unknown."""
        get = MEASURES[name]
        known = [[get(row) for row in rows] for rows in self.by_seed.values()]
        return np.array(known, dtype=np.float64)


def summarise(settings: Settings, runs: dict[str, RunRows]) -> dict[str, Any]:
    """Figures of every run: `metrics`, `difference` (to the baseline), `seed_means`, and `win_rate`
    where judged. Values are averaged over seeds per prompt, then intervals are over prompts."""
    base = runs[settings.baseline]
    prompts = len(next(iter(base.by_seed.values())))
    bootstrap = Bootstrap(prompts, settings.resamples, settings.confidence)
    means = {name: {m: run.values(m).mean(0) for m in MEASURES} for name, run in runs.items()}
    result: dict[str, Any] = {}
    for name, run in runs.items():
        other = means[settings.baseline] if name != settings.baseline else None
        found: dict[str, Any] = {
            "metrics": {m: bootstrap.interval(v) for m, v in means[name].items()},
            "difference": {
                m: bootstrap.interval(v - other[m]) for m, v in means[name].items() if other
            },
            "seed_means": {
                str(seed): dict(zip(MEASURES, row, strict=True))
                for seed, row in zip(
                    run.by_seed, np.array([run.values(m).mean(1) for m in MEASURES]).T, strict=True
                )
            },
        }
        for n in DISTINCT:
            full, left = _distinct(run, n)
            spread = jackknife(full, left, settings.confidence)
            found["metrics"][f"distinct_{n}"] = wilson(
                full, spread.se, spread.n, settings.confidence
            )
            if other:
                base_full, base_left = _distinct(base, n)
                found["difference"][f"distinct_{n}"] = jackknife(
                    full - base_full, left - base_left, settings.confidence
                )
        found["metrics"]["finished"] = share(means[name]["finished"], settings.confidence)
        found["metrics"]["perplexity"] = _exp(found["metrics"]["nll"])
        if run.wins is not None:
            found |= _win_rate(run.wins, settings.confidence)
        result[name] = found
    return jsonable(result)


def _distinct(run: RunRows, n: int) -> tuple[float, np.ndarray]:
    answers = [[row["ids"] for row in rows] for rows in run.by_seed.values()]
    full = float(np.mean([metrics.distinct(a, n) for a in answers]))
    return full, np.mean([metrics.distinct_without(a, n) for a in answers], axis=0)


def _exp(nll: Estimate) -> Estimate:
    """Perplexity from nats per token; exp keeps the interval's coverage."""
    mean = math.exp(nll.mean)
    return Estimate(mean, math.exp(nll.low), math.exp(nll.high), mean * nll.se, nll.n)


def _win_rate(wins: dict[int, list[dict[str, Any]]], confidence: float) -> dict[str, Any]:
    rows = [row for seed in wins.values() for row in seed]
    values = np.array([[row["win"] for row in seed] for seed in wins.values()])
    return {
        "win_rate": share(values.mean(0), confidence),
        "win_details": {
            "ties": float(np.mean([row["win"] == 0.5 and not row["swapped"] for row in rows])),
            "swapped": float(np.mean([row["swapped"] for row in rows])),
            "unread": sum(row["unread"] for row in rows),
        },
    }


def jsonable(value: Any) -> Any:
    """Estimates as mappings, NaN and infinity as None: JSON has neither."""
    if isinstance(value, Estimate):
        return jsonable(asdict(value))
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
