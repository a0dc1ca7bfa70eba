"""The three stages of an evaluation: answers, rewards, preferences."""

from __future__ import annotations

import gc
from typing import Any

import torch
import transformers

from . import models
from .answers import Answerer
from .prepared import Evaluation
from .prompts import Prompt
from .scoring import Classifier, FunctionJudge
from .settings import Run, is_function, load_function
from .store import Rows
from .summary import RunRows
from .wins import ChatJudge, Prefer, compare

_JUDGED_AT_ONCE = 64


def generate_all(evaluation: Evaluation) -> dict[str, RunRows]:
    """The answers of all runs, those that are there already read from their files."""
    settings, n = evaluation.settings, len(evaluation.prompts)
    transformers.utils.logging.disable_progress_bar()  # of weight loading: it would break up ours
    files = {
        spec.name: {s: evaluation.rows("answers", spec, s) for s in evaluation.seeds(spec)}
        for spec in settings.runs
    }
    ahead = [
        spec for spec in settings.runs if any(len(f.rows) < n for f in files[spec.name].values())
    ]
    lm = _rehearse(evaluation, ahead) if ahead else None
    bar = evaluation.progress.add_task("answers", total=n * sum(map(len, files.values())))
    done = {}
    for spec in settings.runs:
        evaluation.progress.update(bar, description=f"answers: {spec.name}")
        if spec in ahead:
            _generate(evaluation, spec, lm, files[spec.name], bar)
        else:
            evaluation.progress.advance(bar, n * len(files[spec.name]))
        rows = {seed: [dict(row) for row in f.rows] for seed, f in files[spec.name].items()}
        first = rows[evaluation.seeds(spec)[0]]
        done[spec.name] = RunRows(
            {seed: rows.get(seed, [dict(r) for r in first]) for seed in settings.seeds}
        )
    del lm
    evaluation.guide = (None, None)
    _release()
    return done


def _rehearse(evaluation: Evaluation, ahead: list[Run]) -> Any:
    """Try the judge, and every guide and selector of the runs `ahead`, on one prompt; returns the
    language model. A broken one is found now and not after hours of other runs.

    One guide is in memory at a time. That of the first run comes last: it need not be loaded again.
    """
    settings, prompts = evaluation.settings, evaluation.prompts
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if not is_function(settings.judge):
        judge = _classifier(evaluation, settings.judge)
        judge.score([longest], [{"text": "", "ids": [], "end": None}])
        del judge
        _release()
    lm = models.load_lm(settings, evaluation.tokenizer)
    order = [_loaded_as(spec) for spec in ahead]
    for spec in sorted(ahead, key=lambda spec: -order.index(_loaded_as(spec))):
        if spec.reward_model is not None or spec.select_by is not None:
            _answerer(evaluation, spec, lm).rehearse(longest)
    return lm


def _answerer(evaluation: Evaluation, spec: Run, lm: Any) -> Answerer:
    guide = other_tokenizer = selector = None
    if spec.reward_model is not None:
        guide = _guide(evaluation, spec, lm)
        other_tokenizer = models.reward_tokenizer(spec, evaluation.tokenizer)
    if spec.select_by is not None:
        selector = _classifier(evaluation, spec.select_by)
    length = evaluation.settings.max_new_tokens
    return Answerer(lm, evaluation.tokenizer, spec, length, guide, other_tokenizer, selector)


