"""Against torch's log_softmax + topk, on the logits as they are and widened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..microbench import Case, Function


def plain(logits: Tensor, k: int) -> Any:
    return torch.log_softmax(logits, dim=-1).topk(k)


def widened(logits: Tensor, k: int) -> Any:
    return torch.log_softmax(logits.float(), dim=-1).topk(k)


def _case(rows: int, vocab: int, k: int, dtype: torch.dtype, device: str, **others: Any) -> Case:
    def make() -> tuple:
        return (torch.randn(rows, vocab, device=device) * 3).to(dtype), k

    label = f"B={rows} V={vocab} {str(dtype).removeprefix('torch.')} k={k}"
    return Case(label, make, rows * (vocab * dtype.itemsize + 12 * k), widened, others)


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        others: dict[str, Function] = {}
        try:
            import flashinfer

            if hasattr(flashinfer, "top_k"):
                others["flashinfer"] = flashinfer.top_k
        except ImportError:
            pass
        for rows in (1, 64, 256):
            for k in (10, 64):
                yield _case(rows, 151_936, k, torch.bfloat16, device, **others)
        return
    yield _case(1, 512, 10, torch.float32, device)  # what a call costs the host
    for dtype in (torch.float32, torch.bfloat16):
        for vocab in (32_000, 131_072, 262_144):
            for rows in (1, 4, 16):
                own: dict[str, Any] = {} if dtype == torch.float32 else {"torch, as it is": plain}
                yield _case(rows, vocab, 10, dtype, device, **own)
