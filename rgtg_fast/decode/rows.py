"""The rows of a run, in place: prompts, answers so far, and which of them have ended."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan

ROOM = 512  # steps that buffers have room for at first; those a graph holds cannot grow


def with_room(buffer: Tensor, steps: int, fill: Tensor | None = None) -> Tensor:
    """`buffer` [B, n, ...] in a new one of `n + steps`; what is added is `fill`, or 0."""
    added = buffer.new_zeros((buffer.shape[0], steps, *buffer.shape[2:]))
    if fill is not None:
        added.copy_(fill)
    return torch.cat([buffer, added], dim=1)


class Rows:
    """The rows still running, and what has left: ids, which row is which, what has ended.

    A step writes its column and moves `position` in place, so that it can be captured; the host's
    count of the steps is `taken`, which the loop sets before each one.
    """

    def __init__(self, input_ids: Tensor, plan: Plan, room: int) -> None:
        self.pad, self.eos = plan.pad, plan.eos
        self.batch, self.prompt = input_ids.shape
        self.ids = with_room(input_ids.long(), room, self.pad)  # [B, P + room]
        self.room = room  # steps that a record is made for at first
        self.origin = torch.arange(self.batch, device=input_ids.device)
        self.unfinished = torch.ones_like(self.origin, dtype=torch.bool)
        self.position = torch.zeros_like(self.origin)  # [B], tokens of the answer so far
        # [1], the column of the next token. A number would be part of a captured step.
        self.end = torch.full_like(self.origin[:1], self.prompt)
        self.steps = self.position.new_zeros(())  # steps taken while a row was unfinished
        self.taken = 0
        self.left: list[tuple[Tensor, Tensor]] = []

    def reserve(self, taken: int) -> None:
        """Make room for one step after `taken`."""
        self.taken = taken
        if self.prompt + taken >= self.ids.shape[1]:
            self.ids = with_room(self.ids, taken, self.pad)

    def so_far(self) -> Tensor:
        """Prompts and answers int64 [B, P + t]."""
        return self.ids[:, : self.prompt + self.taken].contiguous()

    def last(self) -> Tensor:
        """The newest tokens [B, 1]."""
        return self.ids.index_select(1, self.end - 1)

    def append(self, ids: Tensor, slot: Tensor) -> None:
        """Put the chosen tokens (padding where a row has ended) behind the rows."""
        tokens = ids.gather(1, slot[:, None])  # [B, 1]
        if self.pad is not None:
            tokens = torch.where(self.unfinished[:, None], tokens, self.pad)
        self.steps += self.unfinished.any()
        self.ids.index_copy_(1, self.end, tokens)
        self.position += 1
        self.end += 1
        if len(self.eos):
            self.unfinished &= (tokens != self.eos).all(1)

    def compact(self) -> Tensor:
        """Let the ended rows leave; the rows kept, int64 [n], of those so far."""
        self.left.append((self.origin[~self.unfinished], self.ids[~self.unfinished]))
        rows = self.unfinished.nonzero()[:, 0]
        for name in ("ids", "origin", "unfinished", "position"):
            setattr(self, name, getattr(self, name)[rows])
        return rows

    def sequences(self, length: int) -> Tensor:
        """All rows [B, length] in their order, padded where they ended early."""
        if not self.left:
            return self.ids[:, :length].clone()
        assert self.pad is not None
        out = self.pad.to(self.ids).expand(self.batch, length).clone()
        for origin, ids in [*self.left, (self.origin, self.ids)]:
            width = min(length, ids.shape[1])
            out[origin, :width] = ids[:, :width]
        return out


class RaggedRows(Rows):
    """Rows of which each has its own number of tokens, `position`; ended ones stand still."""

    def __init__(self, input_ids: Tensor, plan: Plan) -> None:
        super().__init__(input_ids, plan, min(plan.steps, ROOM))
        self.limit = plan.steps
        self.longest = 0  # tokens of the longest answer, of rows that have left too

    def last(self) -> Tensor:
        return self.ids.gather(1, (self.position + self.prompt - 1)[:, None])

    def make_room(self, tokens: int) -> None:
        """Room for `tokens` more in every row."""
        if self.prompt + self.longest + tokens > self.ids.shape[1]:
            self.reserve(self.ids.shape[1] - self.prompt)

    def remaining(self) -> int:
        """Tokens that every unfinished row may still get."""
        return int((self.limit - self.position)[self.unfinished].min())

    def put(self, ids: Tensor, slot: Tensor, active: Tensor) -> None:
        """Put the chosen tokens behind the `active` rows [B]."""
        tokens = ids.gather(1, slot[:, None])
        at = (self.position + self.prompt)[:, None]
        self.ids.scatter_(1, at, tokens.where(active[:, None], self.ids.gather(1, at)))
        self.position += active
        self.longest = max(self.longest, int(self.position.max()))
        over = self.position >= self.limit
        if len(self.eos):
            over |= (tokens == self.eos).any(1)
        self.unfinished &= ~(active & over)

    def text(self, row: int, more: Tensor | None = None) -> Tensor:
        """A row's prompt and answer int64 [1, n], with the tokens `more` [m] behind them."""
        own = self.ids[row, : self.prompt + int(self.position[row])]
        return (own if more is None else torch.cat([own, more]))[None]
