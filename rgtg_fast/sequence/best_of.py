"""Best of n: the text with the best reward, of n texts of the language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from .. import ops
from ..decode import options as numbers
from ..decode.refill import Entry
from .checks import MOST_TEXTS
from .output import SequenceAnswer
from .run import Run
from .texts import Texts


def best_of(
    model: Any,
    prompts: Iterable[Any],
    *,
    reward_model: Any,
    n: int = 16,
    tokenizer: Any = None,
    **options: Any,
) -> Iterator[SequenceAnswer]:
    """Of n texts of the language model, the one with the best reward.

    y_1 .. y_n ~ π( · | x) independent, and the answer is the y_i with the largest r(x, y_i), the
    first of equal ones (Stiennon et al., arXiv 2009.01325; Nakano et al., arXiv 2112.09332). Its
    divergence from π is at most log n - (n - 1) / n nats (Beirami et al., arXiv 2401.01879).

    Args:
        model: a causal language model, as for `generate`.
        prompts: token ids (a list, or int64 [P]), or texts where `tokenizer` is given: any iterable
            of them, read one at a time.
        reward_model: as for `generate`. Of it r is the reward of prompt and answer (rewards of
            single tokens are summed).
        n: texts for each prompt.
        tokenizer: encodes texts, as it is called with a text alone, and decodes answers.
        options: those of Hugging Face's `generate` that make π of the logits (`temperature`,
            `top_k`, by default off, `top_p`, `repetition_penalty`, a `logits_processor`) and that
            end texts; those of `rgtg_fast.generate` that say what the reward is (`reward_label`,
            `reward_kind`, `reward_tokenizer`, `eos_reward`, ...); and `seed`: an int, split among
            the prompts, or int64 [N]. Text j of a prompt has row seed `ops.split_seed(seed, n)[j]`.

    Returns:
        An iterator of a `SequenceAnswer` for each prompt, in their order. All n texts are its
        `candidates`. The prompt is run once by both models, and copied. A prompt that cannot be
        answered (too long, a NaN reward) gives one with `error`, and takes no other with it.
        Closing the iterator, an exception and an interrupt free everything.

    Raises:
        ValueError: before the first prompt is read: an option out of range or unknown, models that
            do not match, a model or a scorer without rows of their own.

    Example::

        for answer in rgtg_fast.best_of(lm, texts, reward_model=rm, n=16, tokenizer=tok, seed=0):
            print(answer.text, answer.reward, answer.cost)
    """
    n = numbers.integer("n", n, 1, MOST_TEXTS)
    run = Run(model, reward_model, tokenizer, options)
    return run.results(prompts, partial(_best_of, n=n))


def _best_of(texts: Texts, entry: Entry, n: int) -> SequenceAnswer:
    texts.join([entry])
    texts.select([0] * n)
    draw_until(texts, ops.split_seed(entry.seed, n).tolist(), entry.steps)
    return best_answer(texts)


def draw_until(texts: Texts, seeds: Sequence[int], length: int) -> None:
    """Draw tokens for the rows, by their seeds, until each has ended or has so many."""
    while running := [
        row for row, text in enumerate(texts.rows) if not text.ended and len(text.tokens) < length
    ]:
        texts.draw(running, [seeds[row] for row in running])


def judged(texts: Texts) -> list[float]:
    """The rewards of all rows; `ValueError` where a row has none."""
    raise_errors(texts)
    texts.judge(range(len(texts.rows)))
    raise_errors(texts)
    return [text.reward for text in texts.rows]


def raise_errors(texts: Texts) -> None:
    """`ValueError` for a row that failed."""
    failed = next((text.error for text in texts.rows if text.error is not None), None)
    if failed is not None:
        raise ValueError(failed)


def best_row(rewards: Sequence[float]) -> int:
    """The first of those with the largest reward."""
    return max(range(len(rewards)), key=rewards.__getitem__)


def best_answer(texts: Texts) -> SequenceAnswer:
    """The row with the largest reward, with all rows as its candidates."""
    return chosen(texts, best_row(judged(texts)))


def chosen(texts: Texts, row: int, weights: Sequence[float | None] | None = None) -> SequenceAnswer:
    """A row as the answer, with all rows as its candidates."""
    each = [None] * len(texts.rows) if weights is None else weights
    candidates = [texts.candidate(i, weight) for i, weight in enumerate(each)]
    own = candidates[row]
    return SequenceAnswer(
        texts.rows[row].entry.index,
        list(own.tokens),
        own.text,
        own.reward,
        own.logprob,
        texts.rows[row].cost,
        candidates,
    )
