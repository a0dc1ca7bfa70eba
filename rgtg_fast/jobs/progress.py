"""How far a job is: on a terminal a bar with tokens/s and time left, else a line now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)
_LINE_EVERY = 30.0  # seconds


class Pace:
    """Answers and their tokens, of this process alone: what was kept from before took no time."""

    def __init__(self, kept: int, total: int) -> None:
        self.kept, self.total = kept, total
        self.answers = self.tokens = self.errors = 0
        self.bar: Progress | None = None
        self.begin()

    def begin(self) -> None:
        """Time counts from here."""
        self.began = self.said = time.monotonic()

    def count(self, tokens: int | None) -> None:
        """One more answer; None: an error."""
        self.answers += 1
        self.tokens += tokens or 0
        self.errors += tokens is None
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=1, rate=f"{self.rate:,.0f} tokens/s")
        elif time.monotonic() - self.said > _LINE_EVERY:
            self.said = time.monotonic()
            left = (self.total - self.kept - self.answers) * self.seconds / self.answers
            logger.info("%s, about %s left", self, time.strftime("%H:%M:%S", time.gmtime(left)))

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.began, 1e-9)

    @property
    def rate(self) -> float:
        """Tokens of answers that have ended, per second."""
        return self.tokens / self.seconds

    def __str__(self) -> str:
        rate = f", {self.rate:,.0f} tokens/s" if self.answers else ""
        return f"{self.kept + self.answers} of {self.total} answers{rate}"


@contextmanager
def shown(pace: Pace) -> Iterator[None]:
    """Shows the pace, where standard error is a terminal as a bar."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    times = TimeElapsedColumn(), TimeRemainingColumn()
    # Standard output may be where the answers go.
    with Progress(*columns, *times, console=console, redirect_stdout=False) as pace.bar:
        pace.bar.add_task("answers", total=pace.total, completed=pace.kept, rate="")
        yield
