"""TreeBoN: best of n in layers, where the best texts so far branch and the others end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from .. import ops
from ..decode import options as numbers
from ..decode.refill import Entry
from .best_of import best_answer, draw_until, judged
from .checks import MOST_TEXTS
from .output import SequenceAnswer
from .run import Run
from .texts import Texts


def treebon(
    model: Any,
    prompts: Iterable[Any],
    *,
    reward_model: Any,
    n: int = 16,
    children: int = 4,
    layers: int = 4,
    tokenizer: Any = None,
    **options: Any,
) -> Iterator[SequenceAnswer]:
    """Best of n over a tree of segments: in each layer the best n / children texts branch.

    TreeBoN (Qiu et al., arXiv 2410.16033; the rule is put together from its summaries): n roots of
    max_new_tokens / layers tokens (rounded up) are drawn from π. In each layer the n / `children`
    texts of the largest reward so far stay, and each goes on as `children` texts by another
    segment, until the last layer, whose text of the largest reward is the answer. A text that has
    ended stays as one, and takes the place of its children. The paper's partial rewards are a DPO
    pair's: `reward_model=(policy, reference)`; any reward of prefixes can be given.

    Args:
        model, prompts, reward_model, tokenizer, options: as for `best_of`. Row j of a layer has row
            seed `ops.split_seed(seed, n)[j]`.
        n: texts of a layer.
        children: of each text that stays; it divides n.
        layers: segments of a text.

    Returns:
        An iterator of a `SequenceAnswer` for each prompt, as of `best_of`; `candidates` are the
        texts of the last layer, `rejected` counts those that were given up before.

    Raises:
        ValueError: as `best_of`; n that is no multiple of `children`.
    """
    n, layers = numbers.integer("n", n, 1, MOST_TEXTS), numbers.integer("layers", layers, 1)
    children = numbers.integer("children", children, 1)
    if n % children:
        raise ValueError(f"n={n} texts are no multiple of children={children}; pass one that is")
    run = Run(model, reward_model, tokenizer, options)
    return run.results(prompts, partial(_tree, n=n, children=children, layers=layers))


def _tree(texts: Texts, entry: Entry, n: int, children: int, layers: int) -> SequenceAnswer:
    texts.join([entry])
    texts.select([0] * n)
    seeds = ops.split_seed(entry.seed, n).tolist()
    segment, rejected = -(-entry.steps // layers), 0
    for layer in range(1, layers + 1):
        draw_until(texts, seeds, layer * segment)
        if layer == layers or all(text.ended for text in texts.rows):
            break
        rewards = judged(texts)
        order = sorted(range(len(rewards)), key=lambda row: -rewards[row])
        kept = sorted(order[: n // children])
        rejected += len(rewards) - len(kept)
        texts.advance([row for row in kept if not texts.rows[row].ended])  # before they are copied
        copies = [1 if texts.rows[row].ended else children for row in kept]
        texts.select([row for row, m in zip(kept, copies, strict=True) for _ in range(m)])
    answer = best_answer(texts)
    answer.rejected = rejected
    return answer
