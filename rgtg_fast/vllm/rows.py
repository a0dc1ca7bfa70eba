"""The rows of a reward scorer as a cache over texts, within a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..scorers.base import RowScorer
from ..scorers.weighted import can_skip, checked

SLACK = 16  # slots beyond its text that a row takes, at most
TIGHT = 0.96  # least share of a store that its rows take
# Rows kept without a request, for each that has one, and at least: all are copied when rows are
# laid out anew, and looked through when one comes.
PARKED, LEAST_PARKED = 4, 64
PREFILL = 8192  # tokens of one forward over prompts, at most (or one prompt)


@dataclass(eq=False)
class Text:
    """The tokens of a request so far, which are only ever appended to, and its row's handle."""

    tokens: list[int]
    handle: int | None = None


@dataclass
class _Row:
    """A row of the scorer: it has read the first `length` tokens of a text, whose own it is until
    another text takes it over."""

    text: Text
    length: int
    room: int  # the most tokens it has had: cropping gives no slots back


@dataclass
class Counts:
    """What was done, for the log."""

    scored: int = 0  # candidates
    prefilled: int = 0  # tokens of texts that were read anew
    reused: int = 0  # tokens of texts for which a row that was left over had been read
    evicted: int = 0  # rows
    waves: int = 0  # parts that steps were done in beyond one, as their rows were over the budget


