"""Left-padded rows: positions, the last real token, masks that hide tokens in between."""

from __future__ import annotations

import torch
from torch import Tensor


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids [B, P] of left-padded rows: 0 for padding and for the first real token."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_real(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden state [B, 1, H] at each row's last real token."""
    index = attention_mask.shape[1] - 1 - attention_mask.flip(-1).long().argmax(-1)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, index.to(hidden.device)][:, None]


def has_holes(attention_mask: Tensor) -> bool:
    """Whether a row of the mask [B, P] hides something after its first real token."""
    return bool(((attention_mask != 0).long().diff(dim=-1) < 0).any())
