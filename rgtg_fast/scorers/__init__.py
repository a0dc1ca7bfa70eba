"""Scorers: what turns candidate tokens into rewards.

A scorer is any object with `prefill(input_ids, attention_mask)`, `score(ids [B, k]) -> fp32 [B, k]`
and `commit(slot [B])`; `make_scorer` builds one for a reward model.
"""

from ..models.on_base import RewardAdapter, RewardHead
from ..models.reward_model import RewardModel
from .attention_credit import AttentionCreditScorer
from .autoregressive import AutoregressiveScorer
from .base import Scorer
from .combine import Combination
from .expand import ExpandScorer
from .factory import make_scorer
from .implicit import LogprobScorer
from .reencode import ReencodeScorer
from .registry import KINDS, table
from .text import TextScorer
from .tree import TreeScorer
from .vocab_head import VocabRewardScorer
from .weighted import WeightedScorer

# From the registry, so that a scorer added there need not be listed here too.
_made = {kind.make.__name__: kind.make for kind in KINDS.values() if not kind.is_model}
globals().update(_made)
__doc__ += f"\nThe kinds of reward, as `eval` (`kind:`) and `train` know them::\n\n{table()}\n"

__all__ = [
    "KINDS",
    "AttentionCreditScorer",
    "AutoregressiveScorer",
    "Combination",
    "ExpandScorer",
    "LogprobScorer",
    "ReencodeScorer",
    "RewardAdapter",
    "RewardHead",
    "RewardModel",
    "Scorer",
    "TextScorer",
    "TreeScorer",
    "VocabRewardScorer",
    "WeightedScorer",
    "make_scorer",
    *sorted(_made),
]
