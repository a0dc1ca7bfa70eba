"""What each of the smaller methods on the reward side changes: differences to its counterpart."""

from __future__ import annotations

from typing import Any

import numpy as np

from study_parts.figures import Curve, Raw, crossed, over_beta, right
from study_parts.methods import KIND, SMALLER

AGAINST = {
    "ABC": ("ARGS", "PARGS", "RAD"),
    "ABC credit": ("ARGS",),
    "head": ("PARGS",),
    "pessimistic, mild": ("head",),
    "pessimistic, strong": ("head",),
    "CREAM": ("PARGS",),
}
EQUAL_KL = 1.0  # nats
COLUMNS = {
    "prefix_accuracy": "accuracy, deciles 1 to 9",
    "whole_accuracy": "accuracy, whole answers",
    "gold": "gold, own best β",
    "gold_at_kl": f"gold at a KL of {EQUAL_KL:g}",
    "gold_at_largest": "gold, largest β",
}


def figures_of(raw: Raw, curves: dict[str, Curve], base: Any) -> dict[str, Any]:
    """Differences paired by seed and prompt, and the figures they are made of."""
    own = {name: _figures(raw, curves[name], base) for name in (*KIND, *SMALLER)}
    return {
        "changes": [
            {"method": name, "against": other}
            | {
                key: crossed(own[name][key] - own[other][key])
                for key in COLUMNS
                if key in own[name] and key in own[other]
            }
            for name, others in AGAINST.items()
            for other in others
        ],
        "methods": {
            name: {"betas": [curves[name].betas[i] for i in curves[name].best]}
            | {key: crossed(values) for key, values in own[name].items()}
            for name in SMALLER
        },
        "over_beta": {name: over_beta(curves[name]) for name in ("PARGS", "ARGS", *SMALLER)},
        "consistency": [unit["consistency"] for unit in raw["cream"]],
        "selection": _selection(raw),
    }


def _figures(raw: Raw, curve: Curve, base: Any) -> dict[str, Any]:
    """By column, values [seeds, prompts]; without those that are not there."""
    units = raw[(KIND | SMALLER)[curve.name]]
    values = {
        "gold": curve.at_best("gold"),
        "gold_at_largest": curve.gold[:, -1],
    }
    at_kl = curve.at_kl(base, np.full(curve.seeds, EQUAL_KL))
    if not np.isnan(at_kl).any():
        values["gold_at_kl"] = at_kl
    if "margins" in units[0]:
        by_decile = np.array([right(unit) for unit in units])
        values["prefix_accuracy"] = _nanmean(by_decile[:, :9])
        values["whole_accuracy"] = by_decile[:, 9]
    return values


def _nanmean(values: Any) -> Any:
    """Over the second axis, in which not all may be NaN."""
    return np.nanmean(values, axis=1)


def _selection(raw: Raw) -> dict[str, dict[str, Any]]:
    """By number of pairs, the accuracy of a head fitted to them, and what the choice changes."""
    table: dict[str, dict[str, Any]] = {}
    units = [unit["select"] for unit in raw["select"]]
    for count in units[0]:
        values = {way: np.array([unit[count][way] for unit in units]) for way in units[0][count]}
        table[count] = {way: crossed(rows) for way, rows in values.items()}
        for name in ("drawn", "exact"):
            gap = values[f"d-optimal, {name} labels"] - values[f"random, {name} labels"]
            table[count][f"d-optimal - random, {name} labels"] = crossed(gap)
    return table


def markdown(figures: dict[str, Any]) -> list[str]:
    """What the smaller methods change; over-optimisation; the choice of pairs."""
    lines = [f"| change by | {' | '.join(COLUMNS.values())} |", "| --- |" + " --- |" * len(COLUMNS)]
    for row in figures["changes"]:
        cells = [_pm(row.get(key), 3 if "accuracy" in key else 2) for key in COLUMNS]
        lines.append(f"| {row['method']} - {row['against']} | {' | '.join(cells)} |")
    lines += ["", "| method | gold (its own reward) at β |", "| --- | --- |"]
    for name, points in figures["over_beta"].items():
        cells = [
            f"{p['beta']:g}: {p['gold']['mean']:+.2f} ({p['proxy']['mean']:+.2f})" for p in points
        ]
        lines.append(f"| {name} | {', '.join(cells)} |")
    rates = ", ".join(f"{rate:.3f}" for rate in figures["consistency"])
    lines += ["", f"CREAM's consistency by seed: {rates}."]
    table = figures["selection"]
    ways = list(next(iter(table.values())))
    lines += ["", f"| pairs labelled | {' | '.join(ways)} |", "| --- |" + " --- |" * len(ways)]
    for count, row in table.items():
        cells = [_pm(row[way], 3) if " - " in way else f"{row[way]['mean']:.3f}" for way in ways]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def _pm(row: dict[str, float] | None, digits: int) -> str:
    return "-" if row is None else f"{row['mean']:+.{digits}f} ± {row['ci95']:.{digits}f}"
