"""The study's plots, small PNGs from what `report.summarise` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "ARGS": "C1",
    "ARGS-G": "C1",
    "PARGS": "C0",
    "PARGS-G": "C0",
    "FaRMA": "C2",
    "RAD": "C4",
    "GenARM": "C5",
    "seq2seq": "C6",
    "GenARM-prefix": "C3",
    "soft-Q": "C7",
    "twist": "C8",
}
RM_COLOURS = {
    "full": "C1",
    "partial": "C0",
    "farma": "C2",
    "rad": "C4",
    "genarm": "C5",
    "seq2seq": "C6",
    "genarm_prefix": "C3",
    "soft_q": "C7",
    "twist": "C8",
}
MOST_KL = 12.0


def _panels(
    summary: dict[str, Any], width: float = 4.6, height: float = 3.5
) -> tuple[Any, list[tuple[Any, str, dict[str, Any]]]]:
    size = (width * len(summary), height)
    figure, axes = plt.subplots(1, len(summary), figsize=size, layout="constrained", squeeze=False)
    return figure, [(a, name, s) for a, (name, s) in zip(axes[0], summary.items(), strict=True)]


def accuracy_plot(summary: dict[str, Any], path: Path) -> None:
    """Accuracy of every reward model by decile of length, with 95 % intervals."""
    figure, panels = _panels(summary)
    deciles = range(10, 101, 10)
    for axis, name, task in panels:
        for kind, colour in RM_COLOURS.items():
            if rows := task["accuracy"].get(kind):
                style = "-" if kind in ("full", "partial") else ":"
                mean, band = [r["mean"] for r in rows], [r["ci95"] for r in rows]
                axis.errorbar(deciles, mean, band, fmt=style, color=colour, capsize=2, label=kind)
        if "true_values" in task:
            rows = [r["mean"] for r in task["true_values"]["ceiling"]]
            axis.plot(deciles, rows, "k--", linewidth=0.8, label="true prefix value")
        axis.axhline(0.5, color="grey", linewidth=0.6)
        axis.set(title=name, xlabel="prefix, % of the longer answer")
        axis.legend(frameon=False, fontsize="x-small")
    panels[0][0].set_ylabel("accuracy (95 % interval)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def frontier_plot(summary: dict[str, Any], path: Path) -> None:
    """Gold reward against KL from the base; where they are known, that of the exact optimum and of
    the ratio policy with the exact value of every prefix."""
    figure, panels = _panels(summary)
    for axis, name, task in panels:
        base = task["methods"]["base"]["gold"]["mean"]
        for method, points in task["over_beta"].items():
            if method.endswith("-G"):
                continue
            kl = [0.0, *(p["kl"]["mean"] for p in points)]
            gold = [base, *(p["gold"]["mean"] for p in points)]
            inside = [i for i, value in enumerate(kl) if value <= MOST_KL]
            axis.plot(
                [kl[i] for i in inside],
                [gold[i] for i in inside],
                marker="o",
                markersize=3,
                color=COLOURS[method],
                label=method,
            )
        for method, row in task["methods"].items():
            if method.startswith("best-of-"):
                axis.plot(row["kl"], row["gold"]["mean"], "k^", markersize=5)
                axis.annotate(method, (row["kl"], row["gold"]["mean"]), fontsize="x-small")
        styles = {"optimum": "k-", "guided by V": "k--"}
        for label, points in task.get("exact_frontiers", {}).items():
            if label in styles:
                kl, gold = ([p[key] for p in points] for key in ("kl", "gold"))
                axis.plot(kl, gold, styles[label], linewidth=1, label=f"exact: {label}")
        axis.set(title=name, xlabel="KL from the base (nats)")
    handles = max(
        (axis.get_legend_handles_labels() for axis, *_ in panels), key=lambda h: len(h[0])
    )
    figure.legend(*handles, loc="outside right upper", frameon=False, fontsize="small")
    panels[0][0].set_ylabel("mean gold reward")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cost_plot(summary: dict[str, Any], path: Path) -> None:
    """Gold reward against the tokens that went through both models, at each method's own best β;
    of SMC the best one by the number of particles."""
    figure, panels = _panels(summary, 6.5, 6.0)
    for axis, name, task in panels:
        for method, row in (task["methods"] | _best_decoders(task.get("decoders", {}))).items():
            tokens = sum(row["forward_tokens"].values())
            gold, band = row["gold"]["mean"], row["gold"]["ci95"]
            mark = "^" if method in task.get("decoders", {}) or method.startswith("SMC") else "o"
            axis.errorbar(tokens, gold, band, fmt=mark, color=COLOURS.get(method, "k"), capsize=2)
            axis.annotate(
                method, (tokens, gold), (4, 3), textcoords="offset points", fontsize="x-small"
            )
        axis.set_xscale("log", base=2)
        axis.set(title=name, xlabel="tokens through LM + RM per answer")
    panels[0][0].set_ylabel("mean gold reward")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _best_decoders(rows: dict[str, Any]) -> dict[str, Any]:
    """The decoders of whole sequences, each at its best β."""
    best: dict[str, Any] = {}
    for method, row in rows.items():
        name, has_beta, _ = method.partition(", beta ")
        if name == "PARGS":  # which the study has itself
            continue
        own = name if has_beta else method
        if own not in best or row["gold"]["mean"] > best[own]["gold"]["mean"]:
            best[own] = row
    return best


def beta_plot(summary: dict[str, Any], path: Path) -> None:
    """Gold (solid) and the guide's own reward (dotted, each scaled to its range) against β."""
    figure, axes = plt.subplots(
        2, len(summary), figsize=(4.6 * len(summary), 5.2), layout="constrained", squeeze=False
    )
    for column, (name, task) in enumerate(summary.items()):
        for method, points in task["over_beta"].items():
            betas = [p["beta"] for p in points]
            for row, key in enumerate(("gold", "proxy")):
                if key == "proxy" and method not in ("ARGS", "PARGS"):
                    continue
                style = ":" if method.endswith("-G") else "-"
                mean = [p[key]["mean"] for p in points]
                band = [p[key]["ci95"] for p in points]
                axes[row][column].errorbar(
                    betas, mean, band, fmt=style, color=COLOURS[method], capsize=2, label=method
                )
        axes[0][column].axhline(task["methods"]["base"]["gold"]["mean"], color="grey", ls="--")
        axes[0][column].set_title(name)
        axes[0][column].legend(frameon=False, fontsize="x-small")
        for row in (0, 1):
            axes[row][column].set_xscale("log", base=2)
        axes[1][column].set_xlabel("β")
    axes[0][0].set_ylabel("mean gold reward")
    axes[1][0].set_ylabel("the guide's own reward")
    figure.savefig(path, dpi=110)
    plt.close(figure)
