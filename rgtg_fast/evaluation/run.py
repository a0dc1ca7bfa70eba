"""`python -m rgtg_fast eval`: answers, rewards, preferences, figures; each kept as it comes."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import models, report
from .answers import Answerer
from .prompts import Prompt, check_lengths, load_prompts
from .scoring import Classifier, FunctionJudge
from .settings import Run, Settings, is_function, load_function, read_settings
from .store import Rows
from .summary import RunRows, jsonable, summarise
from .wins import compare, make_prefer

_JUDGED_AT_ONCE = 64


@dataclass
class Evaluation:
    """What is known before any model is loaded."""

    settings: Settings
    tokenizer: Any
    prompts: list[Prompt]
    folder: Path
    progress: Progress
    guide: tuple[Any, Any] = (None, None)  # what the last guide was loaded for, and it

    def seeds(self, run: Run) -> tuple[int, ...]:
        """The seeds that a run is run with: one where nothing is drawn."""
        return self.settings.seeds if run.do_sample else self.settings.seeds[:1]

    def answers_key(self, run: Run, seed: int) -> dict[str, Any]:
        """What a run's answers depend on."""
        s = self.settings
        own = {k: v for k, v in asdict(run).items() if k != "name"}
        for key in ("reward_model", "select_by"):
            own[key] = own[key] and models.identity(own[key])
        return {
            "model": models.identity(s.model),
            "tokenizer": s.tokenizer and models.identity(s.tokenizer),
            "prompts": models.digest([p.ids for p in self.prompts]),
            "max_new_tokens": s.max_new_tokens,
            "batch_size": s.batch_size,
            "dtype": s.dtype,
            "run": own,
            "seed": seed,
        }

    def rewards_key(self, run: Run, seed: int) -> dict[str, Any]:
        """What the rewards of a run's answers depend on."""
        return {
            "judge": models.identity(self.settings.judge),
            "answers": self.answers_key(run, seed),
        }

    def wins_key(self, run: Run, seed: int) -> dict[str, Any]:
        """What a run's wins over the baseline depend on; there is a `win_judge`."""
        judge: Any = self.settings.win_judge
        asked: Any = {k: getattr(judge, k) for k in ("url", "model", "template", "max_tokens")}
        if judge.function is not None:
            asked = models.identity(judge.function)
        return {
            "judge": asked,
            "answers": self.answers_key(run, seed),
            "baseline": self.answers_key(self.baseline, seed),
        }

    @property
    def baseline(self) -> Run:
        """The run that the others are compared with."""
        return next(run for run in self.settings.runs if run.name == self.settings.baseline)

    def rows(self, kind: str, run: Run, seed: int, key: dict[str, Any]) -> Rows:
        """The file of a run's rows."""
        return Rows(self.folder / "rows", f"{run.name.replace(' ', '_')}.{seed}.{kind}", key)


