"""Answers of the guided policy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .. import ops
from ..evaluation.prompts import Prompt
from ..generate_many import generate_many


def sampled(
    lm: Any,
    tokenizer: Any,
    guide: Any,
    prompts: Sequence[Prompt],
    seed: int,
    batch_size: int,
    options: dict[str, Any],
    per_token: bool,
    done: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Answers to the prompts (one each; a prompt may stand there several times), of which `done`
    are there already, `at_once(batch_size)` at a time. `per_token`: the guide's reward of an answer
    is the sum over its tokens.

    `done` must be such a number of whole runs: tokens may depend, by rounding, on the rows beside
    them, and must not on where an earlier process was killed.

    Raises `ValueError` for a prompt that cannot be answered.
    """
    size = at_once(batch_size)
    seeds = ops.split_seed(seed, len(prompts))
    for first in range(done, len(prompts), size):
        part = prompts[first : first + size]
        rows: list[dict[str, Any]] = [{} for _ in part]
        for got in generate_many(
            lm,
            [prompt.ids for prompt in part],
            reward_model=guide,
            batch_size=batch_size,
            tokenizer=tokenizer,
            seed=seeds[first : first + size],
            do_sample=True,
            **options,
        ):
            if got.error is not None:
                raise ValueError(f"prompt {part[got.index].text[:60]!r}: {got.error}")
            rows[got.index] = _row(first + got.index, got, lm, per_token)
        yield rows


def at_once(batch_size: int) -> int:
    """How many answers are written together; the batch runs empty for it."""
    return 16 * batch_size


def _row(number: int, got: Any, lm: Any, per_token: bool) -> dict[str, Any]:
    """An answer as `store.KINDS["answers"]` has it; figures that are not finite are null."""
    eos = lm.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    ended = bool(got.tokens) and got.tokens[-1] in ends
    sums = {
        "kl": math.fsum(got.kl),
        "log_ratio": math.fsum(got.log_ratio),
        "proxy": math.fsum(got.rewards) if per_token else got.rewards[-1],
    }
    return {
        "i": number,
        "text": got.text,
        "ids": got.tokens[:-1] if ended else got.tokens,
        "end": got.tokens[-1] if ended else None,
        "logp": math.fsum(got.logprobs),
        **{name: value if math.isfinite(value) else None for name, value in sums.items()},
    }
