"""The ops of one guided decoding step, typed, validated and dispatched to a backend.

Every op takes ``backend``: ``"auto"``, ``"reference"`` (torch, float64 inside, on any device),
``"cpp"``, ``"cuda"`` or ``"triton"``. ``"auto"`` is C++ for CPU tensors and CUDA C++ for CUDA
tensors; where the op has no kernel for the device it is the reference on that device, and
``rgtg_fast.show_config()`` says which. The environment variable ``RGTG_BACKEND`` replaces
``"auto"``. A backend that is asked for by name and is not there raises :class:`BackendUnavailable`.
"""

from __future__ import annotations

import math
import os
from typing import Literal

import torch
from torch import Tensor

from . import reference

Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
OPS = ("topk_logprobs", "reward_head", "ratio_sample", "vocab_reward")
MAX_CANDIDATES = 64

_CUDA_OPS = ("topk_logprobs",)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

try:
    from . import _C

    _missing = None
except ImportError as error:  # a source tree that was never built
    _missing = str(error)


class BackendUnavailable(ValueError):
    """The backend asked for does not exist for this op on this device; the message says why."""


def unavailable_reason(op: str, backend: str) -> str | None:
    """Why ``backend`` cannot run ``op`` in this installation, or None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return f"there is no Triton kernel of {op} in this version"
    if _missing is not None:
        return f"the compiled extension rgtg_fast._C cannot be imported ({_missing})"
    if backend == "cuda":
        if op not in _CUDA_OPS:
            return f"there is no CUDA kernel of {op} in this version"
        if _C.build_info()["cuda_archs"] is None:
            return "the extension was built without nvcc"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    return None


@torch.compiler.assume_constant_result
def _requested(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; pass one of {', '.join(BACKENDS)}")
    chosen = os.environ.get("RGTG_BACKEND", "auto") if backend == "auto" else backend
    if chosen not in BACKENDS:
        raise ValueError(
            f"RGTG_BACKEND={chosen!r} is unknown; set it to one of {', '.join(BACKENDS)}"
        )
    return chosen


@torch.compiler.assume_constant_result
def _check_available(op: str, backend: str, device: str) -> None:
    reason = unavailable_reason(op, backend)
    wanted_device = "cuda" if backend in ("cuda", "triton") else "cpu"
    if reason is None and device != wanted_device:
        reason = f"it runs on {wanted_device} tensors and these are on {device}"
    if reason is not None:
        raise BackendUnavailable(
            f"backend={backend!r} cannot run {op}: {reason}; pass backend='reference'"
        )


@torch.compiler.assume_constant_result
def _automatic(op: str, device: str) -> str:
    if device == "cpu":  # without the extension this is an error that says so
        return "cpp"
    has_kernel = device == "cuda" and unavailable_reason(op, "cuda") is None
    return "cuda" if has_kernel else "reference"


def _is_reference(op: str, backend: str, device: str) -> bool:
    """Settles the backend; True for the torch implementation, False for the compiled op."""
    chosen = _requested(backend)
    if chosen == "auto":
        chosen = _automatic(op, device)
    if chosen == "reference":
        return True
    _check_available(op, chosen, device)
    return False


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
    _check_float("logits", logits, ("B", "V"))
    _check_k(k, logits.shape[1])
    if _is_reference("topk_logprobs", backend, logits.device.type):
        return reference.topk_logprobs(logits, k)
    if k > MAX_CANDIDATES:
        raise ValueError(
            f"k={k} candidates asked for but the compiled backends keep at most {MAX_CANDIDATES}; "
            f"pass k<={MAX_CANDIDATES} or backend='reference'"
        )
    return torch.ops.rgtg_fast.topk_logprobs(logits, k)


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
    _check_float("hidden", hidden, ("B", "k", "H"))
    _check_float("weight", weight, (hidden.shape[2],))
    _check_device("weight", weight, "hidden", hidden)
    if isinstance(bias, (int, float)):
        bias = torch.full((1,), bias, dtype=torch.float64, device=hidden.device)
    if bias is not None:
        _check_float("bias", bias, None)
        if bias.numel() != 1:
            raise ValueError(
                f"bias has shape {list(bias.shape)}; pass a number or one element, or None"
            )
        _check_device("bias", bias, "hidden", hidden)
    if _is_reference("reward_head", backend, hidden.device.type):
        return reference.reward_head(hidden, weight, bias)
    return torch.ops.rgtg_fast.reward_head(hidden, weight, bias)


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
    """
    _check_float("hidden", hidden, ("B", "H"))
    _check_float("weight", weight, ("V", hidden.shape[1]))
    _check_ints("ids", ids, (hidden.shape[0], "k"))
    _check_device("weight", weight, "hidden", hidden)
    _check_device("ids", ids, "hidden", hidden)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"ids holds {low if low < 0 else high} but weight has rows 0 .. "
                f"{weight.shape[0] - 1}; pass token ids of the reward model's vocabulary"
            )
    if _is_reference("vocab_reward", backend, hidden.device.type):
        return reference.vocab_reward(hidden, weight, ids)
    return torch.ops.rgtg_fast.vocab_reward(hidden, weight, ids)


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
    _check_float("logprobs", logprobs, ("B", "k"))
    rows, k = logprobs.shape
    if k == 0:
        raise ValueError("logprobs has no candidates; pass [B, k] with k>=1")
    device = logprobs.device
    _check_float("rewards", rewards, (rows, k))
    _check_ints("ids", ids, (rows, k))
    _check_device("rewards", rewards, "logprobs", logprobs)
    _check_device("ids", ids, "logprobs", logprobs)
    betas = _per_row_float("beta", beta, rows, device, positive=False)
    temperatures = _per_row_float("temperature", temperature, rows, device, positive=True)
    if isinstance(seed, int):
        seed = split_seed(seed, rows, device)
    _check_ints("seed", seed, (rows,))
    _check_device("seed", seed, "logprobs", logprobs)
    if isinstance(position, int):
        position = torch.full((rows,), position, dtype=torch.int64, device=device)
    _check_ints("position", position, (rows,))
    _check_device("position", position, "logprobs", logprobs)
    arguments = (
        logprobs.to(torch.float32),
        rewards.to(torch.float32),
        ids,
        betas,
        temperatures,
        seed,
        position,
        do_sample,
    )
    if _is_reference("ratio_sample", backend, device.type):
        return reference.ratio_sample(*arguments)
    return torch.ops.rgtg_fast.ratio_sample(*arguments)


