"""From raw figures to `study.json`, plots and a Markdown report."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from study_parts import figures, findings, plots, smaller
from study_parts.figures import KL_LEVELS, Curve, crossed
from study_parts.methods import KIND, SMALLER
from study_parts.tasks import K
from study_parts.units import BEST_OF, Kinds, groups_of, rounded, unit_path

# Figures by model or by method, each of which can be replaced without the others.
BY_NAME = (
    *("accuracy", "methods", "over_beta", "at_equal_kl", "cpu_seconds"),
    *("true_values", "best_values", "gaps_at_equal_kl", "share_of_gain"),
)
# Differences at equal KL: each of these methods to the ones behind it.
COMPARED = {
    "PARGS": ("ARGS",),
    "GenARM": ("PARGS",),
    "GenARM-prefix": ("PARGS", "GenARM"),
    "soft-Q": ("PARGS", "GenARM", "GenARM-prefix"),
    "twist": ("PARGS", "GenARM", "GenARM-prefix"),
}
PLOTS = {
    "accuracy": plots.accuracy_plot,
    "frontier": plots.frontier_plot,
    "over_beta": plots.beta_plot,
    "cost": plots.cost_plot,
}


def summarise(
    folder: Path, task: str, seeds: list[int], kinds: Kinds | None = None
) -> dict[str, Any]:
    """All figures of one task that the models `kinds` give (None: those it is studied with).

    Raises `ValueError` without the full-sequence and the partial-sequence model, which the base
    policy's figures and the two findings come with.
    """
    raw = figures.load(folder, task, seeds, groups_of(kinds, task))
    if not {"full", "partial"} <= raw.keys():
        raise ValueError(f"{task} has no figures yet; report `full` and `partial` too")
    prompts = _prompts(raw)
    base = figures.base_gold(raw, prompts)
    every = {n: Curve(n, raw, prompts) for n, of in (KIND | SMALLER).items() if of in raw}
    curves = {name: curve for name, curve in every.items() if name in KIND}
    summary = {"seeds": seeds, "test_prompts": prompts}
    summary |= of_models(task, raw, curves, base, prompts)
    summary["over_k"] = {
        name: figures.over_k(raw, curves[name], prompts, K[task]) for name in ("ARGS", "PARGS")
    }
    if SMALLER.keys() <= every.keys():
        summary["smaller"] = smaller.figures_of(raw, every, base)
    summary |= with_exact(folder, task, raw, curves, base)
    summary["findings"] = {
        "prefix_accuracy": findings.prefix_accuracy(summary["accuracy"]),
        "guidance": findings.guidance(curves, base),
    }
    return summary


def of_models(
    task: str, raw: figures.Raw, curves: dict[str, Curve], base: Any, prompts: int
) -> dict[str, Any]:
    """The figures that each model and each method has alone."""
    return {
        "accuracy": figures.accuracy(raw),
        "methods": figures.method_table(raw, curves, base, prompts, K[task]),
        "over_beta": {name: figures.over_beta(curve) for name, curve in curves.items()},
        "at_equal_kl": {
            name: {str(kl): at_level(curve, base, kl) for kl in KL_LEVELS}
            for name, curve in curves.items()
            if not name.endswith("-G")
        },
        "gaps_at_equal_kl": gaps(curves, curves, base),
        "cpu_seconds": {
            kind: np.mean([[u["seconds"]["train"], u["seconds"]["decode"]] for u in units], 0)
            .round(1)
            .tolist()
            for kind, units in raw.items()
            if kind != "base"
        },
    }


def renewed(
    old: dict[str, Any], folder: Path, task: str, seeds: list[int], kinds: Kinds
) -> dict[str, Any]:
    """The figures `old` of a task, those of the models `kinds` replaced by what is in `folder`.

    Raises `ValueError` where the two are not of the same seeds, prompts and samples of the base
    policy, which other figures are compared with.
    """
    raw = figures.load(folder, task, seeds, (("base", *kinds),))
    prompts = _prompts(raw)
    base = figures.base_gold(raw, prompts)
    same = rounded(figures.crossed(base)) == old["methods"]["base"]["gold"]
    if old["seeds"] != seeds or old["test_prompts"] != prompts or not same:
        raise ValueError(
            f"{task}: the runs in {folder} have other seeds, prompts or samples of the base policy "
            "than study.json; run and report all models"
        )
    curves = {name: Curve(name, raw, prompts) for name, of in KIND.items() if of in kinds}
    new = of_models(task, raw, curves, base, prompts)
    known = curves | _beside(old, curves, folder, task, seeds, prompts)
    new["gaps_at_equal_kl"] = gaps(curves, known, base)
    new |= with_exact(folder, task, raw, curves, base)
    changed = {part: old.get(part, {}) | rows for part, rows in new.items() if part in BY_NAME}
    return old | changed


def _beside(
    old: dict[str, Any],
    curves: dict[str, Curve],
    folder: Path,
    task: str,
    seeds: list[int],
    prompts: int,
) -> dict[str, Curve]:
    """What `curves` are compared with, of runs in `folder` that are those of the figures `old`."""
    found = {}
    for name in {other for one in curves for other in COMPARED.get(one, ())} - curves.keys():
        kind = KIND[name]
        if all(unit_path(folder, task, seed, kind).exists() for seed in seeds):
            curve = Curve(name, figures.load(folder, task, seeds, ((kind,),)), prompts)
            if rounded(crossed(curve.at_best("gold"))) == old["methods"][name]["gold"]:
                found[name] = curve
    return found


def _prompts(raw: figures.Raw) -> int:
    return len(raw["base"][0]["gold"]) // max(BEST_OF)


def at_level(curve: Curve, base: Any, kl: float) -> dict[str, float] | None:
    """Gold at a KL, where every seed's frontier reaches it."""
    values = curve.at_kl(base, np.full(curve.seeds, kl))
    return None if np.isnan(values).any() else crossed(values)


