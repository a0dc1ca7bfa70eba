"""What rows take, in one currency: tokens that models run, and bytes of their caches."""

from __future__ import annotations

from typing import Any

from ..scorers.expand import ExpandScorer
from ..scorers.next_token import NextTokenScorer
from ..scorers.reencode import ReencodeScorer
from ..scorers.retokenize import RetokenizeScorer
from ..scorers.tree import SiblingScorer
from ..scorers.weighted import leaves_of


def tokens_joined(scorer: Any, prompt: int) -> int:
    """Tokens that the models of `scorer` run as a row with a prompt of so many joins."""
    return sum(prompt for leaf in leaves_of(scorer) if _has_cache(leaf))


def tokens_read(scorer: Any, length: int, new: int, scored: int) -> int:
    """Tokens that they run as a row of `length` tokens gets `new` ones more, and `scored`
    candidates behind these, of which one is committed."""
    total = 0
    for leaf in leaves_of(scorer):
        if isinstance(leaf, NextTokenScorer):  # a forward is of what is committed
            total += new + bool(scored)
        elif _has_cache(leaf):
            total += new + scored
        elif isinstance(leaf, ReencodeScorer):
            total += scored * (length + new + 1)
    return total


def tokens_cropped(scorer: Any) -> int:
    """Tokens that they run again as a row is cropped."""
    leaves = leaves_of(scorer)
    return sum(isinstance(x, NextTokenScorer) or getattr(x, "keeps_text", False) for x in leaves)


def cache_bytes(scorer: Any) -> int:
    """Bytes of the caches of all its rows."""
    total = 0
    for leaf in leaves_of(scorer):
        static = leaf.static if isinstance(leaf, NextTokenScorer) else None
        if static is not None:
            total += static.forward.cache.nbytes()
        elif isinstance(leaf, NextTokenScorer | ExpandScorer):
            total += leaf.rows.nbytes()
        elif isinstance(leaf, SiblingScorer | RetokenizeScorer) and "forward" in leaf.__dict__:
            total += leaf.forward.cache.nbytes()
    return total


def _has_cache(leaf: Any) -> bool:
    return isinstance(leaf, SiblingScorer | ExpandScorer | NextTokenScorer | RetokenizeScorer)
