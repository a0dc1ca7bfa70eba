"""Against the usual chain in torch: softmax, then the exponential race."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..microbench import Case


def policy(rows: int, device: str) -> tuple:
    """Row tensors, as a loop holds them: nothing is uploaded or split in the measured call."""
    one = torch.ones(rows, device=device)
    seeds = torch.arange(rows, device=device)
    return one, one, seeds, seeds, True


def race(logprobs: Tensor, rewards: Tensor, ids: Tensor, beta: Tensor, t: Tensor, *_: Any) -> Any:
    logq = torch.log_softmax((logprobs + beta[:, None] * rewards) / t[:, None], dim=1)
    return (logq - torch.empty_like(logq).exponential_().log()).argmax(dim=1), logq


def cases(device: str) -> Iterator[Case]:
    for rows, k in ((1, 10), (8, 10), (64, 10), (256, 10), (64, 64)):

        def make(rows: int = rows, k: int = k) -> tuple:
            logprobs = torch.log_softmax(torch.randn(rows, k, device=device) * 3, dim=1)
            ids = torch.randint(0, 128_000, (rows, k), device=device)
            return logprobs, torch.randn(rows, k, device=device), ids, *policy(rows, device)

        yield Case(f"B={rows} k={k}", make, rows * k * 20, race)
