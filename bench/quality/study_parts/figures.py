"""Raw files of the study to figures: means over prompts and seeds with their standard errors."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from study_parts.methods import KIND, SMALLER, forward_tokens
from study_parts.training import JUDGED, KINDS
from study_parts.units import BEST_OF, TOP_K, Kinds, unit_path

Raw = dict[str, list[dict[str, Any]]]  # kind -> raw figures by seed
KL_LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)
READ = (*KINDS, *JUDGED)  # models whose accuracy is reported


def load(folder: Path, task: str, seeds: list[int], groups: tuple[Kinds, ...]) -> Raw:
    """The raw figures of a task. Raises `ValueError` where a unit of `seeds` is missing."""
    kinds = [kind for group in groups for kind in group if kind != "exact"]
    paths = {kind: [unit_path(folder, task, seed, kind) for seed in seeds] for kind in kinds}
    missing = [path.name for row in paths.values() for path in row if not path.exists()]
    if missing:
        raise ValueError(
            f"{task}: {folder} lacks {len(missing)} files, such as {missing[0]}; run the study"
        )
    return {kind: [json.loads(path.read_text()) for path in row] for kind, row in paths.items()}


def crossed(values: Any) -> dict[str, float]:
    """Mean, standard error and half-width of the 95 % interval of values [seeds, prompts] where
    both are samples: the variances of the seeds' means and of the prompts' means are added, which
    counts the noise of a single value in both and so errs on the wide side. The interval is
    Student's with Satterthwaite's degrees of freedom: few seeds make it wider. NaN: not there."""
    values = np.asarray(values, dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        mean, by_prompt, by_seed = np.nanmean(values), np.nanmean(values, 0), np.nanmean(values, 1)
    variance = doubt = 0.0
    for means in (by_prompt[~np.isnan(by_prompt)], by_seed):
        if len(means) > 1:
            part = float(means.var(ddof=1)) / len(means)
            variance += part
            doubt += part**2 / (len(means) - 1)
    se = math.sqrt(variance)
    wide = float(stats.t.ppf(0.975, variance**2 / doubt)) if doubt > 0 else 1.96
    return {"mean": float(mean), "se": se, "ci95": wide * se}


def per_prompt(values: list[float], prompts: int) -> Any:
    """Mean of all draws for each prompt [P]; draws follow each other as whole rounds of prompts."""
    return np.asarray(values, dtype=float).reshape(-1, prompts).mean(0)


def between(gold: Any, at: Any, kl: float) -> Any:
    """Gold [P] at a KL of at most the last of `at` [n], which rise, from gold [n, P]."""
    right = max(int(np.searchsorted(at, kl)), 1)
    share = (kl - at[right - 1]) / max(at[right] - at[right - 1], 1e-12)
    return (1 - share) * gold[right - 1] + share * gold[right]


def over_seeds(values: list[float]) -> dict[str, float | None]:
    """Mean, the 95 % half-width of Student's distribution over seeds, and how many seeds: those
    whose figure is there (not NaN)."""
    known = [value for value in values if value == value]
    n = len(known)
    half = stats.t.ppf(0.975, n - 1) * np.std(known, ddof=1) / n**0.5 if n > 1 else None
    return {
        "mean": float(np.mean(known)) if known else None,
        "ci95": None if half is None else float(half),
        "seeds": n,
    }


class Curve:
    """A method's answers to the test prompts: gold, KL and proxy [S, β, P] over its grid `betas`,
    `best` [S]: the index of the β that won on the other prompts."""

    def __init__(self, name: str, raw: Raw, prompts: int) -> None:
        rows = [unit["methods"][name] for unit in raw[(KIND | SMALLER)[name]]]
        self.name = name
        self.betas = [float(b) for b in rows[0]["test"]]
        self.best = [self.betas.index(float(row["best"])) for row in rows]
        self.seeds = len(rows)
        self.gold, self.kl, self.proxy, self.tokens = (
            np.stack(
                [
                    [per_prompt(answers[field], prompts) for answers in row["test"].values()]
                    for row in rows
                ]
            )
            for field in ("gold", "kl", "proxy", "tokens")
        )

    def at_best(self, field: str) -> Any:
        values = getattr(self, field)
        return values[np.arange(self.seeds), self.best]

    def at_kl(self, base: Any, kl: Any) -> Any:
        """Gold [S, P] where the seed's mean KL is `kl` [S]: between neighbouring points of the
        frontier, which begins at the base policy (gold `base` [S, P], KL 0). NaN beyond its end."""
        out = np.full(base[: self.seeds].shape, np.nan)
        for seed in range(self.seeds):
            gold = np.concatenate([base[seed][None], self.gold[seed]])
            at = np.concatenate([[0.0], self.kl[seed].mean(-1)])
            order = np.argsort(at)
            gold, at = gold[order], at[order]
            if kl[seed] <= at[-1]:
                out[seed] = between(gold, at, kl[seed])
        return out

    def within_kl(self, base: Any, kl: Any) -> Any:
        """Gold [S, P] of the seed's best point of the frontier at a KL of at most `kl` [S]. The
        point is chosen by the test prompts themselves, in favour of this method."""
        spent = np.concatenate([np.zeros((self.seeds, 1)), self.kl.mean(-1)], axis=1)
        gold = np.concatenate([base[: self.seeds, None], self.gold], axis=1)
        mean = np.where(spent <= np.asarray(kl)[:, None] + 1e-9, gold.mean(-1), -np.inf)
        return gold[np.arange(self.seeds), mean.argmax(1)]


def base_gold(raw: Raw, prompts: int) -> Any:
    """Mean gold of the base policy's samples [S, P]."""
    return np.stack([per_prompt(unit["gold"], prompts) for unit in raw["base"]])


