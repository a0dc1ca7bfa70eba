"""ratio_step in Triton: reward head, tempered softmax and Gumbel draw, one program per row.

``logprobs`` float32 ``[B, k]``, ``hidden [B, k, H]``, ``weight [H]``, ``ids`` int64 ``[B, k]``,
``beta, temperature, seed, position [B]`` -> ``slot`` int64 ``[B]``, ``rewards, logq`` float32
``[B, k]``; k <= 64.

One launch instead of ``reward_head`` and ``ratio_sample``, with the same results bit for bit: the
draw takes the rewards from registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgtg_fast.ops.registry import MAX_CANDIDATES

from .launch import check, check_shape, on_device
from .ratio_sample import check_policy, draw
from .reward_head import candidate_dots, check_head, tile


@triton.jit(do_not_specialize=["k", "logprobs_row", "ids_row"])
def _ratio_step(
    logprobs, hidden, weight, bias, ids, beta, temperature, seed, position,
    slot_out, rewards_out, logq_out, k,
    logprobs_row, logprobs_col, hidden_row, hidden_col, hidden_width, weight_width,
    ids_row, ids_col,
    SAMPLE: tl.constexpr, width: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr,
    ACC: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, K)
    live = slots < k
    rewards = candidate_dots(
        hidden + row * hidden_row, weight, bias, slots, live,
        hidden_col, hidden_width, weight_width, width, K, BLOCK_H, ACC, HAS_BIAS,
    )  # fmt: skip
    at = slots.to(tl.int64)
    slot, logq = draw(
        tl.load(logprobs + row * logprobs_row + at * logprobs_col, mask=live, other=0.0),
        rewards,
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
    tl.store(rewards_out + row * k + slots, rewards, mask=live)
    tl.store(logq_out + row * k + slots, logq, mask=live)


def ratio_step(
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
    rows, k = logprobs.shape
    check_shape("hidden", hidden, rows, k, hidden.shape[2])
    check_head(hidden, weight, bias)
    check_policy(logprobs, ids, beta, temperature, seed, position)
    # A row is one tile of candidates: any beyond it would silently be ignored.
    check(k <= MAX_CANDIDATES, f"k={k} must be at most {MAX_CANDIDATES}")
    slot = logprobs.new_empty((rows,), dtype=torch.int64)
    rewards, logq = logprobs.new_empty((rows, k)), logprobs.new_empty((rows, k))
    if rows == 0:
        return slot, rewards, logq
    with on_device(logprobs):
        _ratio_step[(rows,)](
            logprobs, hidden, weight, bias, ids, beta.contiguous(), temperature.contiguous(),
            seed.contiguous(), position.contiguous(), slot, rewards, logq, k,
            *logprobs.stride(), *hidden.stride(), weight.stride(0), *ids.stride(),
            SAMPLE=do_sample, HAS_BIAS=bias is not None, **tile(hidden, weight),
        )  # fmt: skip
    return slot, rewards, logq
