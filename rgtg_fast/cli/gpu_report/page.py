"""The report: one page of Markdown, a plot where matplotlib is installed, and one archive of all.

OUT/REPORT.md, OUT/lines.png, OUT/gpu_report.tar.gz
"""

from __future__ import annotations

import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .lines import LINES
from .results import Got, Results
from .steps import STEPS

PAGE, PLOT, ARCHIVE = "REPORT.md", "lines.png", "gpu_report.tar.gz"


def write(out: Path) -> Path:
    """Writes page, plot and archive of what there is, and gives the archive's path."""
    results = Results(out)
    judged = [(line, *line.judge(results)) for line in LINES]
    (out / PAGE).write_text(_page(results, judged))
    if find_spec("matplotlib") is not None:
        _draw(judged, out / PLOT)
    unfinished = out / f"{ARCHIVE}.part"  # never half an archive under its name
    with tarfile.open(unfinished, "w:gz") as archive:
        for file in sorted(out.rglob("*")):
            if file.is_file() and file.name not in (ARCHIVE, unfinished.name, ".lock"):
                archive.add(file, f"gpu_report/{file.relative_to(out)}")
    unfinished.replace(out / ARCHIVE)
    return out / ARCHIVE


def failures(out: Path) -> list[str]:
    """The steps that failed, ran out of time, or were interrupted."""
    results = Results(out)
    bad = ("failed", "timed out", "interrupted")
    return [s.name for s in STEPS if results.record(s.name).get("status") in bad]


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _table(heads: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(map(_cell, line))} |" for line in lines]


def _got(got: Got | None, unit: str) -> str:
    if got is None:
        return ""
    note = f" ({got.note})" if got.note else ""
    return f"{got.value:.4g} {unit}".rstrip() + note


def _page(results: Results, judged: list[tuple]) -> str:
    facts = results.environment()
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())
    verdicts = [verdict for *_, verdict in judged]
    counts = (f"{verdicts.count(v)} {v}" for v in ("met", "missed", "stated", "not run"))
    lines = ["# GPU report", ""]
    if results.dry:
        lines += ["A dry run on the CPU at tiny sizes: it measures nothing.", ""]
    lines += [
        f"- GPU: {facts.get('gpu') or 'none'}; driver {facts.get('driver') or 'unknown'}, "
        f"CUDA {facts.get('cuda') or 'none'}",
        f"- {facts.get('processor') or 'unknown processor'}, {facts.get('cores', '?')} cores",
        f"- {versions or 'versions unknown'}",
        f"- commit {facts.get('commit') or 'unknown'}",
        f"- {', '.join(counts)}",
        "",
    ]
    rows = [[line.text, line.wanted, _got(got, line.unit), v] for line, got, v in judged]
    lines += _table(["what", "wanted", "got", "verdict"], rows)
    rows = []
    for step in STEPS:
        record = results.record(step.name)
        tests = record.get("tests")
        said = ", ".join(f"{n} {k}" for k, n in tests.items()) if tests else ""
        said = record.get("why") or said
        status = record.get("status", "not run")
        if status == "failed" and "rc" in record:
            status += f" ({record['rc']})"
        rows.append([step.name, status, f"{record.get('seconds', 0.0):.1f}", said])
    lines += ["", *_table(["step", "status", "seconds", ""], rows), ""]
    return "\n".join(lines)


def _draw(judged: list[tuple], path: Path) -> None:
    """What was got over what was wanted, a bar a line; nothing where no line has both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = []
    for line, got, verdict in judged:
        bound = line.at_most or line.at_least
        if got is not None and bound:
            bars.append(
                (line.id, got.value / bound, "tab:green" if verdict == "met" else "tab:red")
            )
    path.unlink(missing_ok=True)
    if not bars:
        return
    figure = Figure(figsize=(8, 1 + 0.28 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names, ratios, colors = zip(*reversed(bars), strict=True)
    axes.barh(names, ratios, color=colors)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("got / wanted (green: met)")
    figure.savefig(path, dpi=120)
