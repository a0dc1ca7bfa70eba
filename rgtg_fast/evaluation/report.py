"""Markdown and plots of an evaluation's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .settings import Settings, judged_by_guide

COLUMNS = {
    "reward": "reward",
    "kl": "KL (nats)",
    "perplexity": "perplexity",
    "distinct_2": "distinct-2",
    "rep_4": "rep-4",
    "length": "tokens",
    "finished": "finished",
    "win_rate": "win rate",
}
_DIFFERENCES = ("reward", "kl", "nll", "distinct_2", "rep_4", "length")
_PANELS = ("reward", "win_rate", "perplexity", "diversity", "length")


def markdown(settings: Settings, results: dict[str, Any]) -> str:
    """The report: runs, differences to the baseline, what was measured and how."""
    runs = results["runs"]
    shown = [c for c in COLUMNS if any(_get(run, c) for run in runs.values())]
    n, seeds, level = results["prompts"], len(settings.seeds), f"{settings.confidence:.0%}"
    lines = [
        "# Evaluation",
        "",
        f"{_count(n, 'prompt')}, {_count(seeds, 'seed')}, {level} intervals over prompts; "
        f"reward by `{settings.judge}`.",
        "",
        _row(["run", *(COLUMNS[c] for c in shown)]),
        _row(["---"] * (len(shown) + 1)),
        *(_row([name, *(_of(run, c, _get(run, c)) for c in shown)]) for name, run in runs.items()),
        "",
    ]
    if len(runs) > 1:
        names = {"nll": "nats per token", **COLUMNS}
        lines += [
            f"Differences to {settings.baseline}, paired by prompt:",
            "",
            _row(["run", *(names[c] for c in _DIFFERENCES)]),
            _row(["---"] * (len(_DIFFERENCES) + 1)),
            *(
                _row([name, *(_of(run, c, run["difference"][c], "+") for c in _DIFFERENCES)])
                for name, run in runs.items()
                if name != settings.baseline
            ),
            "",
        ]
    if settings.plots:
        lines += ["![reward over KL](reward_over_kl.png)", "", "![runs](runs.png)", ""]
    return "\n".join([*lines, *_notes(settings, runs)]) + "\n"


def _notes(settings: Settings, runs: dict[str, Any]) -> list[str]:
    """What each column is; first a warning where the judge also guides, as a guide raises its own
    reward whatever the quality."""
    guided = [run.name for run in settings.runs if judged_by_guide(settings, run)]
    notes = [
        f"- **`{settings.judge}` is also the guide or selector of {', '.join(guided)}: there, "
        "reward is the proxy reward.**"
    ] * bool(guided)
    notes += [
        "- Values are means over seeds for each prompt, then over prompts; intervals are the BCa "
        "bootstrap's over prompts, those of shares (finished, distinct-n, win rate) Wilson's.",
        "- reward: of the whole answer, EOS included where it finished.",
        "- KL: sum over the answer's tokens, EOS included, of the exact KL of each step's policy "
        "from the base; greedy runs: -log p of the answer, as their policy is certain. ≤ marks "
        "best-of-n's bound log n - (n - 1)/n.",
        "- perplexity: exp of the mean over answers of the nats per token under the base, EOS "
        "included.",
        "- distinct-n: different n-grams / n-grams over all answers of a seed. rep-n: "
        "1 - different / all n-grams within an answer. Both, and tokens, count token ids without "
        "EOS. finished: the share that ended with EOS within "
        f"{settings.max_new_tokens} tokens.",
    ]
    judged = {name: run["win_details"] for name, run in runs.items() if "win_details" in run}
    if judged:
        said = "; ".join(
            f"{name}: ties {d['ties']:.0%}, verdict follows the position {d['swapped']:.0%}"
            + (f", {d['unread']} unread, which count as ties" if d["unread"] else "")
            for name, d in judged.items()
        )
        notes.append(
            f"- win rate over {settings.baseline}: mean of the preferences in both orders, ties "
            f"1/2; {said}."
        )
    return notes


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n > 1 else ''}"


def _get(run: dict[str, Any], column: str) -> dict[str, Any] | None:
    found = run.get("win_rate") if column == "win_rate" else run["metrics"][column]
    return found if found and found["mean"] is not None else None


def _of(run: dict[str, Any], column: str, value: dict[str, Any] | None, sign: str = "") -> str:
    if column == "kl" and run["kl_is"] == "bound" and value and value["mean"] is not None:
        return "≤ " + _cell({"mean": value["mean"], "low": None}, sign)
    return _cell(value, sign)


def _cell(value: dict[str, Any] | None, sign: str = "") -> str:
    if not value or value["mean"] is None:
        return "-"
    digits = 1 if abs(value["mean"]) >= 100 else 3
    shown = f"{value['mean']:{sign}.{digits}f}"
    if value["low"] is None:
        return shown
    return f"{shown} [{value['low']:{sign}.{digits}f}, {value['high']:{sign}.{digits}f}]"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(settings: Settings, results: dict[str, Any], folder: Path) -> None:
    """Writes reward_over_kl.png and runs.png to `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    _frontier(axes, settings, results["runs"])
    figure.savefig(folder / "reward_over_kl.png", dpi=140)
    plt.close(figure)

    runs = results["runs"]
    panels = [p for p in _PANELS if any(_get(run, p) for run in runs.values())]
    size = (2.6 * len(panels) + 1.6, 0.9 + 0.34 * len(runs))
    figure, grid = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
    for axes, panel in zip(grid, panels, strict=True):
        _bars(axes, panel, runs)
    grid[0].set_yticks(range(len(runs)), list(runs))
    grid[0].invert_yaxis()
    figure.savefig(folder / "runs.png", dpi=140)
    plt.close(figure)


def _frontier(axes: Any, settings: Settings, runs: dict[str, Any]) -> None:
    """Reward over KL; runs that differ in one grid's values are joined."""
    groups: dict[str, list[str]] = {}
    for run in settings.runs:
        if _get(runs[run.name], "kl"):
            groups.setdefault(run.name.split(" ")[0], []).append(run.name)
    for label, names in groups.items():
        points = sorted((runs[name]["metrics"] for name in names), key=lambda m: m["kl"]["mean"])
        x, y = ([point[m]["mean"] for point in points] for m in ("kl", "reward"))
        axes.errorbar(
            x,
            y,
            xerr=_whiskers([point["kl"] for point in points]),
            yerr=_whiskers([point["reward"] for point in points]),
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            label=label,
        )
    axes.set_xlabel("KL from the base, nats per answer (of best-of-n: its bound)")
    axes.set_ylabel("mean reward by the judge")
    if groups:
        axes.legend(frameon=False, fontsize="small")


def _bars(axes: Any, panel: str, runs: dict[str, Any]) -> None:
    for at, run in enumerate(runs.values()):
        value = _get(run, panel)
        if value:
            axes.barh(at, value["mean"], xerr=_whiskers([value]), height=0.6, color="C0", alpha=0.8)
    if panel == "win_rate":
        axes.axvline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel(panel.replace("_", " "))


def _whiskers(values: list[dict[str, Any]]) -> list[list[float]]:
    """Distances from the mean to both ends, as errorbar wants them; none where there is none."""
    return [
        [max(0.0, sign * (v[end] - v["mean"])) if v[end] is not None else 0.0 for v in values]
        for sign, end in ((-1, "low"), (1, "high"))
    ]
