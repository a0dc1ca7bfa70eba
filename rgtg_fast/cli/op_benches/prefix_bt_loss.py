"""Forward and backward, against the same composed of torch's functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.dispatch import Backend
from ..microbench import Case


def pair_step(*arguments: Any, backend: Backend = "auto") -> tuple[Tensor, ...]:
    """The prefix loss and its gradients."""
    loss = ops.prefix_bt_loss(*arguments, backend=backend)
    return loss.detach(), *torch.autograd.grad(loss, arguments[:2])


def torch_pair_step(
    chosen: Tensor, rejected: Tensor, mask_chosen: Tensor, mask_rejected: Tensor
) -> tuple[Tensor, ...]:
    """:func:`pair_step` as one writes it in torch."""
    ends = mask_chosen.sum(dim=1, keepdim=True), mask_rejected.sum(dim=1, keepdim=True)
    at = torch.arange(chosen.shape[1], device=chosen.device)
    x = chosen.gather(1, torch.minimum(at, ends[0] - 1)).float()
    y = rejected.gather(1, torch.minimum(at, ends[1] - 1)).float()
    live = at < torch.maximum(*ends)
    losses = torch.where(live, -torch.nn.functional.logsigmoid(x - y), 0.0)
    loss = (losses.sum(dim=1) / live.sum(dim=1)).mean()
    return loss.detach(), *torch.autograd.grad(loss, (chosen, rejected))


def draw_pairs(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple:
    """Rewards that need gradients, and masks of answers of half the width or more."""
    shape = (rows, width)
    rewards = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2)]
    lengths = [torch.randint(width // 2, width + 1, (rows, 1), device=device) for _ in range(2)]
    return *rewards, *(torch.arange(width, device=device) < length for length in lengths)


def cases(device: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
        for rows, width in ((8, 64), (64, 128), (64, 512), (256, 512)):

            def make(rows: int = rows, width: int = width, dtype: torch.dtype = dtype) -> tuple:
                return draw_pairs(rows, width, dtype, device)

            label = f"N={rows} L={width} {str(dtype).removeprefix('torch.')}, with backward"
            least = rows * width * 4 * dtype.itemsize
            yield Case(label, make, least, torch_pair_step, {}, pair_step)
