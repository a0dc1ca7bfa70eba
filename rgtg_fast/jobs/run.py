"""`rgtg-fast generate`: from a job to its output file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

from ..evaluation import models
from ..evaluation.rewards import identities
from . import hf, inspected, ray_data, vllm_offline
from .output import Output, Stream, opened
from .progress import Pace, shown
from .report import read_answers, write_report
from .rows import Row, read_rows
from .settings import Job, check_settings, known_options

logger = logging.getLogger(__name__)
Engine = Callable[[Job, Sequence[Row]], Iterator[dict[str, Any]]]
# Rows in, answers out, in any order: {"id", "text", "tokens", "reward", "kl"} or {"id", "error"}.
ENGINES: dict[str, Engine] = {
    "hf": hf.answers,
    "vllm": vllm_offline.answers,
    "ray": ray_data.answers,
}


def run_job(values: dict[str, Any]) -> Pace:
    """Answer the prompts of the job that `values` describe (see `settings.Job`): how many there
    were, and tokens per second.

    An output file that has answers of the same job already gets those that it lacks.

    Raises `ValueError`, before a model is loaded, for a job or an input that cannot be used and an
    output that belongs to another job or process; `JobFailed` and `torch.OutOfMemoryError` later;
    `OSError` where the disk is full; `KeyboardInterrupt`, saying how to go on.
    """
    job = check_settings(values, tuple(ENGINES))
    rows, unused = read_rows(job.input, {*known_options(), "reward_model", "preset"})
    if unused:
        logger.info("fields of rows that are not used: %s", ", ".join(sorted(unused)))
    (i, n), total = job.shard, len(rows)
    key = _key(job, rows)
    rows = rows[i::n]
    ids = {row.id for row in rows}
    path = job.path
    place: AbstractContextManager[Output] = nullcontext(Stream())
    if path is not None:
        place = opened(path, key, ids, job.overwrite)
    with place as output:
        left = [row for row in rows if row.id not in output.done]
        pace = Pace(len(output.done), len(rows))
        logger.info("%d prompts%s, %d answered already", total, _of_shard(job), pace.kept)
        try:
            _answer(job, left, output, pace)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped(pace, path)) from None
    where = "standard output" if path is None else path
    logger.info("%s, %d with an error, in %s", pace, pace.errors, where)
    if job.report is not None and path is not None:
        folder = Path(job.report) / (path.stem if n > 1 else "")
        write_report(read_answers(path), folder)
        logger.info("report in %s", folder)
    if job.inspect is not None:
        page = inspected.write_page(job, rows)
        logger.info("no answer to inspect" if page is None else f"the first answers in {page}")
    return pace


def _answer(job: Job, rows: Sequence[Row], output: Output, pace: Pace) -> None:
    if not rows:
        return
    answers = ENGINES[job.engine](job, rows)
    pace.begin()
    with shown(pace), closing(answers):  # type: ignore[type-var]
        for answer in answers:
            output.add(answer)
            pace.count(len(answer["tokens"]) if "tokens" in answer else None)


def _key(job: Job, rows: Sequence[Row]) -> dict[str, Any]:
    """What the answers depend on; the batch is not of it, nor where they are computed."""
    return {
        "model": models.identity(job.model),
        "tokenizer": job.tokenizer and models.identity(job.tokenizer),
        "reward_model": identities(job.reward_model),
        "preset": job.preset,
        "seed": job.seed,
        "dtype": job.dtype,
        "input": [models.digest([[row.id, row.prompt, row.options] for row in rows]), len(rows)],
        "shard": "/".join(map(str, job.shard)),
        **job.options,
    }


def _of_shard(job: Job) -> str:
    return "" if job.shard[1] == 1 else f", of which shard {job.shard[0]}/{job.shard[1]}"


def _stopped(pace: Pace, path: Path | None) -> str:
    done = pace.kept + pace.answers
    if path is None:
        return f"stopped after {done} of {pace.total} answers; standard output is not gone on with"
    return (
        f"stopped. {done} of {pace.total} answers are in {path}; the same command (without "
        "--overwrite) goes on"
    )
