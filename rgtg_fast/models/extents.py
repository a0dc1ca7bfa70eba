"""Where rows of different lengths lie in one store: a contiguous run of slots each, first fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Extent(NamedTuple):
    """The slots `start .. start + size` of a row."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


def in_order(sizes: Sequence[int]) -> list[Extent]:
    """Extents of these sizes, one behind the other."""
    extents, start = [], 0
    for size in sizes:
        extents.append(Extent(start, size))
        start += size
    return extents


def fitted(extents: Sequence[Extent], total: int, sizes: Sequence[int]) -> list[Extent] | None:
    """Extents of `sizes` in what `extents` leave free of `total` slots, in the smallest gap that
    holds each; None where one finds no gap."""
    taken, placed = sorted(extents), []
    for size in sizes:
        begins = [0, *(extent.end for extent in taken)]
        ends = [*(extent.start for extent in taken), total]
        gaps = [(end - begin, begin) for begin, end in zip(begins, ends, strict=True)]
        fits = [gap for gap in gaps if gap[0] >= size]
        if not fits:
            return None
        extent = Extent(min(fits)[1], size)
        placed.append(extent)
        taken = sorted([*taken, extent])
    return placed
