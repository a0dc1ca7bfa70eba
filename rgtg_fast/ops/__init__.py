"""The ops of a guided decoding step and of reward training, typed, checked and dispatched.

Every op takes ``backend``: ``"auto"``, ``"reference"`` (torch, float64 inside, on any device),
``"cpp"``, ``"cuda"`` or ``"triton"``. ``"auto"`` is C++ for CPU tensors and the faster of CUDA C++
and Triton for CUDA tensors; where the op has no kernel for the device it is the reference on that
device, and ``rgtg_fast.show_config()`` says which. ``"triton"`` takes CPU tensors only where
TRITON_INTERPRET=1 was set before the first use of it. The environment variable ``RGTG_BACKEND``
replaces ``"auto"``. A backend that is asked for by name, either way, and is not there raises
:class:`BackendUnavailable`; in ``generate`` an op of which that backend has no kernel at all
(``ratio_keep`` has none but C++) runs on ``"auto"``.
"""

from __future__ import annotations

from . import registry
from .attention import candidate_attention
from .checks import split_seed
from .dispatch import (
    BACKENDS,
    Backend,
    BackendUnavailable,
    kernel,
    kernel_or_auto,
    requested,
    settle,
    unavailable_reason,
)
from .losses import prefix_bt_loss
from .mixing import mix_logits
from .nucleus import mix_nucleus, nucleus
from .registry import MAX_CANDIDATES, OPS
from .sampling import ratio_keep, ratio_sample, ratio_step
from .scoring import reward_head, topk_logprobs, vocab_reward

__all__ = [
    "BACKENDS",
    "MAX_CANDIDATES",
    "OPS",
    "Backend",
    "BackendUnavailable",
    "candidate_attention",
    "kernel",
    "kernel_or_auto",
    "mix_logits",
    "mix_nucleus",
    "nucleus",
    "prefix_bt_loss",
    "ratio_keep",
    "ratio_sample",
    "ratio_step",
    "requested",
    "reward_head",
    "settle",
    "split_seed",
    "topk_logprobs",
    "unavailable_reason",
    "vocab_reward",
]

registry.register_fakes("rgtg_fast")
