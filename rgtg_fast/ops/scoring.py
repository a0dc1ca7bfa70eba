"""What gives candidates and their rewards: topk_logprobs, reward_head, vocab_reward."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_bias, check_device, check_float, check_ints, check_k
from .dispatch import Backend, limit_k, run


def topk_logprobs(logits: Tensor, k: int, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """The ``k`` most likely tokens of each row and their full-vocabulary log-probabilities.

    Candidates come by logit (widened to float32, float64 rounded to it) descending, then by token
    id ascending, with -0 == +0: a total order, so every backend returns the same ids. With logits
    ``l`` the log-probabilities are ``l - log(sum(exp(l)))`` over the whole vocabulary. A -inf logit
    has log-probability -inf. A NaN in a row sorts first and makes all log-probabilities of that row
    NaN; a +inf does the latter too, as in ``torch.log_softmax``. Other rows are not touched.

    Args:
        logits: ``[B, V]`` float64, float32, bfloat16 or float16, any strides.
        k: candidates per row, 1 <= k <= V, and at most 64 unless ``backend="reference"``.
        backend: see ``rgtg_fast.ops``.

    Returns:
        ``logprobs`` float32 ``[B, k]`` and ``ids`` int64 ``[B, k]``.

    Raises:
        ValueError: for a wrong shape, dtype or ``k``; BackendUnavailable for a missing backend.
    """
    check_float("logits", logits, ("B", "V"))
    check_k(k, logits.shape[1])
    limit_k(k, "topk_logprobs", backend, logits)
    return run("topk_logprobs", backend, logits, k)


def reward_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | float | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """A scalar reward for each candidate: ``hidden @ weight + bias``, accumulated in float32.

    Args:
        hidden: ``[B, k, H]`` any float dtype, any strides.
        weight: ``[H]`` any float dtype; if either is float64 the sum is accumulated in float64.
        bias: a number, a tensor with one element, or None.
        backend: see ``rgtg_fast.ops``.

    Returns:
        Rewards, float32 ``[B, k]``.

    Raises:
        ValueError: for a wrong shape or dtype; BackendUnavailable for a missing backend.
    """
    check_float("hidden", hidden, ("B", "k", "H"))
    check_float("weight", weight, (hidden.shape[2],))
    check_device("weight", weight, "hidden", hidden)
    return run("reward_head", backend, hidden, weight, check_bias(bias, hidden))


def vocab_reward(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """Rewards of a head with one output per token: ``weight[ids] @ hidden``, k rows gathered of V.

    Args:
        hidden: ``[B, H]`` any float dtype, any strides.
        weight: ``[V, H]`` any float dtype; read only at the rows in ``ids``.
        ids: int64 ``[B, k]`` token ids in 0 .. V - 1.
        backend: see ``rgtg_fast.ops``.

    Returns:
        Rewards, float32 ``[B, k]``, accumulated in float32 (float64 if an input is float64).

    Raises:
        ValueError: for a wrong shape or dtype or, on CPU, an id outside the vocabulary (inside a
            compiled graph that is a RuntimeError); BackendUnavailable for a missing backend.
            On a GPU such an id gives NaN, as a kernel cannot raise.
    """
    check_float("hidden", hidden, ("B", "H"))
    check_float("weight", weight, ("V", hidden.shape[1]))
    check_ints("ids", ids, (hidden.shape[0], "k"))
    check_device("weight", weight, "hidden", hidden)
    check_device("ids", ids, "hidden", hidden)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"ids holds {low if low < 0 else high} but weight has rows 0 .. "
                f"{weight.shape[0] - 1}; pass token ids of the reward model's vocabulary"
            )
    return run("vocab_reward", backend, hidden, weight, ids)
