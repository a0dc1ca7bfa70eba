"""A scorer that reads a row's tokens when a reward of the row is next asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import RowScorer
from .weighted import WeightedRows, can_skip


class LazyScorer:
    """The rewards of `scorer`, of which nothing is asked at steps that need none.

    A row of which `score` is to keep no candidate costs nothing, whatever the other rows need. The
    tokens that are committed meanwhile are read in one forward before the row's next reward.
    """

    method = "lazy"
    can_skip = True
    commits_unscored = "row"
    unread: list[list[int]]  # tokens of each row that the scorer has not got
    asked: list[int]  # the rows of which candidates were last scored
    ids: Tensor
    read: int  # tokens of steps that were not scored

    def __init__(self, scorer: RowScorer) -> None:
        self.scorer = scorer
        self._begin(0)

    @property
    def handles(self) -> list[int]:
        return self.scorer.handles

    def known(self, ids: Tensor) -> Tensor | None:
        """Which of `ids` are tokens of the scorer; None where all are."""
        return self.scorer.known(ids) if hasattr(self.scorer, "known") else None

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        self._begin(len(input_ids))
        self.scorer.prefill(input_ids, attention_mask)

    def score(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Rewards fp32 [B, k] of the candidates `ids` int64 [B, k]; NaN for those not in `keep`."""
        self.ids = ids
        asked = range(len(ids)) if keep is None else keep.any(1).nonzero()[:, 0].tolist()
        self.asked = list(asked)
        rewards = torch.full(ids.shape, torch.nan, dtype=torch.float32, device=ids.device)
        if not self.asked:
            return rewards
        self._read(self.asked)
        options: dict[str, Any] = {}
        rows: Any = slice(None)
        if len(self.asked) < len(ids):
            rows = torch.tensor(self.asked, dtype=torch.int64, device=ids.device)
            options["handles"] = self._handles(self.asked)
        if keep is not None and can_skip(self.scorer) and not bool(keep[rows].all()):
            options["keep"] = keep[rows]
        rewards[rows] = self.scorer.score(ids[rows], **options).to(rewards)
        return rewards if keep is None else rewards.masked_fill(~keep, torch.nan)

    def commit(self, slot: Tensor) -> None:
        """Append candidate `slot` int64 [B] of the last scored ids to every row."""
        tokens = self.ids.gather(1, slot[:, None])[:, 0].tolist()
        scored = set(self.asked)
        for row, token in enumerate(tokens):
            if row not in scored:
                self.unread[row].append(token)
        if self.asked:
            rows = torch.tensor(self.asked, dtype=torch.int64, device=slot.device)
            self.scorer.commit(slot[rows])

    def join(self, prompts: Sequence[Tensor]) -> list[int]:
        joined = self.scorer.join(prompts)
        self.unread += [[] for _ in prompts]
        return joined

    def leave(self, handles: Sequence[int]) -> None:
        gone = {self.handles.index(handle) for handle in handles if handle in self.handles}
        self.scorer.leave(handles)
        self.unread = [tokens for row, tokens in enumerate(self.unread) if row not in gone]

    def extend(self, handles: Sequence[int], ids: Sequence[Tensor]) -> None:
        self._read(range(len(self.unread)))
        self.scorer.extend(handles, ids)

    def crop(self, handles: Sequence[int], lengths: Sequence[int] | Tensor) -> None:
        self._read(range(len(self.unread)))
        self.scorer.crop(handles, lengths)

    def keep_rows(self, rows: Tensor) -> None:
        """As `ScorerRows.keep_rows`."""
        self.scorer.keep_rows(rows)  # type: ignore[attr-defined]
        self.unread = [list(self.unread[row]) for row in rows.tolist()]

    def of_prompts(self, indices: Sequence[int]) -> None:
        """As `WeightedRows.of_prompts`."""
        if isinstance(self.scorer, WeightedRows):
            self.scorer.of_prompts(indices)

    def finish(self) -> None:
        """End the call."""
        self._begin(0)
        if hasattr(self.scorer, "finish"):
            self.scorer.finish()

    def report(self, columns: dict[str, Any], k: int) -> dict[str, int]:
        """Of a run with these `columns` of its output: in how many steps of all rows no reward was
        asked for, and how many tokens fewer the reward model has read for it."""
        kl, scored = columns["kl"], columns["candidates_scored"]
        gated = int(((scored == 0) & ~kl.isnan()).sum())
        return {"steps": gated, "tokens_saved": gated * k - self.read}

    def _begin(self, rows: int) -> None:
        self.read, self.asked = 0, []
        self.unread = [[] for _ in range(rows)]
        self.ids = torch.zeros((rows, 0), dtype=torch.int64, device="cpu")

    def _read(self, rows: Sequence[int]) -> None:
        behind = [row for row in rows if self.unread[row]]
        if not behind:
            return
        tokens = [torch.tensor(self.unread[i], dtype=torch.int64, device="cpu") for i in behind]
        self.scorer.extend(self._handles(behind), tokens)
        for row in behind:
            self.read += len(self.unread[row])
            self.unread[row] = []

    def _handles(self, rows: Sequence[int]) -> list[int]:
        handles = self.handles
        return [handles[row] for row in rows]


def lazily(scorer: Any) -> LazyScorer:
    """The scorer, asked only where it has to be; `ValueError` where it must see every step."""
    if not isinstance(scorer, RowScorer) or not hasattr(scorer, "keep_rows"):
        raise ValueError(
            f"min_entropy= lets rows go without reward at a step, and {type(scorer).__name__} has "
            "no rows that come and go (join, leave, extend, crop, keep_rows); leave min_entropy "
            "out, or give the scorer these methods"
        )
    return LazyScorer(scorer)
