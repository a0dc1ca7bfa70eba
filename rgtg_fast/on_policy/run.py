"""Rounds of sampling from the guided policy, labelling, and training on what it meets."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from .. import ops
from ..evaluation.prompts import Prompt
from ..evaluation.store import Rows, write_whole
from ..scorers import registry
from ..training.config_file import read_overrides, read_yaml
from ..training.output_folder import FIGURES, last_checkpoint, locked, write_figures
from ..training.run import train_as
from .pairs import hand_pairs, labelled_rows, right_share, scored_pairs
from .prepare import (
    Rounds,
    first_guide,
    load_guide,
    load_judge,
    load_lm,
    prepare,
    release,
    sampling_options,
    take_folder,
)
from .samples import at_once, sampled

_OWN = "own_pairs.jsonl"  # of a round's answers alone


def train_on_policy(
    config: str | os.PathLike[str] | Mapping[str, Any], overrides: list[str] | None = None
) -> dict[str, Any]:
    """Refine a reward model on the prefixes that the policy it guides meets (see
    `rgtg_fast.on_policy`), as the training config with its mapping `on_policy` says.

    `config` is a YAML file, with `key=value` overrides, or a mapping, where `judge` may be a
    callable. Returns what it writes to `output_dir`/metrics.json: `rounds`, a dict for each, and
    `model`, the folder of the last reward model. Where labels by hand are missing nothing is
    written there, and `to_label` is the file that waits for them.

    The same call goes on where an earlier one was stopped, killed or waits for labels.

    Raises `ValueError` for bad input, before anything is trained, and for an `output_dir` of
    another run; as `rgtg_fast.training.run.train` later.
    """
    values = dict(config) if isinstance(config, Mapping) else read_yaml(config)
    values |= read_overrides(overrides or ())
    rounds = prepare(values)
    with locked(rounds.folder):
        take_folder(rounds)
        return _run(rounds)


def _run(rounds: Rounds) -> dict[str, Any]:
    transformers.utils.logging.disable_progress_bar()  # of weight loading
    held_out = None
    if rounds.held_out is not None:
        held_out = _write_rows(rounds.folder / "held_out.jsonl", rounds.held_out.rows)
    guide = first_guide(rounds)
    if guide is None:
        assert rounds.original is not None
        folder = rounds.round_folder(0)
        pairs = _write_rows(folder / "pairs.jsonl", rounds.original.rows)
        _train(
            rounds, folder, pairs, held_out, "Round 0, on the given pairs, before any of its own."
        )
        guide = str(folder)
    done: list[dict[str, Any]] = []
    for number in range(1, rounds.own.rounds + 1):
        figures = _round(rounds, number, guide, held_out, done)
        if "to_label" in figures:
            return _waiting(rounds, number, done, guide, figures["to_label"])
        done.append(figures)
        guide = figures["model"]
    metrics = {"rounds": done, "model": guide}
    write_figures(rounds.folder, metrics)
    _print_summary(done, guide)
    return metrics


def _round(
    rounds: Rounds, number: int, guide: str, held_out: str | None, done: list[dict[str, Any]]
) -> dict[str, Any]:
    """One round; where it waits for labels only the file's path, `to_label`."""
    own, folder = rounds.own, rounds.round_folder(number)
    folder.mkdir(exist_ok=True)
    prompts = _prompts_of(rounds, number)
    answers = _answers(rounds, number, guide, prompts)
    figures: dict[str, Any] = {"round": number, "guide": guide, "answers": len(answers)}
    figures["kl"] = _mean([row["kl"] for row in answers])
    if own.by_hand:
        path = folder / "to_label.jsonl"
        # Labels that were taken stay: training may have begun on them.
        rows = _read_rows(folder / _OWN) or hand_pairs(path, prompts, answers, own.samples)
        if rows is None:
            return {"to_label": str(path)}
    else:
        scores = _scores(rounds, number, prompts, answers)
        figures["score"] = _mean(scores)
        figures["guide_accuracy"] = right_share(answers, scores, own.samples)
        rows = _rows(rounds, number, prompts, answers, scores)
    if not rows:
        raise ValueError(
            f"round {number} gives no pair: the answers to every prompt are equal, or all alike to "
            "the judge; pass more samples or prompts, a smaller beta, or another judge"
        )
    _write_rows(folder / _OWN, rows)
    given = _mixed_in(rounds)
    earlier = [
        row for before in range(1, number) for row in _read_rows(rounds.round_folder(before) / _OWN)
    ]
    pairs = _write_rows(folder / "pairs.jsonl", [*given, *earlier, *rows])
    figures |= {"own": len(rows), "earlier": len(earlier), "given": len(given)}
    note = (
        f"Round {number} of on-policy refinement (arXiv 2403.19279, labels by "
        f"{'hand' if own.by_hand else 'a judge'}): trained on {len(earlier) + len(rows)} rows of "
        f"answers that `{own.lm}` gave while the reward model of the round before guided it, and "
        f"{len(given)} of those given."
    )
    trained = _train(rounds, folder, pairs, held_out, note)
    return figures | {"model": str(folder)} | {n: trained[n] for n in ("eval",) if n in trained}


