"""vocab_reward in Triton: k rows of a V x H reward head gathered and dotted, one launch.

``hidden [B, H]``, ``weight [V, H]`` any float, ``ids`` int64 ``[B, k]`` -> float32 ``[B, k]``.

Grid (B, k / 8): one program per row of the batch would leave most of the memory system idle. A
program gathers tiles of 8 x BLOCK_H and keeps one partial sum per element of the tile. An id
outside the vocabulary reads nothing and gives NaN: a device cannot raise without a synchronisation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, check_shape, on_device, power_of_two

GATHERED = 8


@triton.jit(do_not_specialize=["k", "ids_row"])
def _vocab_reward(
    hidden, weight, ids, out, vocab, k,
    hidden_row, hidden_width, weight_row, weight_width, ids_row, ids_col,
    width: tl.constexpr, GATHERED: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1).to(tl.int64) * GATHERED + tl.arange(0, GATHERED)
    live = slots < k
    token = tl.load(ids + row * ids_row + slots * ids_col, mask=live, other=0)
    known = (token >= 0) & (token < vocab)
    readable = live & known
    partial = tl.zeros([GATHERED, BLOCK_H], ACC)
    columns = tl.arange(0, BLOCK_H).to(tl.int64)
    rows = weight + token[:, None] * weight_row
    for start in range(0, width, BLOCK_H):
        h = start + columns
        inside = h < width
        x = tl.load(hidden + row * hidden_row + h * hidden_width, mask=inside, other=0.0).to(ACC)
        mask = readable[:, None] & inside[None, :]
        w = tl.load(rows + h[None, :] * weight_width, mask=mask, other=0.0).to(ACC)
        partial += w * x[None, :]
    reward = tl.where(known, tl.sum(partial, axis=1), float("nan"))
    tl.store(out + row * k + slots, reward.to(tl.float32), mask=live)


def vocab_reward(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    rows, k = ids.shape
    check_shape("hidden", hidden, rows, weight.shape[1])
    out = hidden.new_empty((rows, k), dtype=torch.float32)
    if rows * k == 0:
        return out
    acc = accumulator(hidden, weight)
    width = hidden.shape[1]
    block = min(power_of_two(width, 16), 1024 if acc == tl.float32 else 512)
    with on_device(hidden):
        _vocab_reward[(rows, triton.cdiv(k, GATHERED))](
            hidden, weight, ids, out, weight.shape[0], k,
            *hidden.stride(), *weight.stride(), *ids.stride(),
            width=width, GATHERED=GATHERED, BLOCK_H=block, ACC=acc, num_warps=4,
        )  # fmt: skip
    return out
