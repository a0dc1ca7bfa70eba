"""Scorers: what turns candidate tokens into rewards.

A scorer is any object with `prefill(input_ids, attention_mask)`, `score(ids [B, k]) -> fp32 [B, k]`
and `commit(slot [B])`; `make_scorer` builds one for a reward model.
"""

from ..models.on_base import RewardAdapter, RewardHead
from ..models.reward_model import RewardModel
from .attention_credit import AttentionCreditScorer
from .autoregressive import AutoregressiveScorer
from .base import Scorer
from .expand import ExpandScorer
from .factory import make_scorer
from .reencode import ReencodeScorer
from .tree import TreeScorer
from .vocab_head import VocabRewardScorer

__all__ = [
    "AttentionCreditScorer",
    "AutoregressiveScorer",
    "ExpandScorer",
    "ReencodeScorer",
    "RewardAdapter",
    "RewardHead",
    "RewardModel",
    "Scorer",
    "TreeScorer",
    "VocabRewardScorer",
    "make_scorer",
]