def gaps(curves: dict[str, Curve], known: dict[str, Curve], base: Any) -> dict[str, Any]:
    """By level of KL, the gold of `curves` less that of what they are compared with."""
    return {
        f"{name} - {other}": {
            str(kl): gap_at(curves[name], known[other], base, kl) for kl in KL_LEVELS
        }
        for name, others in COMPARED.items()
        for other in others
        if name in curves and other in known
    }


def gap_at(curve: Curve, other: Curve, base: Any, kl: float) -> dict[str, float] | None:
    """Gold of `curve` - that of `other` at a KL, paired by seed and prompt."""
    at = np.full(curve.seeds, kl)
    gap = curve.at_kl(base, at) - other.at_kl(base, at)
    return None if np.isnan(gap).any() else crossed(gap)


def share_of_gain(
    curves: dict[str, Curve], base: Any, optimum: dict[str, float | None]
) -> dict[str, Any]:
    """Of what the exact optimum gains over the base at a KL, the share that each method gains."""
    shares: dict[str, Any] = {}
    for name, curve in curves.items():
        shares[name] = {}
        for kl, gold in optimum.items():
            gain = curve.at_kl(base, np.full(curve.seeds, float(kl))) - base
            known = gold is not None and not np.isnan(gain).any()
            shares[name][kl] = crossed(gain / (gold - base.mean())) if known else None
    return shares