def split_seed(seed: int, batch: int, device: torch.device | str | None = None) -> Tensor:
    """One seed per row from one int: Philox4x32-10 keyed by ``seed``, counting rows.

    Args:
        seed: an int in -2^63 .. 2^63 - 1.
        batch: rows B.
        device: where to put the result; CPU by default.

    Returns:
        Row seeds, int64 ``[B]``. Row b does not depend on B.

    Raises:
        ValueError: if the seed does not fit in int64.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} does not fit in int64; pass one in -2**63 .. 2**63 - 1")
    return reference.split_seed(seed, batch, device)


def _shape_text(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    matches = tensor.dim() == len(shape) and all(
        isinstance(wanted, str) or got == wanted
        for got, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; pass {_shape_text(shape)}")


def _check_float(name: str, tensor: Tensor, shape: tuple[int | str, ...] | None) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; pass a floating-point tensor")
    if tensor.dtype not in _FLOATS:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; pass float64, float32, bfloat16 or float16"
        )
    if shape is not None:
        _check_shape(name, tensor, shape)


def _check_ints(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; pass an int64 tensor")
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {tensor.dtype}; pass int64")
    _check_shape(name, tensor, shape)


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {other_name} is on {other.device}; "
            f"move {name} to {other.device}"
        )


def _check_k(k: int, vocab: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} candidates asked for; pass k>=1")
    if k > vocab:
        raise ValueError(
            f"k={k} candidates asked for but the vocabulary has {vocab} tokens; pass k<={vocab}"
        )


def _per_row_float(
    name: str, value: float | Tensor, rows: int, device: torch.device, positive: bool
) -> Tensor:
    wanted = "positive and finite" if positive else "finite"
    if not isinstance(value, Tensor):
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"{name}={value}; pass a {wanted} number")
        return torch.full((rows,), value, dtype=torch.float32, device=device)
    _check_float(name, value, (rows,))
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; move it to {device}")
    # Reading values would stop a CUDA stream or break a graph; there the bad row gets slot -1.
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        good = torch.isfinite(value) & (value > 0) if positive else torch.isfinite(value)
        if not bool(good.all()):
            raise ValueError(f"{name}={value.tolist()}; every element must be {wanted}")
    return value.to(torch.float32)


if _missing is None:

    @torch.library.register_fake("rgtg_fast::topk_logprobs")
    def _(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows = logits.shape[0]
        return (
            logits.new_empty((rows, k), dtype=torch.float32),
            logits.new_empty((rows, k), dtype=torch.int64),
        )

    @torch.library.register_fake("rgtg_fast::reward_head")
    def _(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return hidden.new_empty(hidden.shape[:2], dtype=torch.float32)

    @torch.library.register_fake("rgtg_fast::vocab_reward")
    def _(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return hidden.new_empty(ids.shape, dtype=torch.float32)

    @torch.library.register_fake("rgtg_fast::ratio_sample")
    def _(
        logprobs: Tensor,
        rewards: Tensor,
        ids: Tensor,
        beta: Tensor,
        temperature: Tensor,
        seed: Tensor,
        position: Tensor,
        do_sample: bool,
    ) -> tuple[Tensor, Tensor]:
        return logprobs.new_empty((logprobs.shape[0],), dtype=torch.int64), torch.empty_like(
            logprobs, memory_format=torch.contiguous_format
        )
