"""Shapes of the ops' results, for ``torch.compile``: the same for every compiled backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _topk_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty((rows, k), dtype=torch.float32),
        logits.new_empty((rows, k), dtype=torch.int64),
    )


def _reward_head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return hidden.new_empty(hidden.shape[:2], dtype=torch.float32)


def _vocab_reward(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=torch.float32)


def _ratio_sample(
    logprobs: Tensor,
    rewards: Tensor,
    ids: Tensor,
    beta: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    do_sample: bool,
) -> tuple[Tensor, Tensor]:
    return logprobs.new_empty((logprobs.shape[0],), dtype=torch.int64), logprobs.new_empty(
        logprobs.shape
    )


def _ratio_step(
    logprobs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    beta: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    do_sample: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logprobs.new_empty((logprobs.shape[0],), dtype=torch.int64),
        logprobs.new_empty(logprobs.shape),
        logprobs.new_empty(logprobs.shape),
    )


def _candidate_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


def _prefix_bt_loss(
    r_chosen: Tensor,
    r_rejected: Tensor,
    len_chosen: Tensor,
    len_rejected: Tensor,
    weights: Tensor,
    margin: Tensor,
    label_smoothing: float,
    centering: float,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(r_chosen.dtype, torch.float32)
    shape = r_chosen.shape
    return (
        r_chosen.new_empty((shape[0],), dtype=dtype),
        r_chosen.new_empty(shape, dtype=dtype),
        r_chosen.new_empty(shape, dtype=dtype),
    )


def _ratio_keep(
    logprobs: Tensor,
    ids: Tensor,
    beta: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    do_sample: bool,
    low: float,
    high: float,
) -> Tensor:
    return logprobs.new_empty(logprobs.shape, dtype=torch.bool)


FAKES: dict[str, Callable[..., Any]] = {
    "topk_logprobs": _topk_logprobs,
    "reward_head": _reward_head,
    "vocab_reward": _vocab_reward,
    "ratio_sample": _ratio_sample,
    "ratio_keep": _ratio_keep,
    "ratio_step": _ratio_step,
    "candidate_attention": _candidate_attention,
    "prefix_bt_loss": _prefix_bt_loss,
}


def register(namespace: str) -> None:
    """Registers the fakes of those ops that ``torch.ops.<namespace>`` has."""
    for name, fake in FAKES.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", fake)