def with_exact(
    folder: Path, task: str, raw: figures.Raw, curves: dict[str, Curve], base: Any
) -> dict[str, Any]:
    """The frontiers of the optimal policies and of those guided by the exact values of prefixes,
    what share of the optimum's gain each method has, and accuracy against these values; nothing
    of a task whose answers cannot be enumerated."""
    path = folder / task / "exact.json"
    if not path.exists():
        return {}
    exact = json.loads(path.read_text())
    frontiers = {
        "optimum": exact["frontier"],
        "guided by V": exact["guided_by_value"],
        "guided by V_max": exact["guided_by_best"],
    }
    points = {
        name: [
            {"beta": p["beta"], "gold": float(np.mean(p["gold"])), "kl": float(np.mean(p["kl"]))}
            for p in frontier
        ]
        for name, frontier in frontiers.items()
    }
    levels = {name: _gold_at_levels(row) for name, row in points.items()}
    sampled = {name: curve for name, curve in curves.items() if not name.endswith("-G")}
    return {
        "exact_frontiers": points,
        "exact_at_equal_kl": levels,
        "share_of_gain": share_of_gain(sampled, base, levels["optimum"]),
        "tree": {
            "mass": float(np.mean(exact["mass"])),
            "answers": float(np.mean(exact["answers"])),
        },
        "true_values": figures.true_value_accuracy(raw, exact["value_gaps"]),
        "best_values": figures.true_value_accuracy(raw, exact["best_gaps"]),
    }


def _gold_at_levels(points: list[dict[str, float]]) -> dict[str, float | None]:
    """Between neighbouring points; None beyond the end of the frontier."""
    spent, gold = ([p[name] for p in points] for name in ("kl", "gold"))
    return {
        str(kl): float(np.interp(kl, spent, gold)) if kl <= spent[-1] else None for kl in KL_LEVELS
    }


def write(
    folder: Path,
    results: Path,
    tasks: list[str],
    seeds: list[int],
    kinds: Kinds | None = None,
) -> dict[str, Any]:
    """`study.json`, `study.md` and `study_*.png` in `results`; prints the verdicts.

    With `kinds`, the models of these alone are reported anew, and all else is what `study.json`
    holds; it then says so under "renewed". So it is with its tasks that are not among `tasks`.
    """
    here = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "processor": platform.processor() or platform.machine(),
    }
    tasks = [task for task in tasks if (folder / task).exists()]
    path = results / "study.json"
    record = json.loads(path.read_text()) if path.exists() else here | {"tasks": {}}
    known = record["tasks"]
    if kinds is None and known.keys() <= set(tasks):
        record, known = here | {"tasks": {}}, {}
    for task in tasks:
        if kinds is None or task not in known:
            record["tasks"][task] = summarise(folder, task, seeds, kinds)
        else:
            record["tasks"][task] = renewed(known[task], folder, task, seeds, kinds)
    if known:
        what = kinds or [f"all of {task}" for task in tasks]
        record.setdefault("renewed", {}).update({name: here | {"tasks": tasks} for name in what})
    record = rounded(record)
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    summary = record["tasks"]
    for name, draw in PLOTS.items():
        draw(summary, results / f"study_{name}.png")
    text = "\n".join(line for name, task in summary.items() for line in markdown(name, task))
    (results / "study.md").write_text(text + "\n")
    print(text)
    return summary


def pm(row: dict[str, float] | None) -> str:
    """Mean and 95 % half-width."""
    return "-" if row is None else f"{row['mean']:+.2f} ± {row['ci95']:.2f}"


def markdown(name: str, task: dict[str, Any]) -> list[str]:
    """The report of one task: verdicts, then the tables behind them (± are 95 % half-widths)."""
    seeds = ", ".join(map(str, task["seeds"]))
    lines = [f"### Task `{name}`: seeds {seeds}, {task['test_prompts']} test prompts", ""]
    lines += [*_verdicts(task["findings"]), ""]
    lines.append("| method | β by seed | gold | over base | KL | LM + RM tokens |")
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for method, row in task["methods"].items():
        betas = ", ".join(f"{b:g}" for b in row.get("betas", [])) or "-"
        cost = row["forward_tokens"]
        lines.append(
            f"| {method} | {betas} | {pm(row['gold'])} | {pm(row['over_base'])} "
            f"| {row['kl']:.2f} | {cost['lm']:.0f} + {cost['rm']:.0f} |"
        )
    for part in (_equal_kl, _accuracy, _over_k, _over_beta):
        lines += ["", *part(task)]
    if "smaller" in task:
        lines += ["", *smaller.markdown(task["smaller"])]
    return [*lines, ""]


