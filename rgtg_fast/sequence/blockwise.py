"""Blockwise best of K: of K next blocks of M tokens, the one with the best value goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from .. import ops
from ..decode import options as numbers
from ..decode.refill import Entry
from .best_of import best_row, chosen, draw_until, judged
from .checks import MOST_TEXTS
from .output import SequenceAnswer
from .run import Run
from .texts import Texts


def blockwise_best_of(
    model: Any,
    prompts: Iterable[Any],
    *,
    reward_model: Any,
    n: int = 4,
    block: int = 16,
    tokenizer: Any = None,
    **options: Any,
) -> Iterator[SequenceAnswer]:
    """Blocks of tokens, each the best of n by the reward of the text so far.

    CD blockwise (Mudgal et al., arXiv 2310.17022): from the text y so far, n blocks
    z_1 .. z_n ~ π( · | x, y) of `block` tokens (fewer where one ends) are drawn, and the text goes
    on with y z_i of the largest value V(x, y z_i), the first of equal ones. V is `reward_model`, of
    prefixes: the paper's prefix scorer. `block=1` is best of n by token; with `block` of at least
    `max_new_tokens` it is `best_of`.

    Args:
        model, prompts, reward_model, tokenizer, options: as for `best_of`. Block j of n has row
            seed `ops.split_seed(seed, n)[j]` in all of the answer.
        n: blocks to choose from (the paper's K).
        block: tokens of a block (the paper's M).

    Returns:
        An iterator of a `SequenceAnswer` for each prompt, as of `best_of`; `segments` are the
        lengths of the blocks, `candidates` the texts with each of the last n blocks. What the
        blocks have in common is run once by both models.

    Raises:
        ValueError: as `best_of`.
    """
    n, block = numbers.integer("n", n, 1, MOST_TEXTS), numbers.integer("block", block, 1)
    run = Run(model, reward_model, tokenizer, options)
    return run.results(prompts, partial(_blockwise, n=n, block=block))


def _blockwise(texts: Texts, entry: Entry, n: int, block: int) -> SequenceAnswer:
    texts.join([entry])
    seeds, segments = ops.split_seed(entry.seed, n).tolist(), []
    while True:
        done = len(texts.rows[0].tokens)
        texts.advance([0])  # before it is copied
        texts.select([0] * n)
        draw_until(texts, seeds, done + block)
        best = best_row(judged(texts))
        segments.append(len(texts.rows[best].tokens) - done)
        if texts.rows[best].ended:
            answer = chosen(texts, best)
            answer.segments = segments
            return answer
        texts.select([best])
