"""The texts as one HTML page, with its style and script in it."""

from __future__ import annotations

import html as markup
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .colours import BACKGROUNDS, kl_class, scale, step_of
from .texts import Text, Token

_HERE = Path(__file__).parent
_BLOCK = 200  # tokens that a browser lays out, or leaves out, at a time, and up to three times that


def html(rows: Sequence[Mapping[str, Text]]) -> str:
    """The page; nothing in it is fetched."""
    largest = scale(rows)
    colours = "\n".join(
        f".g{step} {{ background: {colour}; color: #000 }}"
        for step, colour in BACKGROUNDS.items()
        if colour
    )
    body = "\n".join(_section(i, row, largest) for i, row in enumerate(rows))
    data = json.dumps(
        [[_data(text) for text in row.values()] for row in rows], separators=(",", ":")
    )
    # "</script>" in a token would end the script.
    data = data.replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rgtg_fast: guided texts</title>
<style>
{(_HERE / "page.css").read_text(encoding="utf-8")}
{colours}
</style>
</head>
<body>
<header>
<h1>Guided texts</h1>
<p>{_legend(largest)}</p>
<p class="keys" hidden>Point at a token, or choose a text and move with the arrow keys.</p>
</header>
<main>
{body}
</main>
<aside id="panel" aria-live="polite" hidden></aside>
<script type="application/json" id="data">{data}</script>
<script>
{(_HERE / "page.js").read_text(encoding="utf-8")}
</script>
</body>
</html>
"""


def _legend(largest: float) -> str:
    labels = {-4: f"−{largest:.2g}", -2: "", 0: "0", 2: "", 4: f"+{largest:.2g}"}
    steps = "".join(
        f'<span class="g{step}">&nbsp;{label}&nbsp;</span>' for step, label in labels.items()
    )
    return (
        f"Colour: the reward above or below the mean of the base's candidates, {steps}. "
        'Line under a token: its KL from the base, <span class="k1">0.1</span> '
        '<span class="k2">0.5</span> <span class="k3">2</span> nats and more.'
    )


def _section(number: int, row: Mapping[str, Text], largest: float) -> str:
    prompt = next(iter(row.values())).prompt
    said = f"<h2>{markup.escape(prompt)}</h2>\n" if prompt else ""
    answers = "\n".join(
        _answer(number, column, name, text, largest)
        for column, (name, text) in enumerate(row.items())
    )
    return f'<section>\n{said}<div class="answers">\n{answers}\n</div>\n</section>'


def _answer(row: int, column: int, name: str, text: Text, largest: float) -> str:
    figures = f"reward {_number(text.reward)} · KL {text.kl:.2f} nats · {len(text.tokens)} tokens"
    blocks = "".join(
        f'<div class="block">{"".join(_token(t, largest) for t in block)}</div>'
        for block in _blocks(text.tokens)
    )
    label = markup.escape(name, quote=True)
    return (
        f'<article><h3>{label} <small>{figures}</small></h3>\n<div class="text" tabindex="0" '
        f'role="group" aria-label="{label}" data-at="{row},{column}">{blocks}</div></article>'
    )


def _blocks(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """Parts that begin on a line of their own: where the text does, if it does soon enough."""
    begin = 0
    for end, token in enumerate(tokens, 1):
        long = end - begin
        if ("\n" in token.text and long >= _BLOCK) or long >= 3 * _BLOCK or end == len(tokens):
            yield tokens[begin:end]
            begin = end


def _token(token: Token, largest: float) -> str:
    step, kl = step_of(token.gain, largest), kl_class(token.kl)
    names = " ".join([f"g{step}"] * bool(step) + [f"k{kl}"] * bool(kl))
    shown = f' class="{names}"' if names else ""
    # Outside, a space does not colour the end of a line that is broken at it.
    word = token.text.lstrip(" ") or token.text
    space = token.text[: len(token.text) - len(word)]
    return f"{space}<i{shown}>{markup.escape(word, quote=False)}</i>"


def _data(text: Text) -> list[list]:
    """[reward, gain, KL, place of the one taken, candidates as [text, log π, reward, q]]."""
    return [
        [
            *map(_plain, (t.reward, t.gain, t.kl)),
            next((i for i, c in enumerate(t.candidates) if c.id == t.id), -1),
            [[c.text, *map(_plain, (c.logprob, c.reward, c.q))] for c in t.candidates],
        ]
        for t in text.tokens
    ]


def _plain(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return round(value, 3) if math.isfinite(value) else None


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}"
