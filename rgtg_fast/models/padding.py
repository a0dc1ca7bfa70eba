"""Left-padded rows: positions, the last real token, masks that hide tokens in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids [n, P] and mask [n, P] of rows (int64 [P_i] each), padded on the left with 0."""
    ids = pad_sequence([row.flip(0) for row in rows], batch_first=True).flip(1)
    ones = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(ones, batch_first=True).flip(1)


def groups_of_like_length(rows: Sequence[Tensor]) -> list[list[Tensor]]:
    """The rows in runs, each to be padded to its longest: at most a quarter of it is padding."""
    groups: list[list[Tensor]] = []
    for row in rows:
        group = [*groups[-1], row] if groups else [row]
        lengths = [len(r) for r in group]
        if groups and 3 * max(lengths) * len(group) <= 4 * sum(lengths):
            groups[-1] = group
        else:
            groups.append([row])
    return groups


def without_copies(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prompts [N, P] and masks without those like the one before (as `num_return_sequences` gives
    them), and which of these is that of each row, int64 [B]; None where there are no copies."""
    again = (ids[1:] == ids[:-1]).all(1) & (mask[1:] == mask[:-1]).all(1)
    if not again.any():
        return ids, mask, None
    new = torch.nn.functional.pad(~again, (1, 0), value=True)
    return ids[new], mask[new], new.long().cumsum(0) - 1


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids [B, P] of left-padded rows: 0 for padding and for the first real token."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_real(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden state [B, 1, H] at each row's last real token."""
    index = attention_mask.shape[1] - 1 - attention_mask.flip(-1).long().argmax(-1)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, index.to(hidden.device)][:, None]


def at_counts(hidden: Tensor, counts: Tensor) -> Tensor:
    """The hidden state [n, 1, H] at the last of the first `counts` [n] tokens of each row."""
    index = (counts.to(hidden.device) - 1).clamp(min=0)
    return hidden[torch.arange(len(index), device=hidden.device), index][:, None]


def has_holes(attention_mask: Tensor) -> bool:
    """Whether a row of the mask [B, P] hides something after its first real token."""
    return bool(((attention_mask != 0).long().diff(dim=-1) < 0).any())
