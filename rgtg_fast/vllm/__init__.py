"""Reward-guided decoding in vLLM: `--logits-processors rgtg_fast.vllm:RewardGuided`.

`help(rgtg_fast.vllm.RewardGuided)` has the options of a request, `help(rgtg_fast.vllm.Settings)`
those of the engine. vLLM is needed only where an engine runs.
"""

from .processor import RewardGuided
from .settings import Settings

__all__ = ["RewardGuided", "Settings"]
