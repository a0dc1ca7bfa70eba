"""Against torch's scaled_dot_product_attention with a 4D mask, concatenation included or not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..microbench import Case

Triple = tuple[Tensor, Tensor, Tensor]


def _concatenated(keys: Tensor, values: Tensor, own_key: Tensor, own_value: Tensor) -> Triple:
    """All keys, all values, and the mask by which a sibling sees the prefix and itself."""
    own = torch.eye(own_key.shape[1], dtype=torch.bool, device=keys.device)
    mask = torch.cat([own.new_ones(len(own), keys.shape[2]), own], dim=1)
    all_keys = torch.cat([keys, own_key.transpose(1, 2)], dim=2)
    all_values = torch.cat([values, own_value.transpose(1, 2)], dim=2)
    return (
        all_keys,
        all_values,
        torch.zeros_like(mask, dtype=keys.dtype).masked_fill(~mask, -torch.inf),
    )


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Any:
    q = q.transpose(1, 2)
    return scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=True)


def concatenate_and_attend(q: Tensor, *rest: Any) -> Any:
    return _attend(q, *_concatenated(*rest[:4]), rest[-1])


def cases(device: str) -> Iterator[Case]:
    kept = lru_cache(maxsize=64)(_concatenated)  # an entry for each copy of the inputs

    def attend(q: Tensor, *rest: Any) -> Any:
        return _attend(q, *kept(*rest[:4]), rest[-1])

    if device == "cuda":
        sizes = [(1, 32, 8, 128, 2048, 10), (8, 32, 8, 128, 8192, 10)]
        dtypes = [torch.bfloat16]
    else:
        grid = product(((12, 12), (32, 8)), (64, 256, 1024), (1, 10, 40))
        sizes = [(1, *heads, 64, prefix, k) for heads, prefix, k in grid]
        dtypes = [torch.float32, torch.bfloat16]
    for dtype, size in product(dtypes, sizes):
        rows, heads, key_heads, width, prefix, k = size

        def make(size: tuple = size, dtype: torch.dtype = dtype) -> tuple:
            rows, heads, key_heads, width, prefix, k = size
            past, own = (rows, key_heads, prefix, width), (rows, k, key_heads, width)
            shapes = ((rows, k, heads, width), past, past, own, own)
            tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            start = torch.zeros(rows, dtype=torch.int64, device=device)
            return *tensors, start, start + prefix, width**-0.5

        numbers = 2 * prefix * key_heads + 2 * k * (heads + key_heads)
        label = f"B={rows} T={prefix} k={k} {heads}/{key_heads}x{width} "
        label += str(dtype).removeprefix("torch.")
        least = rows * numbers * width * dtype.itemsize
        others = {"torch, concatenated before": attend}
        yield Case(label, make, least, concatenate_and_attend, others)
