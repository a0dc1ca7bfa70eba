"""The page of `rgtg-fast generate --inspect`: the first answers again, with their candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..evaluation.prompts import prompt_of
from ..generate import generate
from ..inspection import Inspection, Text, inspect
from . import hf
from .rows import Row
from .settings import Job

ROWS = 8


def write_page(job: Job, rows: Sequence[Row]) -> Path | None:
    """Writes `job.inspect`, of the first `ROWS` rows that have an answer; None where none has.

    The tokens are those of the job, as a row's seed is its own; only their candidates are new.
    """
    engine = hf.Engine(job)
    seeds = hf.row_seeds(job, rows)
    texts: list[dict[str, Text]] = []
    for row, seed in zip(rows, seeds, strict=True):
        if len(texts) == ROWS:
            break
        try:
            ids = prompt_of(row.prompt, engine.tokenizer, f"line {row.line}").ids
            own = engine.options | {n: v for n, v in row.options.items() if n != "seed"}
            output = generate(
                engine.lm,
                torch.tensor([ids], device=engine.lm.device),
                tokenizer=engine.tokenizer,
                return_dict_in_generate=True,
                output_candidates=own.get("k", 0) is not None,
                **own | {"seed": torch.tensor([seed], device=engine.lm.device)},
            )
        except ValueError:  # its line has the error
            continue
        config = engine.lm.generation_config
        drawn = own.get("do_sample", config.do_sample)
        temperature = own.get("temperature") or config.temperature or 1.0
        seen = inspect(
            output,
            engine.tokenizer,
            beta=own.get("beta", 1.0),
            temperature=temperature,
            do_sample=bool(drawn),
        )
        texts += [{str(row.id): text} for answers in seen.texts for text in answers.values()]
    return Inspection(texts).to_html(job.inspect) if texts and job.inspect else None
