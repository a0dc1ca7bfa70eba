"""prefix_bt_loss in Triton: the losses of the pairs and their gradients in one launch.

``r_chosen``, ``r_rejected`` ``[N, L]`` any float, lengths int64 ``[N]``, weights ``[L]``, margin
``[N]`` -> loss ``[N]`` and two gradients ``[N, L]``, float32 (float64 for float64 rewards).

Grid (N): a program sums the weights of its pair's prefix lengths, then reads the rewards once. Past
its end an answer keeps the reward of its last token; that token's gradient collects all those
prefix lengths and is stored once, at the end. A pair without prefixes or with lengths outside
1 .. L reads nothing and is NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, check, check_shape, on_device, power_of_two

# L differs from batch to batch. The kernel is compiled per power of two up to this, then per
# multiple of it, and not for every L.
MAX_BLOCK = 512


@triton.jit
def _exp(x):
    """exp(x) for x <= 0, to an ulp or two: the float32 instruction errs by |x| ulps."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    x = tl.where(x < -104.0, -104.0, x)  # tl.minimum would drop a NaN
    n = tl.floor(x * 1.44269504 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = r * 1.38436537e-3 + 8.3741555e-3
    p = p * r + 4.16680016e-2
    p = p * r + 1.66664317e-1
    p = p * r + 4.9999994e-1
    return (p * r * r + r + 1.0) * tl.exp2(n)


@triton.jit
def _log1p(t, TERMS: tl.constexpr):
    """log(1 + t) = 2 artanh(t / (2 + t)) for 0 <= t <= 1, by its series."""
    s = t / (t + 2.0)
    square = s * s
    series = tl.full(t.shape, 2.0 / (2 * TERMS + 1), t.dtype)
    for k in tl.static_range(TERMS):
        series = series * square + tl.full(t.shape, 2.0 / (2 * (TERMS - k) - 1), t.dtype)
    return s * series


@triton.jit
def _store_own(grad, here, width, last, defined, value):
    """The gradients before the last token and the zeros after it; NaN if not ``defined``."""
    inside = (here < width) & (here != tl.where(defined, last, -1))
    value = tl.where(defined, tl.where(here < last, value, 0.0), float("nan"))
    tl.store(grad + here, value, mask=inside)


@triton.jit(do_not_specialize=["width", "first", "chosen_row", "rejected_row"])
def _prefix_bt_loss(
    chosen, rejected, len_chosen, len_rejected, weights, margin, loss, grad_chosen, grad_rejected,
    width, first, chosen_row, chosen_col, rejected_row, rejected_col, weights_col,
    SMOOTHING: tl.constexpr, CENTERING: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ACC: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    last_chosen, last_rejected = tl.load(len_chosen + pair) - 1, tl.load(len_rejected + pair) - 1
    end = tl.maximum(last_chosen, last_rejected) + 1
    defined = (tl.minimum(last_chosen, last_rejected) >= 0) & (end <= width) & (end >= first)
    # `& defined` in the blocks' masks would do, but the interpreter of Triton 3.9 makes integers of
    # a block's condition and a scalar one, and takes no such mask.
    stop = tl.where(defined, end, 0)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    weight_sum = tl.zeros([BLOCK], tl.float64)
    for block in range(BLOCKS):
        here = block * BLOCK + columns
        live = (here >= first - 1) & (here < stop)
        weight_sum += tl.load(weights + here * weights_col, mask=live, other=0.0).to(tl.float64)
    scale = (1.0 / tl.sum(weight_sum, axis=0)).to(ACC)

    shift = tl.load(margin + pair)
    chosen += pair * chosen_row
    rejected += pair * rejected_row
    grad_chosen += pair * width
    grad_rejected += pair * width
    total = tl.zeros([BLOCK], tl.float64)
    held_chosen = tl.zeros([BLOCK], tl.float64)
    held_rejected = tl.zeros([BLOCK], tl.float64)
    for block in range(BLOCKS):
        here = block * BLOCK + columns
        live = (here >= first - 1) & (here < stop)
        at_chosen, at_rejected = tl.minimum(here, last_chosen), tl.minimum(here, last_rejected)
        x = tl.load(chosen + at_chosen * chosen_col, mask=live, other=0.0).to(ACC)
        y = tl.load(rejected + at_rejected * rejected_col, mask=live, other=0.0).to(ACC)
        share = tl.load(weights + here * weights_col, mask=live, other=0.0) * scale
        share = tl.where(live, share, 0.0)
        gap = tl.where(live, x - y - shift, 0.0)
        t = _exp(-tl.abs(gap))
        value = _log1p(t, TERMS) + tl.where(gap > 0, 0.0, -gap)
        slope = -tl.where(gap > 0, t, 1.0) / (t + 1.0)
        pull = tl.zeros([BLOCK], ACC)
        if SMOOTHING != 0:
            smoothing = tl.full([BLOCK], SMOOTHING, ACC)
            value += smoothing * gap
            slope += smoothing
        if CENTERING != 0:
            scaled = tl.full([BLOCK], CENTERING, ACC) * (x + y)
            value += scaled * (x + y)
            pull = scaled + scaled
        own_chosen, own_rejected = share * (pull + slope), share * (pull - slope)
        total += (share * value).to(tl.float64)
        held_chosen += tl.where(here >= last_chosen, own_chosen, 0.0).to(tl.float64)
        held_rejected += tl.where(here >= last_rejected, own_rejected, 0.0).to(tl.float64)
        _store_own(grad_chosen, here, width, last_chosen, defined, own_chosen)
        _store_own(grad_rejected, here, width, last_rejected, defined, own_rejected)
    tl.store(loss + pair, tl.where(defined, tl.sum(total, axis=0), float("nan")))
    tl.store(grad_chosen + last_chosen, tl.sum(held_chosen, axis=0), mask=defined)
    tl.store(grad_rejected + last_rejected, tl.sum(held_rejected, axis=0), mask=defined)


def prefix_bt_loss(
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
    rows, width = r_chosen.shape
    check_shape("r_rejected", r_rejected, rows, width)
    check_shape("weights", weights, width)
    per_pair = {"len_chosen": len_chosen, "len_rejected": len_rejected, "margin": margin}
    for name, tensor in per_pair.items():
        check_shape(name, tensor, rows)
    check(first >= 1, f"first={first} must be at least 1")
    wide = r_chosen.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    loss = r_chosen.new_empty((rows,), dtype=dtype)
    grads = [r_chosen.new_empty((rows, width), dtype=dtype) for _ in range(2)]
    if rows == 0:
        return loss, grads[0], grads[1]
    block = min(power_of_two(width, 16), MAX_BLOCK)
    with on_device(r_chosen):
        _prefix_bt_loss[(rows,)](
            r_chosen, r_rejected, len_chosen.contiguous(), len_rejected.contiguous(), weights,
            margin.contiguous(), loss, *grads, width, first, *r_chosen.stride(),
            *r_rejected.stride(), weights.stride(0), SMOOTHING=label_smoothing,
            CENTERING=centering, BLOCK=block, BLOCKS=triton.cdiv(width, block),
            ACC=accumulator(r_chosen), TERMS=16 if wide else 8, num_warps=4,
        )  # fmt: skip
    return loss, grads[0], grads[1]
