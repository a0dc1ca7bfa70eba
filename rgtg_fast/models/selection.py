"""Some of the k candidates as one batch of tokens for a forward."""

from __future__ import annotations

import torch
from torch import Tensor


class Selection:
    """The kept candidates `keep` [B, k] of a step, as a batch of tokens for one forward.

    Dense: [B, n], n the largest count of any row; a row's kept candidates come first, in order, and
    others fill it up. `packed`, where counts differ and `packs` allows it: the N kept ones of all
    rows in one row [1, N], so that no layer computes a filler; attention, which needs the rows,
    spreads them out and packs its result (`spread`, `pack`). At least one must be kept.
    """

    def __init__(self, keep: Tensor, packs: bool) -> None:
        counts = keep.sum(1)
        self.keep, self.width = keep, int(counts.max())
        self.rank = keep.cumsum(1) - 1  # [B, k], a kept candidate's place among those of its row
        self.packed = packs and int(counts.sum()) < self.width * len(keep)
        if self.packed:
            self.rows = keep.nonzero()[:, 0]  # [N]
            self.places = self.rows * self.width + self.rank[keep]  # [N], in [B, n] flattened

    def take(self, x: Tensor) -> Tensor:
        """The tokens [B, n] or [1, N] of `x` [B, k]."""
        if self.packed:
            return x[self.keep][None]
        order = (~self.keep).byte().argsort(dim=1, stable=True)
        return x.gather(1, order[:, : self.width])

    def put_back(self, values: Tensor) -> Tensor:
        """Values of the tokens as [B, k]; NaN where a candidate was not kept."""
        if self.packed:
            out = values.new_full(self.keep.shape, torch.nan)
            out[self.keep] = values[0]
            return out
        return values.gather(1, self.rank.clamp(min=0)).masked_fill(~self.keep, torch.nan)

    def places_of(self, slot: Tensor, at: Tensor | None = None) -> Tensor:
        """Where candidate `slot` [n] is among the tokens of its row, of the rows `at` [n] (None:
        all); 0 where nothing of it was kept."""
        rank = self.rank if at is None else self.rank[at]
        return rank.gather(1, slot[:, None])[:, 0].clamp(min=0)

    def states_of(self, slot: Tensor, states: Tensor, at: Tensor | None = None) -> Tensor:
        """Of the tokens' states [B, m, H] or [1, N, H], those of candidate `slot` [n] of the rows
        `at` (as in `places_of`): [n, H]; of a row of which nothing was kept, any."""
        places = self.places_of(slot, at)
        rows = torch.arange(len(self.keep), device=states.device) if at is None else at
        if self.packed:
            counts = self.keep.sum(1)
            first = (counts.cumsum(0) - counts)[rows]
            return states[0, (first + places).clamp(max=states.shape[1] - 1)]
        return states[rows, places]

    def spread(self, states: Tensor) -> Tensor:
        """Packed attention heads [1, H, N, D] as [B, H, n, D], zero where there is no token."""
        _, heads, _, dim = states.shape
        batch = len(self.keep)
        out = states.new_zeros((batch * self.width, heads, dim))
        out.index_copy_(0, self.places.to(states.device), states[0].transpose(0, 1))
        return out.view(batch, self.width, heads, dim).transpose(1, 2)

    def pack(self, out: Tensor) -> Tensor:
        """Attention's result [B, n, H, D] as [1, N, H, D]."""
        return out.flatten(0, 1).index_select(0, self.places.to(out.device))[None]
