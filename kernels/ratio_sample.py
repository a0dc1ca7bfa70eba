"""ratio_sample in Triton: combine, temper, normalise and draw, one program per row, one launch.

``logprobs, rewards`` float32 and ``ids`` int64 ``[B, k]``; ``beta, temperature`` float32 and
``seed, position`` int64 ``[B]`` -> ``slot`` int64 ``[B]``, ``logq`` float32 ``[B, k]``.

The k candidates are one tile. Scores and noise are float32, each operation rounded once (no fused
multiply-add, correctly rounded division), so that slots are those of every other backend; the
normaliser of ``logq`` is summed in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gumbel import gumbel_noise
from .launch import check_shape, on_device, power_of_two


@triton.jit
def draw(
    logprobs, rewards, ids, beta, temperature, seed, position, live, slots,
    SAMPLE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The slot and ``logq [K]`` of one row; slots that are not ``live`` hold no candidate."""
    # What has a reward of -inf is no token, whatever beta is; 0 * -inf would be NaN.
    scores = logprobs + tl.where(rewards == float("-inf"), rewards, beta * rewards)
    tempered = tl.where(live, tl.div_rn(scores, temperature), -float("inf"))
    is_nan = tempered != tempered
    undefined = is_nan | (tempered == float("inf"))
    usable = (undefined == 0) & (tempered != -float("inf"))
    value = scores
    if SAMPLE:
        value = tempered + gumbel_noise(seed, position, ids)
    value = tl.where(usable, value, -float("inf"))
    best = usable & (value == tl.max(value, axis=0))
    slot = tl.min(tl.where(best, slots, K), axis=0)
    hopeless = (tl.max(undefined.to(tl.int32), axis=0) == 1) | (slot == K)

    largest = tl.max(tl.where(usable, tempered, -float("inf")), axis=0).to(tl.float64)
    shifted = tl.where(usable, tempered.to(tl.float64) - largest, -float("inf"))
    log_sum = tl.log(tl.sum(tl.where(usable, tl.exp(shifted), 0.0), axis=0))
    logq = tl.where(hopeless, float("nan"), (shifted - log_sum).to(tl.float32))
    return tl.where(hopeless, -1, slot), logq


@triton.jit(do_not_specialize=["k", "logprobs_row", "rewards_row", "ids_row"])
def _ratio_sample(
    logprobs, rewards, ids, beta, temperature, seed, position, slot_out, logq_out, k,
    logprobs_row, logprobs_col, rewards_row, rewards_col, ids_row, ids_col,
    SAMPLE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, K)
    live = slots < k
    at = slots.to(tl.int64)
    slot, logq = draw(
        tl.load(logprobs + row * logprobs_row + at * logprobs_col, mask=live, other=0.0),
        tl.load(rewards + row * rewards_row + at * rewards_col, mask=live, other=0.0),
        tl.load(ids + row * ids_row + at * ids_col, mask=live, other=0),
        tl.load(beta + row),
        tl.load(temperature + row),
        tl.load(seed + row),
        tl.load(position + row),
        live,
        slots,
        SAMPLE,
        K,
    )
    tl.store(slot_out + row, slot.to(tl.int64))
    tl.store(logq_out + row * k + slots, logq, mask=live)


def check_policy(logprobs: Tensor, ids: Tensor, *per_row: Tensor) -> None:
    """``per_row``: beta, temperature, seed and position."""
    check_shape("ids", ids, *logprobs.shape)
    for name, tensor in zip(("beta", "temperature", "seed", "position"), per_row, strict=True):
        check_shape(name, tensor, logprobs.shape[0])


def ratio_sample(
    logprobs: Tensor,
    rewards: Tensor,
    ids: Tensor,
    beta: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    do_sample: bool,
) -> tuple[Tensor, Tensor]:
    rows, k = logprobs.shape
    check_shape("rewards", rewards, rows, k)
    check_policy(logprobs, ids, beta, temperature, seed, position)
    slot = logprobs.new_empty((rows,), dtype=torch.int64)
    logq = logprobs.new_empty((rows, k))
    if rows == 0:
        return slot, logq
    with on_device(logprobs):
        _ratio_sample[(rows,)](
            logprobs, rewards, ids, beta.contiguous(), temperature.contiguous(),
            seed.contiguous(), position.contiguous(), slot, logq, k,
            *logprobs.stride(), *rewards.stride(), *ids.stride(),
            SAMPLE=do_sample, K=power_of_two(k), num_warps=1 if k <= 64 else 4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return slot, logq
