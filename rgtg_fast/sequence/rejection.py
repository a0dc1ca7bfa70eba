"""Speculative rejection: of many texts, those that look worst so far are given up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from .. import ops
from ..decode import options as numbers
from ..decode.refill import Entry
from .best_of import best_row, chosen, draw_until, judged
from .checks import MOST_TEXTS, real
from .output import SequenceAnswer
from .run import Run
from .texts import Texts


def speculative_rejection(
    model: Any,
    prompts: Iterable[Any],
    *,
    reward_model: Any,
    n: int = 64,
    alpha: float = 0.5,
    budget: int = 4096,
    tokenizer: Any = None,
    **options: Any,
) -> Iterator[SequenceAnswer]:
    """Best of n at less cost: at checkpoints the share `alpha` of the lowest reward is dropped.

    Speculative rejection (Sun et al., arXiv 2410.20290, algorithm 1): n texts are drawn from π
    until they fill the memory, here `budget` tokens of prompts and answers; all texts, ended ones
    too, are ordered by the reward of what there is of them, and round((1 - alpha) N) of the N go
    on. So again with the rest, whose texts can be longer for it, until all that are left have
    ended; the answer is the one of the largest reward. A round takes at least one token, and one
    text is always kept.

    Args:
        model, prompts, reward_model, tokenizer, options: as for `best_of`. Text j has row seed
            `ops.split_seed(seed, n)[j]`.
        n: texts at the beginning.
        alpha: share in (0, 1) that is dropped at a checkpoint.
        budget: tokens of all texts together, with a prompt each, that make a checkpoint.

    Returns:
        An iterator of a `SequenceAnswer` for each prompt, as of `best_of`; `candidates` are the
        texts that were left, `rejected` is the number of the others.

    Raises:
        ValueError: as `best_of`.
    """
    n = numbers.integer("n", n, 1, MOST_TEXTS)
    budget = numbers.integer("budget", budget, 1)
    alpha = real("alpha", alpha, 0.0, 1.0)
    run = Run(model, reward_model, tokenizer, options)
    return run.results(prompts, partial(_rejecting, n=n, alpha=alpha, budget=budget))


def _rejecting(texts: Texts, entry: Entry, n: int, alpha: float, budget: int) -> SequenceAnswer:
    texts.join([entry])
    texts.select([0] * n)
    seeds = ops.split_seed(entry.seed, n).tolist()
    prompt, length = len(entry.ids), 0
    while True:
        running = sum(not text.ended for text in texts.rows)
        length = max(length + 1, budget // max(running, 1) - prompt)
        draw_until(texts, seeds, length)
        rewards = judged(texts)
        if all(text.ended for text in texts.rows):
            answer = chosen(texts, best_row(rewards))
            answer.rejected = n - len(texts.rows)
            return answer
        order = sorted(range(len(rewards)), key=lambda row: -rewards[row])
        kept = sorted(order[: max(1, round((1 - alpha) * len(rewards)))])
        texts.select(kept)
        seeds = [seeds[row] for row in kept]
