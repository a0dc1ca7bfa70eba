"""What a training run did, as the table that it ends with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(metrics: dict[str, Any], out: Path) -> None:
    """Prints losses, accuracy by prefix length, seconds, rows used and dropped, and the folder."""
    table = Table("reward model", metrics["loss_type"], title="Training", title_justify="left")
    for name, value in summary_rows(metrics):
        table.add_row(name, value)
    Console().print(table)
    print(f"wrote {out}", flush=True)  # not in the table, whose width may cut a path


def summary_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The table's rows, of the figures of metrics.json."""
    steps = f" after {metrics['steps']} steps" if "steps" in metrics else ""
    rows = [("train loss", f"{metrics['train_loss']:.4f}{steps}")]
    if "train_accuracy" in metrics:
        rows.append(("train accuracy, all prefixes", f"{metrics['train_accuracy']:.3f}"))
    if "eval_loss" in metrics:
        rows.append(("eval loss", f"{metrics['eval_loss']:.4f}"))
    if "eval" in metrics or "eval_loss" not in metrics:
        rows += _eval_rows(metrics.get("eval"))
    rows.append(("seconds", f"{metrics['seconds']:.1f}"))
    for name, data in metrics["data"].items():
        dropped = data["rows"] - data["kept"] - data["held_out"]
        held_out = f", {data['held_out']} held out" if data["held_out"] else ""
        rows.append((f"{name} rows", f"{data['kept']} used, {dropped} dropped{held_out}"))
    return rows


def _eval_rows(report: dict[str, Any] | None) -> list[tuple[str, str]]:
    if report is None:
        return [("eval", "no eval set was given")]
    if "lengths" not in report:  # scalar labels
        return [
            ("squared error, half of the text", f"{report['deciles']['50']:.4f}"),
            ("squared error, whole text", f"{report['full']:.4f}"),
        ]
    named = {
        "first token": report["lengths"]["1"],
        "half of the answer": report["deciles"]["50"],
        "whole answer": report["full"],
        "all prefixes": report["mean"],
    }
    return [(f"eval accuracy, {name}", _share(value)) for name, value in named.items()]


def _share(value: dict[str, float]) -> str:
    if not value["pairs"]:
        return "no pair differs here"
    spread = "" if math.isnan(value["ci95"]) else f" ± {value['ci95']:.3f}"
    return f"{value['accuracy']:.3f}{spread} ({value['pairs']} pairs)"