def _prompts_of(rounds: Rounds, number: int) -> list[Prompt]:
    """The prompts of a round: the next ones of an order drawn by the seed, again and again."""
    count = rounds.own.prompts_per_round
    if count is None:
        return rounds.prompts
    order = list(range(len(rounds.prompts)))
    random.Random(rounds.args.seed).shuffle(order)
    count = min(count, len(order))
    return [
        rounds.prompts[order[i % len(order)]] for i in range((number - 1) * count, number * count)
    ]


def _seed(rounds: Rounds, number: int) -> int:
    return int(ops.split_seed(rounds.args.seed, number + 1)[number])


def _answers(
    rounds: Rounds, number: int, guide: str, prompts: list[Prompt]
) -> list[dict[str, Any]]:
    own = rounds.own
    repeated = [prompt for prompt in prompts for _ in range(own.samples)]
    file = _rows_file(rounds, number, "answers", len(repeated))
    if len(file.rows) == len(repeated):
        return file.rows
    print(f"round {number}: {len(repeated)} answers, guided by {guide}", flush=True)
    file.cut(len(file.rows) // at_once(own.batch_size) * at_once(own.batch_size))
    lm = load_lm(rounds)
    for rows in sampled(
        lm,
        rounds.tokenizer,
        load_guide(rounds, guide, lm),
        repeated,
        _seed(rounds, number),
        own.batch_size,
        sampling_options(rounds),
        registry.KINDS[rounds.kind].per_token,
        len(file.rows),
    ):
        file.add(rows)
    del lm
    release()
    return file.rows


def _scores(
    rounds: Rounds, number: int, prompts: list[Prompt], answers: list[dict[str, Any]]
) -> list[float]:
    size = rounds.own.batch_size
    repeated = [prompt for prompt in prompts for _ in range(rounds.own.samples)]
    file = _rows_file(rounds, number, "rewards", len(answers))
    if len(file.rows) < len(answers):
        # Whole batches again: a sum in another batch rounds differently.
        file.cut(len(file.rows) // size * size)
        judge = load_judge(rounds)
        for first in range(len(file.rows), len(answers), size):
            batch = slice(first, first + size)
            rewards = judge.score(repeated[batch], answers[batch])
            file.add([{"i": first + n, "reward": reward} for n, reward in enumerate(rewards)])
        del judge
        release()
    return [row["reward"] for row in file.rows]


def _rows_file(rounds: Rounds, number: int, kind: str, total: int) -> Rows:
    return Rows(rounds.round_folder(number), f"round-{number}", kind, {"round": number}, total)


def _rows(
    rounds: Rounds,
    number: int,
    prompts: list[Prompt],
    answers: list[dict[str, Any]],
    scores: list[float],
) -> list[dict[str, Any]]:
    own = rounds.own
    if rounds.labelled:
        outside = [value for value in scores if not 0 <= value <= 1]
        if outside:
            raise ValueError(
                f"the judge gave {outside[0]}, and loss_type={rounds.args.loss_type!r} wants "
                "labels in [0, 1]; pass a judge of such scores, or a loss_type of pairs"
            )
        return labelled_rows(prompts, answers, scores, own.samples)
    seed = _seed(rounds, number)
    return scored_pairs(prompts, answers, scores, own.samples, own.pairs, own.draw, seed)


def _mixed_in(rounds: Rounds) -> list[dict[str, Any]]:
    if rounds.original is None:
        return []
    rows = rounds.original.rows
    return random.Random(rounds.args.seed).sample(rows, round(rounds.own.mix * len(rows)))


def _train(
    rounds: Rounds, folder: Path, pairs: str, held_out: str | None, note: str
) -> dict[str, Any]:
    """Trains into `folder`, or goes on there; the figures of a finished run as they stand."""
    figures = folder / FIGURES
    if not figures.exists():
        resume = not rounds.settings.frozen and last_checkpoint(folder) is not None
        held_out = held_out or rounds.settings.eval
        settings = replace(
            rounds.settings,
            train=pairs,
            eval=held_out,
            hold_out=0,
            resume=resume,
            overwrite=not resume,  # what a kill has left before the first checkpoint
            args=({"leaks": "drop"} if held_out else {})
            | rounds.settings.args
            | {"output_dir": str(folder)},
        )
        train_as(settings, note, rounds.own.lm)
        release()
    return json.loads(figures.read_text(encoding="utf-8"))


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    write_whole(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return str(path)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _waiting(
    rounds: Rounds, number: int, done: list[dict[str, Any]], guide: str, path: str
) -> dict[str, Any]:
    print(
        f"round {number} waits for labels: in {path}, set better to a, b or tie in every line, and "
        "give the same command again",
        flush=True,
    )
    return {"rounds": done, "model": guide, "to_label": path}


def _print_summary(done: list[dict[str, Any]], model: str) -> None:
    names = {
        "round": "round",
        "answers": "answers",
        "kl": "KL (nats)",
        "score": "judge's mean score",
        "guide_accuracy": "pairs the guide orders right",
        "own": "new rows",
    }
    table = Table(*names.values(), title="On-policy rounds", title_justify="left")
    for figures in done:
        cells = [figures.get(name) for name in names]
        table.add_row(*(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells))
    Console().print(table)
    print(f"the reward model is {model}", flush=True)
