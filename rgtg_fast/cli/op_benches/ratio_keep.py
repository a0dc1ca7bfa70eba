"""Against the same bounds in torch, for rewards between -1 and 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..microbench import Case
from .ratio_sample import policy


def bounds(
    logprobs: Tensor, ids: Tensor, beta: Tensor, t: Tensor, seed: Tensor, position: Tensor,
    do_sample: bool, low: float, high: float,
) -> Any:  # fmt: skip
    """With torch's own noise, so the rows kept are others; the work is the same."""
    noise = -torch.empty_like(logprobs).exponential_().log()
    at_low, at_high = ((logprobs + beta[:, None] * r) / t[:, None] + noise for r in (low, high))
    floor = torch.minimum(at_low, at_high).amax(dim=1, keepdim=True)
    return torch.maximum(at_low, at_high) >= floor


def cases(device: str) -> Iterator[Case]:
    for rows, k in ((1, 10), (64, 10), (64, 64)):

        def make(rows: int = rows, k: int = k) -> tuple:
            logprobs = torch.log_softmax(torch.randn(rows, k, device=device) * 3, dim=1)
            ids = torch.randint(0, 128_000, (rows, k), device=device)
            return logprobs, ids, *policy(rows, device), -1.0, 1.0

        yield Case(f"B={rows} k={k}", make, rows * k * 13, bounds)
