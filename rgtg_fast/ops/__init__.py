"""The ops of a guided decoding step and of reward training, typed, checked and dispatched.

Every op takes ``backend``: ``"auto"``, ``"reference"`` (torch, float64 inside, on any device),
``"cpp"``, ``"cuda"`` or ``"triton"``. ``"auto"`` is C++ for CPU tensors and the faster of CUDA C++
and Triton for CUDA tensors; where the op has no kernel for the device it is the reference on that
device, and ``rgtg_fast.show_config()`` says which. ``"triton"`` takes CPU tensors only where
TRITON_INTERPRET=1 was set before the first use of it. The environment variable ``RGTG_BACKEND``
replaces ``"auto"``. A backend that is asked for by name and is not there raises
:class:`BackendUnavailable`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fakes as _fakes
from .checks import (
    check_attention,
    check_bias,
    check_device,
    check_float,
    check_ints,
    check_k,
    per_row_policy,
    split_seed,
)
from .dispatch import (
    BACKENDS,
    OPS,
    Backend,
    BackendUnavailable,
    keep_kernel,
    kernel,
    settle,
    unavailable_reason,
)
from .dispatch import run as _run
from .losses import prefix_bt_loss

__all__ = [
    "BACKENDS",
    "MAX_CANDIDATES",
    "OPS",
    "Backend",
    "BackendUnavailable",
    "candidate_attention",
    "keep_kernel",
    "kernel",
    "prefix_bt_loss",
    "ratio_sample",
    "ratio_step",
    "reward_head",
    "split_seed",
    "topk_logprobs",
    "unavailable_reason",
    "vocab_reward",
]

MAX_CANDIDATES = 64

_fakes.register("rgtg_fast")


def _limit_k(k: int, op: str, backend: str, first: Tensor) -> None:
    if k <= MAX_CANDIDATES or settle(op, backend, first.device.type, 1) == "reference":
        return
    raise ValueError(
        f"k={k} candidates asked for but the compiled backends keep at most {MAX_CANDIDATES}; "
        f"pass k<={MAX_CANDIDATES} or backend='reference'"
    )


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
        backend: see the module's docstring.

    Returns:
        ``logprobs`` float32 ``[B, k]`` and ``ids`` int64 ``[B, k]``.

    Raises:
        ValueError: for a wrong shape, dtype or ``k``; BackendUnavailable for a missing backend.
    """
    check_float("logits", logits, ("B", "V"))
    check_k(k, logits.shape[1])
    _limit_k(k, "topk_logprobs", backend, logits)
    return _run("topk_logprobs", backend, logits, k)


def reward_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | float | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """A scalar reward for each candidate: ``hidden @ weight + bias``, accumulated in float32.

    Args:
        hidden: ``[B, k, H]`` any float dtype, any strides.
        weight: ``[H]`` any float dtype; if either is float64 the sum is accumulated in float64.
        bias: a number, a tensor with one element, or None.
        backend: see the module's docstring.

    Returns:
        Rewards, float32 ``[B, k]``.

    Raises:
        ValueError: for a wrong shape or dtype; BackendUnavailable for a missing backend.
    """
    check_float("hidden", hidden, ("B", "k", "H"))
    check_float("weight", weight, (hidden.shape[2],))
    check_device("weight", weight, "hidden", hidden)
    return _run("reward_head", backend, hidden, weight, check_bias(bias, hidden))


def vocab_reward(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """Rewards of a head with one output per token: ``weight[ids] @ hidden``, k rows gathered of V.

    Args:
        hidden: ``[B, H]`` any float dtype, any strides.
        weight: ``[V, H]`` any float dtype; read only at the rows in ``ids``.
        ids: int64 ``[B, k]`` token ids in 0 .. V - 1.
        backend: see the module's docstring.

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
    return _run("vocab_reward", backend, hidden, weight, ids)


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
    for bit on every backend. A candidate with ``s = -inf`` cannot be chosen.

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
        backend: see the module's docstring.

    Returns:
        ``slot`` int64 ``[B]`` and ``logq = log_softmax(s / T)`` float32 ``[B, k]``.

    Raises:
        ValueError: for a wrong shape, dtype or value; BackendUnavailable for a missing backend.
    """
    per_row = per_row_policy(logprobs, ids, beta, temperature, seed, position)
    check_float("rewards", rewards, tuple(logprobs.shape))
    check_device("rewards", rewards, "logprobs", logprobs)
    scores = (logprobs.to(torch.float32), rewards.to(torch.float32))
    return _run("ratio_sample", backend, *scores, ids, *per_row, do_sample)


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
        backend: see the module's docstring.

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
    _limit_k(logprobs.shape[1], "ratio_step", backend, logprobs)
    logprobs = logprobs.to(torch.float32)
    return _run("ratio_step", backend, logprobs, hidden, weight, ids, *per_row, do_sample, bias)


def candidate_attention(
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
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of k sibling candidates to one shared prefix and, each, to itself.

    With ``s = scale * q . key`` (then ``softcap * tanh(s / softcap)``) over the live positions of
    the prefix and the sibling's own key, the result is ``softmax(s) @ values``. Siblings do not see
    each other. Query head h uses key head ``h // (Hq / Hkv)``.

    Args:
        q: ``[B, k, Hq, D]`` float32, bfloat16 or float16 (float64 with ``backend="reference"``).
        k_prefix, v_prefix: ``[B, Hkv, T, D]`` in q's dtype; live where ``start <= t < length``.
            What lies elsewhere is not used, not even if it is NaN.
        k_self, v_self: ``[B, k, Hkv, D]``, the siblings' own.
        start, length: int64 ``[B]``; every sibling is at position ``length``.
        scale: factor of the scores, usually ``D ** -0.5``.
        window: see only the last ``window`` positions counting the sibling's own:
            ``t > length - window``.
        softcap: a positive cap of the scores, or None.
        backend: see the module's docstring.

    Returns:
        ``[B, k, Hq, D]`` in q's dtype, contiguous.

    Raises:
        ValueError: for a wrong shape, dtype or value; BackendUnavailable for a missing backend.
    """
    check_attention(q, k_prefix, v_prefix, k_self, v_self, start, length)
    if window is not None and window < 1:
        raise ValueError(f"window={window}; pass at least 1 (the query itself), or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}; pass a positive number, or None")
    chosen = settle("candidate_attention", backend, q.device.type, q.shape[0])
    if chosen != "reference" and (q.dtype == torch.float64 or not 1 <= q.shape[3] <= 256):
        raise ValueError(
            f"q has dtype {q.dtype} and heads of {q.shape[3]}; the compiled backends take float32, "
            "bfloat16 or float16, up to 256 wide; pass those or backend='reference'"
        )
    arguments = (q, k_prefix, v_prefix, k_self, v_self, start, length, float(scale))
    softcap = None if softcap is None else float(softcap)
    return _run("candidate_attention", backend, *arguments, window, softcap)
