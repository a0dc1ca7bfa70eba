"""Losses that train a reward model on every prefix of an answer at once."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .checks import (
    answer_lengths,
    check_device,
    check_float,
    check_pair_prefixes,
    pair_margins,
    prefix_weights,
)
from .dispatch import Backend, run


class _PrefixBTLoss(torch.autograd.Function):
    """The forward computes the gradients too; the backward scales them by what comes in."""

    @staticmethod
    def forward(
        ctx: Any, r_chosen: Tensor, r_rejected: Tensor, backend: Backend, *rest: Any
    ) -> Tensor:
        loss, grad_chosen, grad_rejected = run(
            "prefix_bt_loss", backend, r_chosen, r_rejected, *rest
        )
        ctx.save_for_backward(grad_chosen, grad_rejected)
        ctx.dtype = r_chosen.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "prefix_bt_loss has no second derivative; call backward or grad without "
                "create_graph=True"
            )
        scale = upstream.unsqueeze(1)
        chosen, rejected = ((scale * grad).to(ctx.dtype) for grad in ctx.saved_tensors)
        return chosen, rejected, None, None, None, None, None, None, None, None


def prefix_bt_loss(
    r_chosen: Tensor,
    r_rejected: Tensor,
    mask_chosen: Tensor,
    mask_rejected: Tensor,
    *,
    first: int = 1,
    weights: Literal["uniform", "linear"] | Tensor = "uniform",
    margin: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
    extension: Literal["hold", "eos"] = "hold",
    reduction: Literal["mean", "none"] = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Bradley-Terry loss at every prefix length, from the rewards of one forward per answer.

    With ``r(i)`` the reward of an answer's first i tokens, i = first .. the length of the longer
    answer of a pair, and ``d(i) = r_chosen(i) - r_rejected(i) - margin``, the loss of a pair is
    the mean over i, weighted by ``w(i)``, of::

        -(1 - label_smoothing) * logsigmoid(d(i)) - label_smoothing * logsigmoid(-d(i))
            + centering * (r_chosen(i) + r_rejected(i)) ** 2

    which is the loss of PARGS (arXiv 2406.07780, section 4) without one row per prefix. Computed
    and summed in float32, for float64 rewards in float64. The forward computes the gradients as
    well; there is no second derivative. The full-sequence loss is that of the rewards of the whole
    answers alone, as ``[N, 1]``.

    Args:
        r_chosen, r_rejected: ``[N, L]`` rewards after each token of the answer, right-padded to
            the same L, of the same dtype (float64, float32, bfloat16 or float16), any strides.
        mask_chosen, mask_rejected: ``[N, L]`` bools or integers, 1 = real token (EOS is one), ones
            from position 0 on. Rewards that no prefix length uses are not used, not even if NaN.
        first: the shortest prefix length, >= 1.
        weights: ``"uniform"``, ``"linear"`` (``w(i) = i``, as RAD's cumulative loss), or ``[L]``
            finite numbers >= 0, element i - 1 for length i. Only their ratios matter.
        margin: by how much the chosen answer should win: a number, ``[N]``, or None for 0.
        label_smoothing: probability that a label is wrong, 0 <= label_smoothing < 0.5.
        centering: weight >= 0 of the squared sum of the two rewards, as TRL's
            ``center_rewards_coefficient``, averaged over i like the rest.
        extension: the shorter answer's rewards after its end: ``"hold"`` repeats the one at its
            last real token, which gets the gradient of all of them; ``"eos"`` takes what
            ``r_chosen`` or ``r_rejected`` holds there, the rewards after appended EOS tokens.
        reduction: ``"mean"`` over the pairs, or ``"none"`` for the loss of each.
        backend: see the module ``rgtg_fast.ops``.

    Returns:
        A scalar, or ``[N]``; float64 for float64 rewards, else float32. A NaN reward makes its own
        pair NaN and no other. Gradients have the rewards' dtype.

    Raises:
        ValueError: for a wrong shape, dtype or option and, on CPU outside of a compiled graph, for
            an empty answer, a mask with holes, a pair without a prefix of length ``first`` or with
            no weight. A GPU cannot say so: there such a pair's loss and gradients are NaN, and a
            mask with holes counts as a full one of as many ones. BackendUnavailable for a missing
            backend.
    """
    check_float("r_chosen", r_chosen, ("N", "L"))
    check_float("r_rejected", r_rejected, tuple(r_chosen.shape))
    if r_chosen.shape[1] == 0:
        raise ValueError("r_chosen has no positions; pass [N, L] with L >= 1")
    check_device("r_rejected", r_rejected, "r_chosen", r_chosen)
    if r_rejected.dtype != r_chosen.dtype:
        raise ValueError(
            f"r_rejected has dtype {r_rejected.dtype} and r_chosen {r_chosen.dtype}; pass the same"
        )
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}; pass 0 <= label_smoothing < 0.5")
    if not 0.0 <= centering < float("inf"):
        raise ValueError(f"centering={centering}; pass a finite number >= 0")
    if extension not in ("hold", "eos"):
        raise ValueError(f"extension={extension!r} is unknown; pass 'hold' or 'eos'")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; pass 'mean' or 'none'")
    if reduction == "mean" and r_chosen.shape[0] == 0:
        raise ValueError("r_chosen has no pairs to average; pass N >= 1 or reduction='none'")
    dtype = torch.promote_types(r_chosen.dtype, torch.float32)
    ends = [
        answer_lengths("mask_chosen", mask_chosen, r_chosen),
        answer_lengths("mask_rejected", mask_rejected, r_chosen),
    ]
    end = torch.maximum(*ends)
    per_length = prefix_weights(weights, r_chosen, dtype)
    check_pair_prefixes(first, end, weights)
    if extension == "eos":
        # Both count as long as the longer one, so that no reward is held; an empty answer must stay
        # empty to be found as an error.
        ends = [torch.where(own > 0, end, own) for own in ends]
    margins = pair_margins(margin, r_chosen, dtype)
    settings = (per_length, margins, float(label_smoothing), float(centering), int(first))
    loss = _PrefixBTLoss.apply(r_chosen, r_rejected, backend, *ends, *settings)
    return loss.mean() if reduction == "mean" else loss
