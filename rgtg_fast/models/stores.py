"""Where the layers of a `SiblingCache` have their keys and values: one tensor for all alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Prompt:
    """The keys and values [n, Hkv, P, D] of a layer, held while the layer turns to the stores."""

    def __init__(self, layer: Any) -> None:
        self.keys, self.values = layer.keys, layer.values


def empty_stores(layers: Sequence[Any], prompts: Sequence[Any], length: int) -> list[Tensor]:
    """Stores [n, Hkv, 0, D], one for each device, dtype, heads and width of the keys and values of
    `prompts` (one for each layer, of `length` tokens); `at` of a layer then says which store, and
    which part of it, its keys and its values have."""
    groups: dict[tuple, int] = {}
    for own, prompt in zip(layers, prompts, strict=True):
        own.at = {}
        for name in ("keys", "values"):
            t = getattr(prompt, name)
            _, heads, tokens, dim = t.shape
            if tokens != length:
                raise ValueError(f"the cache holds {tokens} prompt tokens, expected {length}")
            key = t.device, t.dtype, heads, dim
            members = groups[key] = groups.get(key, 0) + 1
            own.at[name] = list(groups).index(key), members - 1
    return [
        torch.empty((n, heads, 0, dim), dtype=dtype, device=device)
        for (device, dtype, heads, dim), n in groups.items()
    ]
