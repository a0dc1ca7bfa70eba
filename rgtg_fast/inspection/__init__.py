"""Seeing why a token was chosen: `rgtg_fast.inspect(output, tokenizer)`.

`texts` reads outputs into tokens with their rewards, KL and candidates, `terminal` shows them on a
terminal, `page` (with page.css and page.js) as one HTML file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from ..output import RewardGuidedOutput
from . import page, terminal
from .texts import Text, read_outputs


@dataclass(frozen=True)
class Inspection:
    """Guided texts, token by token: `texts[i][name]` is the answer of `name` to prompt i.

    Printed by rich (`rich.print(inspection)`), or by `show`, it is the texts in colour;
    `candidates` is one step, `to_html` a page of all of it.
    """

    texts: list[dict[str, Text]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from terminal.texts(self.texts)

    def show(self, console: Console | None = None) -> None:
        """The texts on a terminal: each token's colour is its reward above what the base would
        have got on average (blue) or below (orange), underlined where KL is large."""
        (console or Console()).print(self)

    def candidates(self, at: int, prompt: int = 0, name: str | None = None) -> Any:
        """The candidates of one step as a `rich.table.Table`: token `at` (from 0) of the answer of
        `name` (default: the first) to prompt `prompt`.

        Raises `ValueError` where there is no such token, and where the output has no candidates.
        """
        if not 0 <= prompt < len(self.texts):
            raise ValueError(f"prompt={prompt}; there are {len(self.texts)}, the first is 0")
        answers = self.texts[prompt]
        name = next(iter(answers)) if name is None else name
        if name not in answers:
            raise ValueError(f"name={name!r}; pass one of {', '.join(answers)}")
        tokens = answers[name].tokens
        if not 0 <= at < len(tokens):
            raise ValueError(f"at={at}; the answer has {len(tokens)} tokens, the first is 0")
        if not tokens[at].candidates:
            raise ValueError(
                "the output has no candidates; call generate with return_dict_in_generate=True and "
                "output_candidates=True"
            )
        return terminal.candidates(tokens[at], at)

    def to_html(self, path: Any) -> Path:
        """Writes one page that needs nothing else: a token under the pointer, or chosen with the
        arrow keys, shows its candidates. Without JavaScript the coloured texts can be read."""
        place = Path(path)
        place.write_text(page.html(self.texts), encoding="utf-8")
        return place


def inspect(
    output: Any,
    tokenizer: Any,
    *,
    beta: float | Mapping[str, float] | None = None,
    temperature: float = 1.0,
    do_sample: bool = True,
) -> Inspection:
    """What the reward did to a text, token by token.

    Args:
        output: a `RewardGuidedOutput` of `generate` (with `return_dict_in_generate=True`, and
            `output_candidates=True` for the candidates), an `Answer` of `generate_many`, a list of
            these, or a mapping of names to any of them, to be shown side by side: as many prompts
            in each.
        tokenizer: of the language model.
        beta, temperature, do_sample: those of the call: with `beta`, or a mapping of the same names
            to those, candidates show the probability that the ratio policy gave them. (Where the
            output has a beta of its own for each step, that counts.)

    Raises `ValueError` for what is no such output, other numbers of prompts, and no tokens.
    """
    several = isinstance(output, Mapping) and not isinstance(output, RewardGuidedOutput)
    outputs = output if several else {"answer": output}
    return Inspection(read_outputs(outputs, tokenizer, beta, temperature, do_sample))


__all__ = ["Inspection", "Text", "inspect"]