def run(config: str | os.PathLike[str], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Evaluates as the config file says; returns what it writes to `output_dir`/results.json.

    `output_dir` also gets report.md, texts.jsonl (every answer with its figures), two plots, and
    rows/, from which the same command goes on after a kill. Raises `ValueError` as `read_settings`
    does, for prompts that cannot be used, and for a judge that fails.
    """
    console = Console()
    evaluation = prepare(read_settings(config, overrides), console)
    settings = evaluation.settings
    with evaluation.progress:
        done = generate_all(evaluation)
        judge_all(evaluation, done)
        if settings.win_judge is not None:
            compare_all(evaluation, done)
    results = {
        "settings": jsonable(asdict(settings)),
        "prompts": len(evaluation.prompts),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "runs": summarise(settings, done),
    }
    for spec in settings.runs:
        results["runs"][spec.name]["kl_is"] = "bound" if spec.best_of > 1 else "exact"
    text = report.markdown(settings, results)
    (evaluation.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (evaluation.folder / "report.md").write_text(text, encoding="utf-8")
    write_texts(evaluation, done)
    if settings.plots:
        report.plot(settings, results, evaluation.folder)
    console.print(text.partition("![")[0], highlight=False, markup=False, soft_wrap=True)
    console.print(f"Wrote {evaluation.folder}/", highlight=False)
    return results


def prepare(settings: Settings, console: Console) -> Evaluation:
    """Everything that can be wrong before models are loaded."""
    models.device_of(settings)
    models.check_found("model", settings.model)
    for spec in settings.runs:
        if spec.reward_model is not None:
            models.check_found(f"run {spec.name}: reward_model", spec.reward_model)
            models.check_guide(spec)
        if spec.select_by is not None:
            models.check_found(f"run {spec.name}: select_by", spec.select_by)
            models.check_classifier(f"run {spec.name}: select_by", spec.select_by)
    if is_function(settings.judge):
        load_function("judge", settings.judge)
    else:
        models.check_found("judge", settings.judge)
        models.check_classifier("judge", settings.judge)
    tokenizer = models.load_tokenizer(settings.tokenizer or settings.model)
    prompts = load_prompts(settings.prompts, tokenizer, settings.limit)
    config = transformers.AutoConfig.from_pretrained(settings.model)
    check_lengths(prompts, config, settings.max_new_tokens)
    repeated = len(prompts) - len({p.text for p in prompts})
    if repeated:
        console.print(f"{repeated} of {len(prompts)} prompts repeat another", highlight=False)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), console=console)
    return Evaluation(settings, tokenizer, prompts, Path(settings.output_dir), progress)


def generate_all(evaluation: Evaluation) -> dict[str, RunRows]:
    """The answers of all runs, those that are there already read from their files."""
    settings, n = evaluation.settings, len(evaluation.prompts)
    transformers.utils.logging.disable_progress_bar()  # of weight loading; there is one already
    lm = None
    done = {}
    total = sum(len(evaluation.seeds(spec)) * n for spec in settings.runs)
    bar = evaluation.progress.add_task("answers", total=total)
    for spec in settings.runs:
        files = {
            seed: evaluation.rows("answers", spec, seed, evaluation.answers_key(spec, seed))
            for seed in evaluation.seeds(spec)
        }
        evaluation.progress.update(bar, description=f"answers: {spec.name}")
        if any(len(file.rows) < n for file in files.values()):
            if lm is None:
                lm = models.load_lm(settings, evaluation.tokenizer)
            _generate(evaluation, spec, lm, files, bar)
        else:
            evaluation.progress.advance(bar, n * len(files))
        rows = {seed: [dict(row) for row in file.rows] for seed, file in files.items()}
        first = rows[evaluation.seeds(spec)[0]]
        done[spec.name] = RunRows(
            {seed: rows.get(seed, [dict(r) for r in first]) for seed in settings.seeds}
        )
    del lm
    evaluation.guide = (None, None)
    _release()
    return done


def _generate(evaluation: Evaluation, spec: Run, lm: Any, files: dict[int, Rows], bar: Any) -> None:
    settings, prompts = evaluation.settings, evaluation.prompts
    guide = other_tokenizer = selector = None
    if spec.reward_model is not None:
        guide = _guide(evaluation, spec, lm)
        other_tokenizer = models.reward_tokenizer(spec, evaluation.tokenizer)
    if spec.select_by is not None:
        selector = _classifier(evaluation, spec.select_by)
    answerer = Answerer(
        lm,
        evaluation.tokenizer,
        spec,
        settings.max_new_tokens,
        guide,
        other_tokenizer,
        selector,
    )
    step = max(1, settings.batch_size // spec.best_of)
    for seed, file in files.items():
        if len(file.rows) < len(prompts):  # batches begin where an uninterrupted run's would
            file.cut(len(file.rows) // step * step)
        evaluation.progress.advance(bar, len(file.rows))
        for at in range(len(file.rows), len(prompts), step):
            numbers = range(at, min(at + step, len(prompts)))
            file.add(answerer.batch([prompts[i] for i in numbers], numbers, seed))
            evaluation.progress.advance(bar, len(numbers))


def _guide(evaluation: Evaluation, spec: Run, lm: Any) -> Any:
    """The run's guide; a grid's runs share one, so it is loaded and probed once."""
    wanted = (spec.reward_model, spec.kind)
    if evaluation.guide[0] != wanted:
        evaluation.guide = (None, None)  # first let go of the other one's memory
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
            if function:  # quick, and nothing tells when its code has changed
                for at in range(0, len(rows), _JUDGED_AT_ONCE):
                    _rate(judge, prompts, rows, at)
            else:
                file = evaluation.rows("rewards", spec, seed, evaluation.rewards_key(spec, seed))
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
    settings, prompts = evaluation.settings, evaluation.prompts
    judge = settings.win_judge
    assert judge is not None
    prefer = make_prefer(judge)
    others = [spec for spec in settings.runs if spec.name != settings.baseline]
    bar = evaluation.progress.add_task(
        "win rate", total=len(others) * len(prompts) * len(settings.seeds)
    )
    workers = judge.workers if judge.url else 1
    for spec in others:
        wins = {}
        for seed in settings.seeds:
            file = evaluation.rows("wins", spec, seed, evaluation.wins_key(spec, seed))
            evaluation.progress.update(
                bar, advance=len(file.rows), description=f"wins: {spec.name}"
            )
            pairs = [
                (prompts[a["i"]].source, a["text"], b["text"])
                for a, b in zip(
                    done[spec.name].by_seed[seed],
                    done[settings.baseline].by_seed[seed],
                    strict=True,
                )
            ]
            for found in compare(prefer, pairs[len(file.rows) :], workers):
                file.add([found])
                evaluation.progress.advance(bar)
            wins[seed] = file.rows
        done[spec.name].wins = wins


def write_texts(evaluation: Evaluation, done: dict[str, RunRows]) -> None:
    """texts.jsonl: a line for every prompt and seed with the answers of all runs."""
    with (evaluation.folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(evaluation.prompts):
            for seed in evaluation.settings.seeds:
                answers = {}
                for name, rows in done.items():
                    row = {k: v for k, v in rows.by_seed[seed][i].items() if k not in ("i", "ids")}
                    if rows.wins is not None:
                        row["win"] = rows.wins[seed][i]["win"]
                    answers[name] = row
                line = {"prompt": prompt.source, "seed": seed, "answers": answers}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


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
