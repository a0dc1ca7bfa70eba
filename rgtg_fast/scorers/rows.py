"""Rows that come and go by themselves: the row side of a scorer, and the tokens of its rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from .rewards import Arithmetic


class ScorerRows(Arithmetic, ABC):
    """Handles, and the checks of what is done to the rows behind them.

    Subclasses number their rows 0..B-1 in the order they came in, and those behind one that leaves
    move up; a handle stays the same. `begin` is called by `prefill`.
    """

    handles: list[int]  # of the rows, in their order
    scored: list[int | None]  # of the rows last scored; None: changed since
    ids: Tensor  # int64 [n, k], their candidates
    vocabulary: int | None = None  # ids of prompts are below it; None: they are not looked at
    most: int | None = None  # candidates that a row can have; None: any number
    _given: int

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the rows' tensors are."""

    def begin(self, rows: int) -> None:
        """A call begins with `rows` rows."""
        self.handles, self.scored, self._given = list(range(rows)), [], rows

    @torch.no_grad()
    def join(self, prompts: Sequence[Tensor]) -> list[int]:
        """Rows with these prompts (int64 [P] each, without padding) come in behind the others."""
        given = _listed("prompts", prompts)
        rows = [self._as_row("prompts", i, prompt) for i, prompt in enumerate(given)]
        if not rows:
            return []
        self._join(rows)
        new = list(range(self._given, self._given + len(rows)))
        self._given += len(rows)
        self.handles = self.handles + new
        return new

    @torch.no_grad()
    def leave(self, handles: Sequence[int]) -> None:
        """Let the rows go, and what they hold."""
        gone = set(self.rows_of(handles)[0])
        if gone:
            kept = [i for i, handle in enumerate(self.handles) if handle not in gone]
            self.keep_rows(torch.tensor(kept, dtype=torch.int64, device=self.device))

    @torch.no_grad()
    def extend(self, handles: Sequence[int], ids: Sequence[Tensor]) -> None:
        """Append tokens, `ids[i]` int64 [n_i], to each of the rows: n_i >= 0 of them."""
        handles, rows = self.rows_of(handles)
        given = _listed("ids", ids)
        if len(given) != len(handles):
            raise ValueError(f"ids has the tokens of {len(given)} rows for {len(handles)} handles")
        tokens = [self._as_row("ids", i, row, 0) for i, row in enumerate(given)]
        if not any(len(row) for row in tokens):
            return
        self._changed(handles)
        counts = torch.tensor([len(row) for row in tokens], dtype=torch.int64, device=self.device)
        self._extend(pad_sequence(tokens, batch_first=True), counts, rows)

    @torch.no_grad()
    def crop(self, handles: Sequence[int], lengths: Sequence[int] | Tensor) -> None:
        """Keep the first `lengths[i]` tokens, prompt and all, of each of the rows: at least 1, and
        no more than it has. A tensor of them on a GPU is not checked, which would mean waiting."""
        handles, rows = self.rows_of(handles)
        if not isinstance(lengths, Tensor):
            numbers = _integers("lengths", lengths)
            lengths = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        check_integers("lengths", lengths)
        if lengths.shape != (len(handles),):
            raise ValueError(f"lengths has shape {list(lengths.shape)} for {len(handles)} handles")
        if lengths.device.type == "cpu" and len(handles):
            there = self._tokens().cpu()
            there = there if rows is None else there[rows.cpu()]
            if not ((lengths >= 1) & (lengths <= there)).all():
                raise ValueError(
                    f"lengths={lengths.tolist()} for rows of {there.tolist()} tokens; pass at "
                    "least 1, and no more than there are"
                )
        if len(handles):
            self._changed(handles)
            self._crop(lengths.to(self.device, torch.int64), rows)

    def rows_of(self, handles: Sequence[int] | Tensor | None) -> tuple[list[int], Tensor | None]:
        """The handles (None: of all rows), and the numbers int64 [n] of their rows; None where
        these are all of them, in order."""
        if handles is None or handles is self.handles:
            return self.handles, None
        wanted = _integers("handles", handles)
        if wanted == self.handles:
            return self.handles, None
        unknown = [handle for handle in wanted if handle not in self.handles]
        if unknown or len(set(wanted)) != len(wanted):
            what = f"{unknown} are none of" if unknown else f"{wanted} name a row twice among"
            raise ValueError(f"handles: {what} the {len(self.handles)} rows {self.handles}")
        index = [self.handles.index(handle) for handle in wanted]
        return wanted, torch.tensor(index, dtype=torch.int64, device=self.device)

    def check_candidates(self, ids: Tensor, rows: int) -> None:
        """`ValueError` if `ids` are not candidates [rows, k]."""
        check_integers("ids", ids)
        if ids.dim() != 2 or ids.shape[0] != rows or not ids.shape[1]:
            raise ValueError(
                f"ids has shape {list(ids.shape)} for {rows} rows; pass candidates [{rows}, k], "
                "and rows by prefill or join before them"
            )
        if self.most is not None and ids.shape[1] > self.most:
            raise ValueError(
                f"ids has {ids.shape[1]} candidates for each row, and this scorer was made for "
                f"k={self.most}; make one with k={ids.shape[1]}"
            )

    def scored_rows(
        self, handles: Sequence[int] | Tensor | None, slot: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The rows that a commit of `slot` [n] is for, and their places among those last scored;
        None each for all, in order. They have to be scored again before they are committed again.
        """
        check_integers("slot", slot)
        wanted: list[Any] = self.scored if handles is None else _integers("handles", handles)
        if slot.shape != (len(wanted),):
            raise ValueError(
                f"slot has shape {list(slot.shape)}, and {len(wanted)} rows are to be committed; "
                f"last scored, and unchanged since: {self._unchanged()}"
            )
        if wanted is self.scored and wanted == self.handles:
            self.scored = [None] * len(wanted)
            return None, None
        stale = [handle for handle in wanted if handle is None or handle not in self.scored]
        if stale:
            raise ValueError(
                f"rows {wanted} are to be committed; last scored, and unchanged since: "
                f"{self._unchanged()}"
            )
        if handles is not None and slot.device.type == "cpu":
            k = self.ids.shape[1] if wanted else 0
            if not ((slot >= 0) & (slot < k)).all():
                raise ValueError(
                    f"slot={slot.tolist()} for {k} candidates; pass 0 to {k - 1} (-1 says that a "
                    "row had nothing to choose)"
                )
        at = [self.scored.index(handle) for handle in wanted]
        rows = self.rows_of(wanted)[1]
        self._changed(wanted)
        return rows, torch.tensor(at, dtype=torch.int64, device=self.device)

    def _unchanged(self) -> list[int]:
        return [handle for handle in self.scored if handle is not None]

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with rows `rows` int64 [n] alone, in that order: the others leave. A row that is
        named again is copied, and the copy has a new handle."""
        self.handles, self._given = kept_handles(self.handles, rows, self._given)
        self._keep_rows(rows.to(self.device))

    def _changed(self, handles: Sequence[int]) -> None:
        changed = set(handles)
        self.scored = [None if handle in changed else handle for handle in self.scored]

    def _as_row(self, name: str, i: int, ids: Tensor, least: int = 1) -> Tensor:
        check_integers(f"{name}[{i}]", ids)
        if ids.dim() != 1 or len(ids) < least:
            raise ValueError(
                f"{name}[{i}] must be token ids int64 [n], n >= {least}; got {list(ids.shape)}"
            )
        if self.vocabulary is not None and len(ids) and ids.device.type == "cpu":
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= self.vocabulary:
                raise ValueError(
                    f"{name}[{i}] contains id {low if low < 0 else high}, but the reward model has "
                    f"{self.vocabulary} tokens (0 to {self.vocabulary - 1})"
                )
        return ids.to(self.device, torch.int64)

    @abstractmethod
    def _join(self, prompts: list[Tensor]) -> None:
        """The rows come in; the first ones begin a call."""

    @abstractmethod
    def _extend(self, ids: Tensor, counts: Tensor, rows: Tensor | None) -> None:
        """Append `counts` [n] tokens of `ids` [n, m], padded on the right, to rows [n]."""

    @abstractmethod
    def _crop(self, lengths: Tensor, rows: Tensor | None) -> None:
        """Keep the first `lengths` [n] tokens of rows [n]."""

    @abstractmethod
    def _tokens(self) -> Tensor:
        """How many tokens each row has, int64 [B]."""

    @abstractmethod
    def _keep_rows(self, rows: Tensor) -> None:
        """Drop the other rows. Rows may be named several times: copies."""


def kept_handles(handles: list[int], rows: Tensor, given: int) -> tuple[list[int], int]:
    """The handles of `rows` int64 [n], where `given` have been given; those of copies are new, and
    counted in the second result."""
    kept: list[int] = []
    for handle in (handles[row] for row in rows.tolist()):
        kept.append(given if handle in kept else handle)
        given += kept[-1] == given
    return kept, given


def check_integers(name: str, numbers: Any) -> None:
    """`ValueError` unless `numbers` is a tensor of int64 or int32 that holds some."""
    if not isinstance(numbers, Tensor):
        raise ValueError(f"{name} must be an int64 tensor; got {type(numbers).__name__}")
    if numbers.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64; got {numbers.dtype}; pass {name}.long()")
    if numbers.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, which holds no numbers")


def _listed(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise ValueError(f"{name}={values!r}; pass a list with one entry for each row") from None


def _integers(name: str, numbers: Any) -> list[int]:
    """A sequence, iterator or tensor [n] of ints as a list."""
    if isinstance(numbers, Tensor):
        check_integers(name, numbers)
        if numbers.dim() != 1:
            raise ValueError(f"{name} has shape {list(numbers.shape)}; pass one for each row, [n]")
        return numbers.tolist()
    given = _listed(name, numbers)
    for number in given:
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise ValueError(f"{name} holds {number!r}; pass ints")
    return [int(number) for number in given]


class Texts:
    """The tokens of rows: `ids` int64 [B, n], of which the first `counts` [B] are a row's.

    Updated in place while no row is longer than `capacity`: a CUDA graph's replays must find room.
    """

    def __init__(self, ids: Tensor, mask: Tensor, capacity: int = 0) -> None:
        order = (mask == 0).byte().argsort(dim=1, stable=True)
        self.ids, self.counts = ids.gather(1, order), mask.long().sum(1)
        self.longest = ids.shape[1]  # no row is longer
        self._widen(max(capacity, ids.shape[1] + 2))

    def join(self, ids: Tensor, mask: Tensor) -> None:
        new = Texts(ids, mask, self.ids.shape[1])
        self._widen(new.ids.shape[1])
        self.ids = torch.cat([self.ids, new.ids])
        self.counts = torch.cat([self.counts, new.counts])
        self.longest = max(self.longest, new.longest)

    def extend(self, ids: Tensor, counts: Tensor | int, rows: Tensor | None) -> None:
        """Append the first `counts` [n] of `ids` [n, m] to rows [n]."""
        self._reserve(ids.shape[1])
        self.longest += ids.shape[1]
        if rows is None and ids.shape[1] == 1:
            self.ids.scatter_(1, self.counts[:, None], ids)
            self.counts += counts
            return
        own = slice(None) if rows is None else rows
        at = self.counts[own][:, None] + torch.arange(ids.shape[1], device=ids.device)
        if rows is None:
            self.ids.scatter_(1, at, ids)
            self.counts += counts
        else:
            self.ids[rows[:, None], at] = ids
            self.counts[rows] += counts

    def crop(self, lengths: Tensor, rows: Tensor | None) -> Tensor:
        """Keep the first `lengths` [n] tokens of rows [n] but for the last, and return that [n]."""
        own = slice(None) if rows is None else rows
        last = self.ids[own].gather(1, lengths[:, None] - 1)[:, 0]
        self.counts[own] = lengths - 1
        return last

    def keep_rows(self, rows: Tensor) -> None:
        self.ids, self.counts = self.ids[rows], self.counts[rows]

    def _reserve(self, tokens: int) -> None:
        """Make room for `tokens` more in every row."""
        if self.longest + tokens > self.ids.shape[1]:
            self.longest = int(self.counts.max()) if len(self.counts) else 0
            if self.longest + tokens > self.ids.shape[1]:
                self._widen(self.longest + tokens + 64)

    def _widen(self, width: int) -> None:
        if width > self.ids.shape[1]:
            self.ids = pad(self.ids, (0, width - self.ids.shape[1]))
