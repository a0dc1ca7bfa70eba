"""Attention of the candidates: candidate_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_attention
from .dispatch import Backend, run, settle


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
    rows: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of k sibling candidates to one shared prefix and, each, to itself.

    With ``s = scale * q . key`` (then ``softcap * tanh(s / softcap)``) over the live positions of
    the prefix and the sibling's own key, the result is ``softmax(s) @ values``. Siblings do not see
    each other. Query head h uses key head ``h // (Hq / Hkv)``.

    Args:
        q: ``[B, k, Hq, D]`` float32, bfloat16 or float16 (float64 with ``backend="reference"``).
        k_prefix, v_prefix: ``[B, Hkv, T, D]`` in q's dtype, or ``[N, Hkv, T, D]`` with ``rows``;
            live where ``start <= t < length``. What lies elsewhere is not used, not even if it is
            NaN.
        k_self, v_self: ``[B, k, Hkv, D]``, the siblings' own.
        start, length: int64 ``[B]``; every sibling is at position ``length``.
        scale: factor of the scores, usually ``D ** -0.5``.
        window: see only the last ``window`` positions counting the sibling's own:
            ``t > length - window``.
        softcap: a positive cap of the scores, or None.
        rows: int64 ``[B]``, the prefix ``0 .. N - 1`` that each row reads; several rows may read
            one, each as far as its own length. None: row b reads prefix b.
        backend: see ``rgtg_fast.ops``.

    Returns:
        ``[B, k, Hq, D]`` in q's dtype, contiguous.

    Raises:
        ValueError: for a wrong shape, dtype or value; BackendUnavailable for a missing backend.
            On a GPU, where reading them would wait for the device, rows are not checked: outside
            ``0 .. N - 1`` the result of a compiled backend is NaN.
    """
    check_attention(q, k_prefix, v_prefix, k_self, v_self, start, length, rows)
    if window is not None and not 1 <= window < 2**63:
        raise ValueError(
            f"window={window}; pass at least 1 (the query itself) and less than 2**63, or None"
        )
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
    return run("candidate_attention", backend, *arguments, window, softcap, rows)
