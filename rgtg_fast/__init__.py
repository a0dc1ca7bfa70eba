"""rgtg_fast: reward-guided text generation for Hugging Face models.

`generate(model, ..., reward_model=rm)` samples from softmax((log π + β r)/T) over the k most likely
tokens at every step (arXiv 2406.07780); `RewardGuided` is the same as a `custom_generate` callable.
"""

from importlib.metadata import PackageNotFoundError, version

from . import ops, presets
from .decode.drafters import SuffixDrafter
from .decode.kept import free_graphs
from .generate import RewardGuided, generate
from .generate_many import generate_many
from .inspection import inspect
from .models.on_base import RewardAdapter, RewardHead
from .models.vocab_head import VocabHead
from .ops.installation import show_config
from .output import Answer, RewardGuidedOutput
from .scorers.endpoint import RewardEndpoint
from .scorers.rewards import Reward, WeightedRewards
from .sequence import (
    backtracking,
    best_of,
    blockwise_best_of,
    cards,
    speculative_rejection,
    treebon,
    twisted_smc,
)

try:
    __version__ = version("rgtg_fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Answer",
    "Reward",
    "RewardAdapter",
    "RewardEndpoint",
    "RewardGuided",
    "RewardGuidedOutput",
    "RewardHead",
    "SuffixDrafter",
    "VocabHead",
    "WeightedRewards",
    "backtracking",
    "best_of",
    "blockwise_best_of",
    "cards",
    "free_graphs",
    "generate",
    "generate_many",
    "inspect",
    "ops",
    "presets",
    "show_config",
    "speculative_rejection",
    "treebon",
    "twisted_smc",
]
