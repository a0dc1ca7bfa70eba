"""Against a gather + product in torch, and on a CPU against the dense head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..microbench import Case


def gathered(hidden: Tensor, weight: Tensor, ids: Tensor) -> Any:
    return (weight[ids] * hidden[:, None]).sum(dim=-1)


def dense(hidden: Tensor, weight: Tensor, ids: Tensor) -> Any:
    return (hidden @ weight.t()).gather(1, ids)


def cases(device: str) -> Iterator[Case]:
    gpu = device == "cuda"
    vocab, width = (128_000, 4096) if gpu else (32_000, 1024)
    for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):

        @cache  # one weight for all copies of the inputs, made with the first
        def weight(dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(vocab, width, device=device).to(dtype)

        for rows, k in ((1, 10), (64, 10), (64, 64)) if gpu else ((1, 10), (8, 10), (64, 10)):

            def make(rows: int = rows, k: int = k, weight: Any = weight) -> tuple:
                hidden = torch.randn(rows, width, device=device).to(weight().dtype)
                return hidden, weight(), torch.randint(0, vocab, (rows, k), device=device)

            least = rows * k * (width * dtype.itemsize + 12)
            label = f"B={rows} k={k} V={vocab} H={width} {str(dtype).removeprefix('torch.')}"
            yield Case(label, make, least, gathered, {} if gpu else {"torch, dense head": dense})
