"""How rewards, KL and lengths of a job's answers are spread: figures and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.store import write_whole

LABELS = {"reward": "reward", "kl": "KL (nats)", "length": "tokens"}
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)
_BINS = 40


def read_answers(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of an output file."""
    with path.open("rb") as file:
        yield from map(json.loads, file)


def write_report(answers: Iterable[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Write report.json and report.png to `folder`; returns what the first holds.

    For `reward`, `kl` and `length`, each over the answers that have it: count, mean, standard
    deviation, quantiles (of 5 % by its name "5") and a histogram.
    """
    values: dict[str, list[float]] = {name: [] for name in LABELS}
    errors = 0
    for answer in answers:
        if "error" in answer:
            errors += 1
            continue
        for name in ("reward", "kl"):
            if answer[name] is not None:
                values[name].append(answer[name])
        values["length"].append(len(answer["tokens"]))
    found: dict[str, Any] = {"answers": len(values["length"]), "errors": errors}
    found["tokens"] = int(sum(values["length"]))
    found |= {name: _spread(np.array(of, dtype=np.float64)) for name, of in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", (json.dumps(found, indent=2) + "\n").encode())
    _plot(found, folder / "report.png")
    return found


def _spread(values: np.ndarray) -> dict[str, Any] | None:
    if not len(values):
        return None
    counts, edges = np.histogram(values, bins=_BINS)
    quantiles = np.percentile(values, _QUANTILES)
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "quantiles": {str(q): float(v) for q, v in zip(_QUANTILES, quantiles, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, label) in zip(figure.subplots(1, len(LABELS)), LABELS.items(), strict=True):
        axes.set_xlabel(label)
        axes.set_ylabel("answers")
        spread = found[name]
        if spread is not None:
            axes.stairs(spread["histogram"]["counts"], spread["histogram"]["edges"], fill=True)
            axes.axvline(spread["mean"], color="C1", label=f"mean {spread['mean']:.3g}")
            axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
