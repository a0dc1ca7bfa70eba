"""Against torch's linear layer, softmax and exponential race."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..microbench import Case
from .ratio_sample import policy, race


def chain(logprobs: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
    return race(logprobs, torch.nn.functional.linear(hidden, weight[None]).float()[..., 0], *rest)


def cases(device: str) -> Iterator[Case]:
    for rows in (1, 8, 64):

        def make(rows: int = rows) -> tuple:
            logprobs = torch.log_softmax(torch.randn(rows, 10, device=device), dim=1)
            hidden = torch.randn(rows, 10, 4096, device=device).bfloat16()
            weight = torch.randn(4096, device=device).bfloat16() / 64
            ids = torch.randint(0, 150_000, (rows, 10), device=device)
            return logprobs, hidden, weight, ids, *policy(rows, device)

        least = rows * 10 * (8192 + 24) + 8192
        yield Case(f"B={rows} k=10 H=4096 bfloat16", make, least, chain)