class RewardRows:
    """Rewards of candidates behind texts, from a scorer's rows; `tokens` is the budget of these.

    A row stays when its request has gone, until its place is needed or many have: a request that is
    taken up again, or begins as another did, goes on from the row that has most of its text. The
    row not used for longest goes first. Where the rows of one step are over the budget they are
    scored in waves, those of an earlier one making room for the next.
    """

    def __init__(self, scorer: RowScorer, width: int, tokens: int, vocabulary: int | None) -> None:
        self.scorer, self.width, self.budget = scorer, width, tokens
        self.vocabulary = vocabulary
        self.rows: dict[int, _Row] = {}  # by handle, the one used last at the end
        self.scored: dict[int, list[int]] = {}  # the last candidates, of rows by handle
        self.counts = Counts()

    def size(self, length: int) -> int:
        """What a row of so many tokens takes of the budget."""
        return int((length + self.width + SLACK) / TIGHT) + 1

    @property
    def used(self) -> int:
        """How much of the budget is taken."""
        return sum(self.size(row.room) for row in self.rows.values())

    def _size_of(self, text: Text) -> int:
        row = self._own(text)
        return self.size(max(len(text.tokens), 0 if row is None else row.room))

    def score(self, texts: Sequence[Text], ids: Tensor, keep: Tensor) -> Tensor:
        """Rewards fp32 [n, k] of candidates `ids` int64 [n, k] behind the texts; NaN, or anything,
        for those not in `keep` bool [n, k]."""
        self._commit(texts)
        rewards = torch.full(ids.shape, torch.nan, dtype=torch.float32, device=ids.device)
        for wave in self._waves(texts):
            self._ready([texts[i] for i in wave], texts)
            rows = torch.tensor(wave, dtype=torch.int64, device=ids.device)
            handles = [texts[i].handle for i in wave]
            rewards[rows] = self._of_wave(handles, ids[rows], keep[rows])  # type: ignore[arg-type]
            for handle in handles:
                self.rows[handle] = self.rows.pop(handle)  # type: ignore[arg-type, index]
        return rewards

    def _of_wave(self, handles: list[int], ids: Tensor, keep: Tensor) -> Tensor:
        """The scorer has room for `width` candidates of a row at once; more are scored in turns."""
        rewards = []
        for part, kept in zip(ids.split(self.width, 1), keep.split(self.width, 1), strict=True):
            # All are scored where some row would have none: it could not be committed.
            skips = can_skip(self.scorer) and bool(kept.any(1).all()) and not bool(kept.all())
            own: dict[str, Any] = {"keep": kept} if skips else {}
            given = self.scorer.score(part, handles=handles, **own)  # type: ignore[call-arg]
            rewards.append(checked(self.scorer, given, part).float())
            self.counts.scored += int(kept.sum()) if skips else part.numel()
        # Others can still be chosen by what comes behind the plug-in, and have no state.
        found = part.masked_fill(~kept, -1) if skips else part
        self.scored = dict(zip(handles, found.tolist(), strict=True))
        return torch.cat(rewards, 1)

    def _own(self, text: Text) -> _Row | None:
        """The text's row, if no other text has taken it over."""
        row = None if text.handle is None else self.rows.get(text.handle)
        return row if row is not None and row.text is text else None

    def _commit(self, texts: Sequence[Text]) -> None:
        """Rows whose text has got one of the candidates last scored take that one's state."""
        slots: dict[int, int] = {}
        for text in texts:
            row, handle = self._own(text), text.handle
            if row is None or handle is None or len(text.tokens) != row.length + 1:
                continue
            candidates, token = self.scored.get(handle, []), text.tokens[-1]
            if token in candidates:
                slots[handle] = candidates.index(token)
                self._grown(row, row.length + 1)
        self.scored = {}
        if slots:
            slot = torch.tensor(list(slots.values()), dtype=torch.int64, device="cpu")
            self.scorer.commit(slot, handles=list(slots))  # type: ignore[call-arg]

    def _waves(self, texts: Sequence[Text]) -> Iterator[list[int]]:
        """The texts by their numbers, in parts that are within the budget; first those that have a
        row, so that making room for the others costs the fewest."""
        order = sorted(range(len(texts)), key=lambda i: self._own(texts[i]) is None)
        wave: list[int] = []
        total = 0
        for i in order:
            size = self._size_of(texts[i])
            if wave and total + size > self.budget:
                self.counts.waves += 1
                yield wave
                wave, total = [], 0
            wave.append(i)
            total += size
        if wave:
            yield wave

    def _ready(self, wave: Sequence[Text], step: Sequence[Text]) -> None:
        """Have each text of a wave in a row, as it stands; `step` are those of all waves."""
        wanting = [text for text in wave if self._own(text) is None]
        if wanting:
            taken = {text.handle for text in step if self._own(text) is not None}
            spare = self.budget - sum(map(self._size_of, wave))
            for text in wanting:
                text.handle = self._left_over(text.tokens, taken, spare)
                if text.handle is not None:
                    taken.add(text.handle)
                    spare += self.size(len(text.tokens))
                    self._take_over(text, self.rows[text.handle])
                    spare -= self._size_of(text)
        self._make_room(wave, step)
        self._catch_up([text for text in wave if text.handle is not None])
        self._join([text for text in wave if text.handle is None])

    def _left_over(self, tokens: list[int], taken: set[int | None], spare: int) -> int | None:
        """The row that has most of these tokens, if it is more than half of them, and the row takes
        no more than `spare` more than they need."""
        best, most = None, len(tokens) // 2
        for handle, row in self.rows.items():
            if most == len(tokens):
                break
            if row.length <= most or row.text.tokens[most] != tokens[most] or handle in taken:
                continue  # as nearly all do: what is behind takes long
            if self.size(row.room) - self.size(len(tokens)) > spare:
                continue
            common = _common(tokens, row)
            if common > most:
                best, most = handle, common
        return best

    def _take_over(self, text: Text, row: _Row) -> None:
        common = _common(text.tokens, row)
        if common < row.length:
            self.scorer.crop([text.handle], [common])  # type: ignore[list-item]
        row.text, row.length = text, common
        self.counts.reused += common

    def _make_room(self, wave: Sequence[Text], step: Sequence[Text]) -> None:
        wanted = sum(map(self._size_of, wave))
        own = {text.handle for text in wave}
        free = {handle: row for handle, row in self.rows.items() if handle not in own}
        over = wanted + sum(self.size(row.room) for row in free.values()) - self.budget
        live = {text.handle for text in step if self._own(text) is not None}
        many = len(self.rows) - len(live) - max(LEAST_PARKED, PARKED * len(step))
        gone = []
        for handle, row in free.items():
            if over > 0 or (many > 0 and handle not in live):
                gone.append(handle)
                over -= self.size(row.room)
                many -= handle not in live
        self._drop(gone)

    def _drop(self, handles: list[int]) -> None:
        if handles:
            self.scorer.leave(handles)
            self.counts.evicted += len(handles)
            for handle in handles:
                del self.rows[handle]

    def _catch_up(self, texts: Sequence[Text]) -> None:
        """Read what the rows of texts have not read yet."""
        behind: list[tuple[int, list[int]]] = []
        for text in texts:
            assert text.handle is not None
            row = self.rows[text.handle]
            if row.length < len(text.tokens):
                behind.append((text.handle, text.tokens[row.length :]))
                self._grown(row, len(text.tokens))
        self.counts.prefilled += sum(len(ids) for _, ids in behind)
        # A store that has to grow gives every row as much room as the longest extension needs.
        while behind:
            parts = [self._ids(ids[:SLACK]) for _, ids in behind]
            self.scorer.extend([handle for handle, _ in behind], parts)
            behind = [(handle, ids[SLACK:]) for handle, ids in behind if len(ids) > SLACK]

    def _grown(self, row: _Row, length: int) -> None:
        row.length, row.room = length, max(row.room, length)

    def _join(self, texts: list[Text]) -> None:
        groups: list[list[Text]] = []
        for text in sorted(texts, key=lambda text: len(text.tokens)):
            # Padded to the longest, which is the last.
            if not groups or (len(groups[-1]) + 1) * len(text.tokens) > PREFILL:
                groups.append([])
            groups[-1].append(text)
        for group in groups:
            joined = self.scorer.join([self._ids(text.tokens) for text in group])
            for text, handle in zip(group, joined, strict=True):
                text.handle = handle
                self.rows[handle] = _Row(text, len(text.tokens), len(text.tokens))
        self.counts.prefilled += sum(len(text.tokens) for text in texts)

    def _ids(self, tokens: list[int]) -> Tensor:
        """An id that the reward model has no token for is read as 0, as a candidate's is."""
        ids = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        return ids if self.vocabulary is None else ids.where(ids < self.vocabulary, 0)


def _common(tokens: list[int], row: _Row) -> int:
    """How many of the first tokens are those that a row has read."""
    most, read = min(len(tokens), row.length), row.text.tokens
    if tokens[:most] == read[:most]:
        return most
    return next(i for i in count() if tokens[i] != read[i])