def _verdicts(found: dict[str, Any]) -> list[str]:
    first, second = found["prefix_accuracy"], found["guidance"]
    word = {True: "PASS", False: "FAIL"}
    clear = sum(first["significant"])
    lines = [
        f"- {word[first['passed']]}: {first['finding']} ({clear} of 9 differences have a 95 % "
        "interval above zero)",
        f"- {word[second['passed']]}: {second['finding']}",
    ]
    for name, row in [*second["tests"].items(), *second["beside"].items()]:
        figure = f"{pm(row)}, {row['in_se']:.1f} SE" if row["seeds"] else "no seed reaches it"
        lines.append(f"  - {name}: {figure}, {word[row['passed']]}")
    return lines


def _equal_kl(task: dict[str, Any]) -> list[str]:
    lines = [f"| gold at KL = | {' | '.join(f'{kl:g}' for kl in KL_LEVELS)} |"]
    lines.append("| --- |" + " --- |" * len(KL_LEVELS))
    for method, row in task["at_equal_kl"].items():
        cells = " | ".join(pm(v) for v in row.values())
        lines.append(f"| {method} | {cells} |")
    for name, row in task.get("exact_at_equal_kl", {}).items():
        cells = " | ".join("-" if gold is None else f"{gold:+.2f}" for gold in row.values())
        lines.append(f"| exact: {name} | {cells} |")
    for name, row in task.get("gaps_at_equal_kl", {}).items():
        lines.append(f"| {name} | {' | '.join(pm(v) for v in row.values())} |")
    for name, row in task.get("share_of_gain", {}).items():
        cells = " | ".join("-" if v is None else _percent(v) for v in row.values())
        lines.append(f"| {name}, % of the optimum's gain | {cells} |")
    return lines


def _percent(row: dict[str, float]) -> str:
    return f"{100 * row['mean']:.0f} ± {100 * row['ci95']:.0f}"


def _accuracy(task: dict[str, Any]) -> list[str]:
    lines = ["| accuracy at decile | " + " | ".join(map(str, range(1, 11))) + " |"]
    lines.append("| --- |" + " --- |" * 10)
    for kind, rows in task["accuracy"].items():
        if kind == "partial - full":
            cells = [f"{r['mean']:+.3f} ± {r['ci95']:.3f}" for r in rows]
        else:
            cells = [f"{r['mean']:.3f}" for r in rows]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    for of, value in (("true_values", "V"), ("best_values", "V_max")):
        for kind, rows in task.get(of, {}).items():
            label = f"{value} against gold" if kind == "ceiling" else f"{kind}, of {value}"
            cells = [f"{r['mean']:.3f}" for r in rows]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _over_k(task: dict[str, Any]) -> list[str]:
    counts = list(task["over_k"]["PARGS"])
    lines = [f"| gold (KL) at k = | {' | '.join(counts)} |", "| --- |" + " --- |" * len(counts)]
    for method, row in task["over_k"].items():
        cells = " | ".join(f"{pm(v['gold'])} ({v['kl']:.2f})" for v in row.values())
        lines.append(f"| {method} | {cells} |")
    return lines


def _over_beta(task: dict[str, Any]) -> list[str]:
    """Over-optimisation: what the largest β of a grid makes of the best point's gold."""
    lines = [
        "| over-optimisation | best β: gold (own reward, KL) | largest β: gold (own reward, KL) |"
    ]
    lines.append("| --- | --- | --- |")
    for method, points in task["over_beta"].items():
        top = max(points, key=lambda point: point["gold"]["mean"])
        cells = " | ".join(_at_beta(point) for point in (top, points[-1]))
        lines.append(f"| {method} | {cells} |")
    return lines


def _at_beta(point: dict[str, Any]) -> str:
    return (
        f"{point['beta']:g}: {pm(point['gold'])} "
        f"({point['proxy']['mean']:+.2f}, {point['kl']['mean']:.1f})"
    )
