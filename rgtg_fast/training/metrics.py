"""How often a reward model orders a pair right, by prefix length; its report and its plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

DECILES = tuple(range(10, 101, 10))
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def prefix_report(margins: Any, labels: Any) -> dict[str, Any]:
    """Accuracy of `margins` [n, T] = r(chosen prefix) - r(rejected prefix) with 95 % half-widths.

    `labels` [n, 3]: the two lengths, and the number of tokens with which both answers begin. Pairs
    whose prefixes are still equal at a length are not counted there; a tie counts half. Returns
    `full`, `mean` (all prefixes, each pair alike), `deciles` {10..100} and `lengths` {1, 2, 4, ..}
    as {accuracy, ci95, pairs}.
    """
    margins, labels = np.asarray(margins, dtype=np.float64), np.asarray(labels).astype(int)
    longest, equal = labels[:, :2].max(1), labels[:, 2]
    right = np.where(margins == 0, 0.5, margins > 0)
    at = np.arange(1, margins.shape[1] + 1)
    counted = (at > equal[:, None]) & (at <= longest[:, None])

    def column(lengths: np.ndarray) -> dict[str, float]:
        inside = np.minimum(lengths, longest)
        rows = np.arange(len(margins))
        chosen = right[rows, inside - 1][(inside > equal) & (lengths <= longest)]
        return _share(chosen)

    per_pair = (right * counted).sum(1) / counted.sum(1).clip(min=1)
    return {
        "full": column(longest),
        "mean": _share(per_pair[counted.any(1)]),
        "deciles": {str(d): column(np.ceil(longest * d / 100).astype(int)) for d in DECILES},
        "lengths": {
            str(n): column(np.full(len(margins), n)) for n in LENGTHS if (longest >= n).any()
        },
    }


def _share(right: np.ndarray) -> dict[str, float]:
    n = len(right)
    if n == 0:
        return {"accuracy": math.nan, "ci95": math.nan, "pairs": 0}
    spread = float(right.std(ddof=1)) if n > 1 else math.nan
    return {"accuracy": float(right.mean()), "ci95": 1.96 * spread / math.sqrt(n), "pairs": n}


def label_report(rewards: Any, labels: Any) -> dict[str, Any]:
    """Mean squared error of rewards [n, T] to labels [n, 2] = (label, length), or [n, 2 + T], where
    the prefixes' own targets follow: `full` and by decile of length."""
    rewards, labels = np.asarray(rewards, dtype=np.float64), np.asarray(labels)
    targets, length = labels[:, 2:], labels[:, 1].astype(int)
    if not targets.shape[1]:
        targets = labels[:, :1].repeat(rewards.shape[1], 1)

    def error(at: np.ndarray) -> float:
        rows = np.arange(len(rewards))
        return float(((rewards[rows, at - 1] - targets[rows, at - 1]) ** 2).mean())

    deciles = {str(d): error(np.ceil(length * d / 100).astype(int)) for d in DECILES}
    return {"full": error(length), "deciles": deciles}


def pair_metrics(prediction: Any) -> dict[str, float]:
    """`prefix_report` flattened for the Trainer's logs."""
    report = prefix_report(prediction.predictions, prediction.label_ids)
    flat = {
        "accuracy": report["full"]["accuracy"],
        "prefix_accuracy": report["mean"]["accuracy"],
    }
    for kind, name in (("deciles", "decile"), ("lengths", "length")):
        for key, value in report[kind].items():
            if value["pairs"]:
                flat[f"accuracy_{name}_{key}"] = value["accuracy"]
    return flat


def label_metrics(prediction: Any) -> dict[str, float]:
    """`label_report` flattened for the Trainer's logs."""
    report = label_report(prediction.predictions, prediction.label_ids)
    deciles = {f"mse_decile_{key}": value for key, value in report["deciles"].items()}
    return {"mse": report["full"], **deciles}


def plot_report(report: dict[str, Any], path: Path, title: str) -> None:
    """A PNG of accuracy over prefix length, in deciles and in tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, kind, label in (
        (panels[0], "deciles", "prefix, % of the longer answer"),
        (panels[1], "lengths", "prefix, tokens"),
    ):
        items = [(int(k), v) for k, v in report[kind].items() if v["pairs"]]
        if items:
            x = [n for n, _ in items]
            y = [v["accuracy"] for _, v in items]
            spread = [0 if math.isnan(v["ci95"]) else v["ci95"] for _, v in items]
            axis.errorbar(x, y, yerr=spread, marker="o", capsize=2, linewidth=1.2)
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
    panels[1].set_xscale("log", base=2)
    panels[0].set_ylabel("accuracy (95 % interval)")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