def right(unit: dict[str, Any]) -> Any:
    """By decile and prompt, the share of its pairs that are ordered right, a tie counting half
    [10, P]. Pairs whose prefixes are still the same are left out, so that a prompt may be NaN."""
    gap = np.array(unit["margins"], dtype=float)
    return _mean_of_pairs(np.where(gap == 0, 0.5, gap > 0), np.isnan(gap))


def _mean_of_pairs(values: Any, missing: Any) -> Any:
    counts = (~missing).sum(-1)
    return np.where(missing, 0.0, values).sum(-1) / np.where(counts, counts, np.nan)


def accuracy(raw: Raw) -> dict[str, Any]:
    """By kind, the share of right orders at each decile, and partial - full, paired. Pairs of the
    same prompt are not independent, so prompts are the sample."""
    rights = {k: np.array([right(unit) for unit in raw[k]]) for k in READ if k in raw}
    table: dict[str, Any] = {
        kind: [crossed(values[:, d]) for d in range(10)] for kind, values in rights.items()
    }
    if not {"partial", "full"} <= rights.keys():
        return table
    gap = rights["partial"] - rights["full"]
    table["partial - full"] = [crossed(gap[:, d]) for d in range(10)]
    return table


def true_value_accuracy(raw: Raw, value_gaps: list) -> dict[str, Any]:
    """How often the prefix with the larger true value V = E[gold | prefix] gets the larger reward,
    by decile; and how often V itself orders prefixes as the whole answers' gold is ordered, the
    most that any prefix reward can reach."""
    order = np.sign(np.array(value_gaps, dtype=float))  # [10, P, n]
    order[order == 0] = np.nan
    table = {}
    for kind in (k for k in READ if k in raw):
        sign = np.sign(np.array([unit["margins"] for unit in raw[kind]], dtype=float))
        values = np.where(sign == 0, 0.5, sign == order)
        table[kind] = _mean_of_pairs(values, np.isnan(sign) | np.isnan(order))
    table["ceiling"] = _mean_of_pairs(order > 0, np.isnan(order))[None]
    return {kind: [crossed(values[:, d]) for d in range(10)] for kind, values in table.items()}


def method_table(
    raw: Raw, curves: dict[str, Curve], base: Any, prompts: int, k: int
) -> dict[str, Any]:
    """Gold, KL, proxy and forward tokens of each method with k candidates, guided ones at their
    own best β."""
    return _unguided(raw, base, prompts) | {
        name: {
            "betas": [curve.betas[i] for i in curve.best],
            "gold": crossed(curve.at_best("gold")),
            "over_base": crossed(curve.at_best("gold") - base[: curve.seeds]),
            "kl": float(curve.at_best("kl").mean()),
            "proxy": float(curve.at_best("proxy").mean()),
            "forward_tokens": forward_tokens(name, float(curve.at_best("tokens").mean()), k),
        }
        for name, curve in curves.items()
    }


def _unguided(raw: Raw, base: Any, prompts: int) -> dict[str, Any]:
    """What is measured with the full-sequence model and needs no guide; nothing without it."""
    table: dict[str, Any] = {}
    if "full" not in raw:
        return table
    fixed = {"base": [u["unguided"]["base"] for u in raw["full"]]}
    for n in BEST_OF:
        fixed[f"best-of-{n}"] = [u["unguided"][f"best-of-{n}"] for u in raw["full"]]
    for k in TOP_K:
        fixed[f"top-k, k={k}"] = [u["unguided"]["top-k"][str(k)] for u in raw["full"]]
    for name, rows in fixed.items():
        gold = np.stack([per_prompt(r["gold"], prompts) for r in rows])
        drawn = fixed["base"] if name.startswith("best-of-") else rows
        length = float(np.mean([np.mean(r["tokens"]) for r in drawn]))
        table[name] = {
            "gold": crossed(gold),
            "over_base": crossed(gold - base),
            "kl": float(np.mean([np.mean(r["kl"]) for r in rows])),
            "forward_tokens": forward_tokens(name.split(",")[0], length, k=0),
        }
    return table


def over_beta(curve: Curve) -> list[dict[str, Any]]:
    """Gold, KL and proxy at each β of the grid, over all seeds."""
    return [
        {
            "beta": beta,
            "gold": crossed(curve.gold[:, i]),
            "kl": crossed(curve.kl[:, i]),
            "proxy": crossed(curve.proxy[:, i]),
        }
        for i, beta in enumerate(curve.betas)
    ]


def over_k(raw: Raw, curve: Curve, prompts: int, usual: int) -> dict[str, Any]:
    """Gold and KL by the number of candidates, at the β that was best for the `usual` number."""
    rows = [unit["methods"][curve.name]["k"] for unit in raw[KIND[curve.name]]]
    table = {
        int(k): {
            "gold": crossed([per_prompt(row[k]["gold"], prompts) for row in rows]),
            "kl": float(np.mean([np.mean(row[k]["kl"]) for row in rows])),
        }
        for k in rows[0]
    }
    best = {"gold": crossed(curve.at_best("gold")), "kl": float(curve.at_best("kl").mean())}
    return {str(k): v for k, v in sorted([*table.items(), (usual, best)])}
