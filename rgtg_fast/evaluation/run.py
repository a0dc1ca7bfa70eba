"""`python -m rgtg_fast eval`: answers, rewards, preferences, figures; each kept as it comes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import transformers
from rich.console import Console

from ..training.output_folder import locked
from . import report
from .prepared import Evaluation, prepare
from .settings import read_settings
from .stages import compare_all, generate_all, judge_all
from .store import write_whole
from .summary import RunRows, jsonable, summarise


def evaluate(config: str | os.PathLike[str], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Evaluates as the config file says; returns what it writes to `output_dir`/results.json.

    `output_dir` also gets report.md, texts.jsonl (every answer with its figures), two plots, and
    rows/, from which the same command goes on after a kill. Raises `ValueError` as `read_settings`
    does, for prompts that cannot be used, for a folder that another process writes, and for a
    guide or a judge that fails.
    """
    console = Console()
    evaluation = prepare(read_settings(config, overrides), console)
    with locked(evaluation.folder):
        results = _evaluate(evaluation)
    text = report.markdown(evaluation.settings, results)
    console.print(text.partition("![")[0], highlight=False, markup=False, soft_wrap=True)
    console.print(f"Wrote {evaluation.folder}/", highlight=False)
    return results


def _evaluate(evaluation: Evaluation) -> dict[str, Any]:
    settings, folder = evaluation.settings, evaluation.folder
    with evaluation.progress:
        done = generate_all(evaluation)
        judge_all(evaluation, done)
        if evaluation.prefer is not None:
            compare_all(evaluation, done)
    results = {
        "settings": jsonable(asdict(settings)),
        "prompts": len(evaluation.prompts),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "runs": summarise(settings, done),
    }
    for spec in settings.runs:
        results["runs"][spec.name]["kl_is"] = "bound" if spec.best_of > 1 else "exact"
    write_whole(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    write_whole(folder / "report.md", report.markdown(settings, results).encode())
    write_whole(folder / "texts.jsonl", "".join(texts(evaluation, done)).encode())
    if settings.plots:
        report.plot(settings, results, folder)
    return results


def texts(evaluation: Evaluation, done: dict[str, RunRows]) -> Iterator[str]:
    """The lines of texts.jsonl: the answers of all runs to a prompt, for every prompt and seed."""
    for i, prompt in enumerate(evaluation.prompts):
        for seed in evaluation.settings.seeds:
            answers = {}
            for name, rows in done.items():
                row = {k: v for k, v in rows.by_seed[seed][i].items() if k not in ("i", "ids")}
                if rows.wins is not None:
                    row["win"] = rows.wins[seed][i]["win"]
                answers[name] = row
            line = {"prompt": prompt.source, "seed": seed, "answers": answers}
            yield json.dumps(line, ensure_ascii=False) + "\n"
