"""The engine "hf": transformers' models through `rgtg_fast.generate_many`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
import transformers

from .. import ops
from ..evaluation import models
from ..evaluation.prompts import is_conversation, prompt_of
from ..evaluation.rewards import Loaded, guiding_options, per_token
from ..generate_many import generate_many
from ..output import Answer
from . import JobFailed
from .memory import within_memory
from .rows import Row
from .settings import Job

logger = logging.getLogger(__name__)
_DTYPES = {"beta": torch.float32, "temperature": torch.float32}
_DTYPES |= {"max_new_tokens": torch.int64, "seed": torch.int64}


def answers(job: Job, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """An answer to each row, in the order they end: `id`, `text`, `tokens`, `reward`, `kl`, or `id`
    and `error`. The models are loaded at once."""
    check_conversations(job, rows)
    return Engine(job).answers(rows)


def check_conversations(job: Job, rows: Sequence[Row]) -> None:
    """A conversation needs a template: said of the first one, and not in an answer to each."""
    first = next((row for row in rows if is_conversation(row.prompt)), None)
    if first is not None:
        tokenizer = models.load_tokenizer(job.tokenizer or job.model)
        if not getattr(tokenizer, "chat_template", None):
            prompt_of(first.prompt, tokenizer, f"line {first.line}")


def row_seeds(job: Job, rows: Sequence[Row]) -> list[int]:
    """The row seed of each: of the job's, by its place in the whole file. A row's own seed gives
    what `generate(seed=...)` gives for it."""
    of_job = ops.split_seed(job.seed, max(row.index for row in rows) + 1).tolist()
    return [
        int(ops.split_seed(row.options["seed"], 1)[0])
        if "seed" in row.options
        else of_job[row.index]
        for row in rows
    ]


def answer_of(
    row: Row, text: str | None, tokens: list[int], reward: float | None, kl: float
) -> dict[str, Any]:
    """An answer as the output has it; JSON has no word for what is not finite."""
    values = {"reward": reward, "kl": kl}
    plain = {n: v if v is not None and math.isfinite(v) else None for n, v in values.items()}
    return {"id": row.id, "text": text, "tokens": tokens, **plain}


class Engine:
    """The models of a job, loaded."""

    def __init__(self, job: Job) -> None:
        transformers.utils.logging.disable_progress_bar()  # of loading: it would break up ours
        self.job, self.tokenizer = job, models.load_tokenizer(job.tokenizer or job.model)
        self.lm = models.load_model("CausalLM", job.model, job.dtype, job.device, job.device_map)
        place = (job.reward_device, None) if job.reward_device else (job.device, job.device_map)
        loaded = Loaded(self.lm, self.tokenizer, job.dtype, *place)
        self.options = guiding_options(job.reward_model, job.preset, job.options, loaded)
        self.per_token = per_token(job.reward_model, self.options)
        samples = self.options.get("do_sample", self.lm.generation_config.do_sample)
        how = f"sampled, seed {job.seed}" if samples else "greedy"
        logger.info("%s, %s", self.lm.device, how)

    def answers(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """An answer to each row, in the order they end."""
        return within_memory(self.run, rows, self.job.batch_size)

    def run(self, rows: Sequence[Row], batch_size: int) -> Iterator[tuple[Row, dict[str, Any]]]:
        errors: dict[int, str] = {}
        many = generate_many(
            self.lm,
            self._prompts(rows, errors),
            tokenizer=self.tokenizer,
            batch_size=batch_size,
            **self.options | self._of_rows(rows),
        )
        with closing(many):  # type: ignore[type-var]
            try:
                for got in many:
                    row = rows[got.index]
                    got.error = errors.pop(got.index, got.error)
                    yield row, self._answer(row, got)
            except ValueError as error:  # what is wrong with a prompt is in its answer
                raise JobFailed(str(error)) from error

    def _prompts(self, rows: Sequence[Row], errors: dict[int, str]) -> Iterator[list[int]]:
        """Token ids of each prompt; none, with the reason in `errors`, where it cannot be used."""
        for i, row in enumerate(rows):
            try:
                yield prompt_of(row.prompt, self.tokenizer, f"line {row.line}").ids
            except ValueError as error:
                errors[i] = str(error)
                yield []

    def _of_rows(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The options that rows have of their own, as tensors [N]: all rows then have a value."""
        seeds = torch.tensor(row_seeds(self.job, rows), dtype=torch.int64, device="cpu")
        found: dict[str, Any] = {"seed": seeds}
        usual = {"beta": 1.0, "temperature": self.lm.generation_config.temperature or 1.0}
        for name in ("beta", "temperature", "max_new_tokens"):
            if any(name in row.options for row in rows):
                of_others = self.options.get(name, usual.get(name))
                values = [row.options.get(name, of_others) for row in rows]
                found[name] = torch.tensor(values, dtype=_DTYPES[name], device="cpu")
        return found

    def _answer(self, row: Row, got: Answer) -> dict[str, Any]:
        if got.error is not None:
            return {"id": row.id, "error": got.error}
        reward = None
        if self.per_token is not None:
            reward = math.fsum(got.rewards) if self.per_token else got.rewards[-1]
        return answer_of(row, got.text, got.tokens, reward, math.fsum(got.kl))
