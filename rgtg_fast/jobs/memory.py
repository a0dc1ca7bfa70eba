"""Out of memory is no end: the batch is halved, and what has no answer yet goes on."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

from .rows import Row

logger = logging.getLogger(__name__)
_AT_MOST = 3  # rows one after the other that do not fit alone: then it is not the rows
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")

Run = Callable[[Sequence[Row], int], Iterator[tuple[Row, dict[str, Any]]]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the host ran out: torch's CPU allocator raises a plain `RuntimeError`."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _WORDS)


def within_memory(run: Run, rows: Sequence[Row], batch_size: int) -> Iterator[dict[str, Any]]:
    """The answers of `run(rows, batch_size)`, which are given with their rows.

    Where it runs out of memory, it is called again for the rows without answer, with half the
    batch. A row that does not fit alone gets an answer with `error`, and the next ones the whole
    batch again. Raises `torch.OutOfMemoryError` where three in a row do not fit.
    """
    left = {row.index: row for row in rows}
    alone: list[Row] = []
    size = batch_size
    while left:
        try:
            with closing(run(list(left.values()), size)) as answers:  # type: ignore[type-var]
                for row, answer in answers:
                    yield from map(_does_not_fit, alone)
                    alone.clear()
                    del left[row.index]
                    yield answer
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).split("\n")[0]
        # Behind the except: the exception's frames would keep what is to be freed.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size > 1:
            size //= 2
            logger.warning("out of memory (%s): going on with batch_size=%d", said, size)
            continue
        row = next(iter(left.values()))
        alone.append(left.pop(row.index))
        if len(alone) == _AT_MOST:
            lines = ", ".join(str(one.line) for one in alone)
            raise torch.OutOfMemoryError(
                f"out of memory for each of lines {lines} by itself ({said}); pass smaller models, "
                "another dtype, or max_new_tokens"
            )
        logger.warning("out of memory (%s) for line %d by itself: it gets an error", said, row.line)
        size = batch_size
    yield from map(_does_not_fit, alone)


def _does_not_fit(row: Row) -> dict[str, Any]:
    why = f"line {row.line}: out of memory, even by itself; pass a shorter prompt or max_new_tokens"
    return {"id": row.id, "error": why}
