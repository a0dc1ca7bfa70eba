"""The ratio policy over the candidates: ratio_sample, ratio_step, ratio_keep."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_bias, check_device, check_float, per_row_policy
from .dispatch import Backend, limit_k, run


def ratio_sample(
    logprobs: Tensor,
    rewards: Tensor,
    ids: Tensor,
    beta: float | Tensor,
    temperature: float | Tensor,
    seed: int | Tensor,
    position: int | Tensor,
    do_sample: bool,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Draws one candidate per row from the ratio policy ``softmax((logprobs + beta * rewards)/T)``.

    With ``s = logprobs + beta * rewards`` in float32, the slot is ``argmax(s / T + g)`` with
    standard Gumbel noise ``g`` (the Gumbel-max draw), or ``argmax(s)`` without ``do_sample``; ties
    go to the lowest slot. ``g`` depends on (row seed, position, token id) alone and is the same bit
    for bit on every backend. A candidate with ``s = -inf`` cannot be chosen, nor one with a reward
    of -inf, whatever ``beta`` is.

    A row whose ``s / T`` holds a NaN or +inf, or nothing finite, has slot -1 and NaN in ``logq``.

    Args:
        logprobs, rewards: ``[B, k]`` any float dtype, used as float32.
        ids: int64 ``[B, k]`` token ids of the candidates.
        beta: weight of the reward, a finite number or ``[B]``.
        temperature: a positive finite number or ``[B]``.
        seed: an int, which :func:`split_seed` turns into row seeds, or int64 row seeds ``[B]``
            (in a loop split once: it costs ten times what the draw does).
        position: index of the token in the answer, an int or int64 ``[B]``.
        do_sample: draw, or take the best.
        backend: see ``rgtg_fast.ops``.

    Returns:
        ``slot`` int64 ``[B]`` and ``logq = log_softmax(s / T)`` float32 ``[B, k]``.

    Raises:
        ValueError: for a wrong shape, dtype or value; BackendUnavailable for a missing backend.
    """
    per_row = per_row_policy(logprobs, ids, beta, temperature, seed, position)
    check_float("rewards", rewards, tuple(logprobs.shape))
    check_device("rewards", rewards, "logprobs", logprobs)
    scores = (logprobs.to(torch.float32), rewards.to(torch.float32))
    return run("ratio_sample", backend, *scores, ids, *per_row, do_sample)


def ratio_step(
    logprobs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    beta: float | Tensor,
    temperature: float | Tensor,
    seed: int | Tensor,
    position: int | Tensor,
    do_sample: bool,
    bias: Tensor | float | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`reward_head` and :func:`ratio_sample` at once: the end of a decoding step.

    Bit for bit what the two give one after the other on the same backend.

    Args:
        logprobs: ``[B, k]`` any float dtype, used as float32; k <= 64 unless
            ``backend="reference"``.
        hidden, weight, bias: ``[B, k, H]``, ``[H]`` and one element, as for :func:`reward_head`.
        ids, beta, temperature, seed, position, do_sample: as for :func:`ratio_sample`.
        backend: see ``rgtg_fast.ops``.

    Returns:
        ``slot`` int64 ``[B]``, ``rewards`` float32 ``[B, k]`` and ``logq`` float32 ``[B, k]``.

    Raises:
        ValueError: for a wrong shape, dtype or value; BackendUnavailable for a missing backend.
    """
    per_row = per_row_policy(logprobs, ids, beta, temperature, seed, position)
    check_float("hidden", hidden, (*logprobs.shape, "H"))
    check_float("weight", weight, (hidden.shape[2],))
    check_device("hidden", hidden, "logprobs", logprobs)
    check_device("weight", weight, "hidden", hidden)
    bias = check_bias(bias, hidden)
    limit_k(logprobs.shape[1], "ratio_step", backend, logprobs)
    logprobs = logprobs.to(torch.float32)
    return run("ratio_step", backend, logprobs, hidden, weight, ids, *per_row, do_sample, bias)


def ratio_keep(
    logprobs: Tensor,
    ids: Tensor,
    beta: float | Tensor,
    temperature: float | Tensor,
    seed: int | Tensor,
    position: int | Tensor,
    do_sample: bool,
    low: float,
    high: float,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Which candidates :func:`ratio_sample` may choose for rewards within bounds.

    False: the candidate's largest possible value, bit for bit as :func:`ratio_sample` computes it,
    is below the smallest possible value of another. A row that is undefined at a bound is kept
    whole.

    Args:
        logprobs, ids, beta, temperature, seed, position, do_sample: as for :func:`ratio_sample`.
        low, high: bounds of the rewards.
        backend: see ``rgtg_fast.ops``; there is no GPU kernel.

    Returns:
        bool ``[B, k]``.

    Raises:
        ValueError: for a wrong shape, dtype or value; BackendUnavailable for a missing backend.
    """
    per_row = per_row_policy(logprobs, ids, beta, temperature, seed, position)
    if not low <= high:
        raise ValueError(f"low={low} and high={high}; pass low <= high")
    logprobs = logprobs.to(torch.float32)
    return run("ratio_keep", backend, logprobs, ids, *per_row, do_sample, float(low), float(high))
