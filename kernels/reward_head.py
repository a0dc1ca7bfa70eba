"""reward_head in Triton: k dots of length H per row against one weight vector, one launch.

``hidden [B, k, H]``, ``weight [H]`` any float, ``bias`` one element or None -> float32 ``[B, k]``.

A program takes up to 64 candidates of a row in tiles of K x BLOCK_H and keeps one partial sum per
element of the tile (float32, or float64 if an input is), so that all loads of a tile are in flight
at once; the partial sums are added up at the end. ``ratio_step`` calls the same function on the
same tile and therefore gets the same rewards bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, check, check_shape, on_device, power_of_two

MAX_TILE_ROWS = 64


@triton.jit
def candidate_dots(
    hidden, weight, bias, slots, live, hidden_col, hidden_width, weight_width,
    width: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Rewards ``[K]`` of the candidates ``slots`` of the row at ``hidden``."""
    partial = tl.zeros([K, BLOCK_H], ACC)
    columns = tl.arange(0, BLOCK_H).to(tl.int64)
    rows = hidden + slots.to(tl.int64)[:, None] * hidden_col
    for start in range(0, width, BLOCK_H):
        h = start + columns
        inside = h < width
        w = tl.load(weight + h * weight_width, mask=inside, other=0.0).to(ACC)
        mask = live[:, None] & inside[None, :]
        x = tl.load(rows + h[None, :] * hidden_width, mask=mask, other=0.0).to(ACC)
        partial += x * w[None, :]
    reward = tl.sum(partial, axis=1)
    if HAS_BIAS:
        reward = reward.to(tl.float64) + tl.load(bias).to(tl.float64)
    return reward.to(tl.float32)


@triton.jit(do_not_specialize=["k"])
def _reward_head(
    hidden, weight, bias, out, k,
    hidden_row, hidden_col, hidden_width, weight_width,
    width: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * K + tl.arange(0, K)
    live = slots < k
    reward = candidate_dots(
        hidden + row * hidden_row, weight, bias, slots, live,
        hidden_col, hidden_width, weight_width, width, K, BLOCK_H, ACC, HAS_BIAS,
    )  # fmt: skip
    tl.store(out + row * k + slots, reward, mask=live)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_shape("weight", weight, hidden.shape[2])
    check(bias is None or bias.numel() == 1, "bias must have one element")


def tile(hidden: Tensor, weight: Tensor) -> dict:
    """Tile and warps of a head's launch: at most 32 Ki elements, half of it in float64."""
    acc = accumulator(hidden, weight)
    candidates = power_of_two(min(hidden.shape[1], MAX_TILE_ROWS))
    elements = 32768 if acc == tl.float32 else 16384
    block = min(power_of_two(hidden.shape[2], 16), elements // candidates, 4096)
    warps = min(16, max(1, candidates * block // 1024))
    return {
        "width": hidden.shape[2],
        "K": candidates,
        "BLOCK_H": block,
        "ACC": acc,
        "num_warps": warps,
        "enable_fp_fusion": False,
    }


def reward_head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, k, _ = hidden.shape
    check_head(hidden, weight, bias)
    out = hidden.new_empty((rows, k), dtype=torch.float32)
    if rows * k == 0:
        return out
    shape = tile(hidden, weight)
    with on_device(hidden):
        _reward_head[(rows, triton.cdiv(k, shape["K"]))](
            hidden, weight, bias, out, k,
            *hidden.stride(), weight.stride(0),
            HAS_BIAS=bias is not None, **shape,
        )  # fmt: skip
    return out