def _generate(evaluation: Evaluation, spec: Run, lm: Any, files: dict[int, Rows], bar: Any) -> None:
    settings, prompts = evaluation.settings, evaluation.prompts
    answerer = _answerer(evaluation, spec, lm)
    step = max(1, settings.batch_size // spec.best_of)
    for seed, file in files.items():
        # Go on at the start of a batch: tokens may depend on the batch, and must not on a break.
        if len(file.rows) < len(prompts):
            file.cut(len(file.rows) // step * step)
        evaluation.progress.advance(bar, len(file.rows))
        numbers = range(len(file.rows), len(prompts))
        if not numbers:
            continue
        for rows in answerer.batches([prompts[i] for i in numbers], numbers, seed, step):
            file.add(rows)
            evaluation.progress.advance(bar, len(rows))


def _loaded_as(spec: Run) -> tuple[Any, ...]:
    return spec.reward_model, spec.kind, spec.options


def _guide(evaluation: Evaluation, spec: Run, lm: Any) -> Any:
    """The run's guide; a grid's runs share one, so it is loaded and probed once."""
    wanted = _loaded_as(spec)
    if evaluation.guide[0] != wanted:
        evaluation.guide = (None, None)  # free the old guide before loading the next
        _release()
        evaluation.guide = (wanted, models.load_guide(spec, lm, evaluation.settings))
    return evaluation.guide[1]


def judge_all(evaluation: Evaluation, done: dict[str, RunRows]) -> None:
    """Put the judge's `reward` into every row."""
    settings, prompts = evaluation.settings, evaluation.prompts
    seeds = {spec.name: evaluation.seeds(spec) for spec in settings.runs}
    bar = evaluation.progress.add_task(
        "rewards", total=sum(len(s) * len(prompts) for s in seeds.values())
    )
    function = is_function(settings.judge)
    judge: Any = None
    if function:
        judge = FunctionJudge(load_function("judge", settings.judge), settings.judge)
    for spec in settings.runs:
        for seed in seeds[spec.name]:
            rows = done[spec.name].by_seed[seed]
            if function:  # never kept: nothing tells when its code has changed
                for at in range(0, len(rows), _JUDGED_AT_ONCE):
                    _rate(judge, prompts, rows, at)
            else:
                file = evaluation.rows("rewards", spec, seed)
                # Go on at the start of a batch, as above: sums in another one round differently.
                if len(file.rows) < len(rows):
                    file.cut(len(file.rows) // _JUDGED_AT_ONCE * _JUDGED_AT_ONCE)
                for row, kept in zip(rows, file.rows, strict=False):
                    row["reward"] = kept["reward"]
                for at in range(len(file.rows), len(rows), _JUDGED_AT_ONCE):
                    judge = judge or _classifier(evaluation, settings.judge)
                    chosen = _rate(judge, prompts, rows, at)
                    file.add([{"i": row["i"], "reward": row["reward"]} for row in chosen])
            evaluation.progress.advance(bar, len(rows))
        first = done[spec.name].by_seed[seeds[spec.name][0]]
        for seed in settings.seeds[len(seeds[spec.name]) :]:
            for row, same in zip(done[spec.name].by_seed[seed], first, strict=True):
                row["reward"] = same["reward"]
    del judge
    _release()


def _rate(judge: Any, prompts: list[Prompt], rows: list[dict], at: int) -> list[dict]:
    chosen = rows[at : at + _JUDGED_AT_ONCE]
    rewards = judge.score([prompts[row["i"]] for row in chosen], chosen)
    for row, reward in zip(chosen, rewards, strict=True):
        row["reward"] = reward
    return chosen


def compare_all(evaluation: Evaluation, done: dict[str, RunRows]) -> None:
    """Put the wins over the baseline into every other run."""
    settings, prefer = evaluation.settings, evaluation.prefer
    assert settings.win_judge is not None and prefer is not None
    others = [spec for spec in settings.runs if spec.name != settings.baseline]
    total = len(others) * len(evaluation.prompts) * len(settings.seeds)
    bar = evaluation.progress.add_task("win rate", total=total)
    workers = settings.win_judge.workers if settings.win_judge.url else 1
    try:
        for spec in others:
            evaluation.progress.update(bar, description=f"wins: {spec.name}")
            done[spec.name].wins = {
                seed: _compare(evaluation, spec, seed, done, prefer, workers, bar)
                for seed in settings.seeds
            }
    finally:
        if isinstance(prefer, ChatJudge):  # its threads would go on after an error or Ctrl-C
            prefer.close()


def _compare(
    evaluation: Evaluation,
    spec: Run,
    seed: int,
    done: dict[str, RunRows],
    prefer: Prefer,
    workers: int,
    bar: Any,
) -> list[dict[str, Any]]:
    file = evaluation.rows("wins", spec, seed)
    evaluation.progress.advance(bar, len(file.rows))
    ours, base = (done[name].by_seed[seed] for name in (spec.name, evaluation.baseline.name))
    pairs = [
        (evaluation.prompts[a["i"]].source, a["text"], b["text"])
        for a, b in zip(ours, base, strict=True)
    ]
    for found in compare(prefer, pairs[len(file.rows) :], workers):
        file.add([{"i": len(file.rows), **found}])
        evaluation.progress.advance(bar)
    return file.rows


def _classifier(evaluation: Evaluation, name: str) -> Classifier:
    settings = evaluation.settings
    return Classifier(
        models.load_classifier(name, settings),
        models.load_tokenizer(name),
        evaluation.tokenizer,
        settings.batch_size,
    )


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
