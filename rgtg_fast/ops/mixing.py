"""The mixture of several models' log-probabilities: mix_logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .checks import check_device, check_float, check_k, mixture_weights, per_row_draw
from .dispatch import Backend, limit_k, limit_mixed, run
from .nucleus import mix_nucleus


def mix_logits(
    logits: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    k: int,
    alpha: float | None = None,
    temperature: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    *,
    top_p: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The ``k`` best tokens of ``s = sum_i w_i log softmax(logits[i])``, or draws of softmax(s/T).

    One read of each tensor. It is what mixes whole policies: GenARM ``log pi + a log pi_r`` (arXiv
    2410.08193) has weights (1, a), Nash-MD's ``pi^(1-b) mu^b`` (arXiv 2312.00886) has (1 - b, b),
    DExperts and proxy-tuning ``z + a (z+ - z-)`` (arXiv 2105.03023, 2401.08565) have (1, a, -a),
    contrastive decoding (arXiv 2210.15097) has (1, -1) and ``alpha``. Logits need not be
    normalised: a tensor's log-sum-exp moves all scores of a row alike, which changes neither the
    order nor softmax(s / T).

    Which tokens can be chosen: ``logits[0]`` is the language model's, and its V is the vocabulary.
    An id that another tensor lacks (>= its V_i) counts as -inf there, ids beyond V are in that
    tensor's own log-sum-exp alone. A token that is -inf in ``logits[0]``, or in a tensor whose
    weight is not 0, has ``s = -inf`` and is never drawn, whatever the sign of the weight. A tensor
    of weight 0 takes no part. With ``alpha`` the tokens with ``p_0 < alpha max p_0`` have
    ``s = -inf`` too.

    Tokens come in the order of ``sum_i w_i logits[i]`` in float32 (added from left to right, each
    operation rounded once), descending, then by id ascending: the same ids on every backend. With
    ``temperature``, ``seed`` and ``position`` they come in the order of that sum / T + g, with the
    Gumbel noise ``g`` of (row seed, position, token id) that :func:`ratio_sample` uses: the first
    is a draw of softmax(s / T) over the whole vocabulary, the k of them are draws without
    replacement. A NaN or +inf in a tensor makes what depends on it NaN in that row, and no other.

    With ``top_p`` and a temperature only the nucleus of softmax(s / T) can be drawn: its most
    likely tokens, up to the one with which their shares reach ``top_p``; all others have
    ``s = -inf``, and the last two results are those of the nucleus.

    Args:
        logits: n tensors ``[B, V_i]``, each of any float dtype and strides; n <= 4 unless
            ``backend="reference"``.
        weights: n finite numbers, or float ``[n]`` or ``[B, n]``; any sign.
        k: tokens per row, 1 <= k <= V, and at most 64 unless ``backend="reference"``.
        alpha: the share of the largest probability of ``logits[0]``, 0 < alpha <= 1, that a
            plausible token has; None for no such bound. It costs a second read of ``logits[0]``.
        temperature: a positive finite number or ``[B]``; None where neither a draw nor the last
            two results are wanted.
        top_p: 0 < top_p <= 1, which takes a ``temperature``; None for the whole policy. Each tensor
            is read once where the 64 most likely tokens have that share, and a row where they have
            not is sorted as a whole in float64, so that ``torch.compile`` breaks its graph here.
        seed, position: as for :func:`ratio_sample`, both or none; they take a ``temperature``.
        backend: see ``rgtg_fast.ops``.

    Returns:
        ``scores`` s float32 ``[B, k]``, ``ids`` int64 ``[B, k]``, ``logprobs`` of ``logits[0]`` at
        these ids float32 ``[B, k]``, and with a temperature, else empty, float32 ``[B]`` each:
        ``log_norm = log sum exp(s / T)``, so that the log-probability of a token in the mixture is
        ``scores / T - log_norm``, and ``kl``, the divergence of softmax(s / T) from
        softmax(logits[0]) over the whole vocabulary in nats. Where no token can be chosen scores
        are -inf and ``kl`` is NaN.

    Raises:
        ValueError: for a wrong shape, dtype or value; BackendUnavailable for a missing backend.
    """
    given = list(logits)
    if not given:
        raise ValueError("logits is empty; pass the language model's logits [B, V] and others")
    check_float("logits[0]", given[0], ("B", "V"))
    rows, vocab = given[0].shape
    for i, other in enumerate(given[1:], 1):
        check_float(f"logits[{i}]", other, (rows, "V"))
        check_device(f"logits[{i}]", other, "logits[0]", given[0])
    check_k(k, vocab)
    limit_k(k, "mix_logits", backend, given[0])
    limit_mixed(len(given), backend, given[0])
    shares = mixture_weights(weights, len(given), given[0])
    floor = None
    if alpha is not None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha={alpha}; pass a share in (0, 1], or None for no bound")
        floor = given[0].amax(dim=1).to(torch.float32) + math.log(alpha)
    tempered, *noise = per_row_draw(temperature, seed, position, rows, given[0].device)
    if top_p is None:
        return run("mix_logits", backend, given, shares, k, floor, tempered, *noise)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; pass a share in (0, 1], or None for the whole policy")
    if tempered is None:
        raise ValueError("top_p came without temperature; pass temperature=1.0 for softmax(s)")
    mix, sample = (partial(run, op, backend) for op in ("mix_logits", "ratio_sample"))
    return mix_nucleus(mix, sample, given, shares, k, top_p, floor, tempered, *noise)
