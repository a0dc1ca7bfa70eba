"""Texts and candidates on a terminal, by rich."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import text as rich_text
from rich.table import Table

from .colours import BACKGROUNDS, kl_class, scale, step_of
from .texts import Text, Token


def texts(rows: Sequence[Mapping[str, Text]]) -> Iterator[Any]:
    """Each prompt, and under it its answers."""
    largest = scale(rows)
    for row in rows:
        prompt = next(iter(row.values())).prompt
        if prompt:
            yield rich_text.Text(prompt, style="bold")
        for name, answer in row.items():
            yield rich_text.Text.assemble((f"{name} ", "cyan"), _coloured(answer, largest))
            yield rich_text.Text(
                f"reward {_number(answer.reward)}, KL {answer.kl:.2f} nats, "
                f"{len(answer.tokens)} tokens",
                style="dim",
            )


def _coloured(answer: Text, largest: float) -> rich_text.Text:
    made = rich_text.Text()
    for token in answer.tokens:
        step = step_of(token.gain, largest)
        style = f"black on {BACKGROUNDS[step]}" if step else ""
        if kl_class(token.kl) >= 2:
            style += " underline"
        made.append(token.text, style=style.strip() or None)
    return made


def candidates(token: Token, at: int) -> Table:
    """The candidates of a step, the likeliest first; the one that was taken is marked."""
    title = f"token {at} {token.text!r}: reward {_number(token.reward)}, KL {_number(token.kl)}"
    table = Table(title=title, title_justify="left")
    for heading in ("", "candidate", "log π", "reward", "q"):
        table.add_column(heading, justify="left" if heading in ("", "candidate") else "right")
    for each in token.candidates:
        taken = each.id == token.id
        q = "" if math.isnan(each.q) else f"{each.q:.3f}"
        cells = repr(each.text), _number(each.logprob), _number(each.reward), q
        table.add_row("▶" if taken else "", *cells, style="bold" if taken else None)
    return table


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.3f}"
