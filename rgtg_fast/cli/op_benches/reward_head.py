"""Against torch's linear layer on the same hidden states, as they are and widened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..microbench import Case


def linear(hidden: Tensor, weight: Tensor) -> Any:
    return torch.nn.functional.linear(hidden, weight[None]).float()


def widened(hidden: Tensor, weight: Tensor) -> Any:
    return torch.nn.functional.linear(hidden.float(), weight.float()[None])


def cases(device: str) -> Iterator[Case]:
    gpu = ((1, 4096), (64, 4096))
    cpu = ((1, 64), (1, 768), (8, 768), (1, 4096), (8, 4096), (64, 4096))
    for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
        for rows, width in gpu if device == "cuda" else cpu:

            def make(rows: int = rows, width: int = width, dtype: torch.dtype = dtype) -> tuple:
                hidden = torch.randn(rows, 10, width, device=device).to(dtype)
                return hidden, torch.randn(width, device=device).to(dtype)

            least = rows * 10 * (width * dtype.itemsize + 4) + width * dtype.itemsize
            others = {} if dtype == torch.float32 else {"torch, widened": widened}
            label = f"B={rows} k=10 H={width} {str(dtype).removeprefix('torch.')}"
            yield Case(label, make, least, linear, others)
