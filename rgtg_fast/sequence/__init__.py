"""Decoders that decide by whole texts or segments, on the engine of `generate_many`.

Each is an iterator of answers to any number of prompts; every answer says what it took, in tokens
that the two models ran.
"""

from .backtracking import backtracking
from .best_of import best_of
from .blockwise import blockwise_best_of
from .cards import cards
from .output import Candidate, Cost, SequenceAnswer
from .rejection import speculative_rejection
from .smc import twisted_smc
from .tree import treebon

__all__ = [
    "Candidate",
    "Cost",
    "SequenceAnswer",
    "backtracking",
    "best_of",
    "blockwise_best_of",
    "cards",
    "speculative_rejection",
    "treebon",
    "twisted_smc",
]
