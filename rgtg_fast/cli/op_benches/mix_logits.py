"""Against torch's own chain: log_softmax of each tensor, the weighted sum, topk or a draw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..microbench import Case

VOCAB = 128_000


def chain(
    logits: list[Tensor],
    weights: Tensor,
    k: int,
    alpha: float | None = None,
    temperature: Tensor | None = None,
    *noise: Tensor,
) -> Any:
    scores = weights[:, :1] * torch.log_softmax(logits[0], dim=-1, dtype=torch.float32)
    for i, x in enumerate(logits[1:], 1):
        own = torch.log_softmax(x, dim=-1, dtype=torch.float32)
        scores = scores + weights[:, i : i + 1] * own
    if temperature is None:
        return scores.topk(k)
    return torch.softmax(scores / temperature.unsqueeze(1), dim=-1).multinomial(k)


def _case(rows: int, count: int, dtype: torch.dtype, device: str, draw: bool = False) -> Case:
    k = 1 if draw else 10

    def make() -> tuple:
        logits = [(torch.randn(rows, VOCAB, device=device) * 3).to(dtype) for _ in range(count)]
        weights = torch.tensor([1.0, 0.5, -0.5][:count], device=device).repeat(rows, 1)
        seeds = torch.arange(rows, device=device)
        policy = (None, torch.ones(rows, device=device), seeds, seeds) if draw else ()
        return logits, weights, k, *policy

    what = "draw" if draw else f"k={k}"
    label = f"B={rows} V={VOCAB} n={count} {str(dtype).removeprefix('torch.')} {what}"
    return Case(label, make, rows * (count * VOCAB * dtype.itemsize + 16 * k), chain)


def cases(device: str) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 8) if device == "cpu" else (1, 64, 256):
            for count in (2, 3):
                yield _case(rows, count, dtype, device)
            yield _case(rows, 2, dtype, device, draw=True)
