"""Many prompts through one batch: a row that has ended leaves, and the next prompt takes its place.

A step is that of loop.py, on rows that are each at their own position. Tokens are read by the host
at every look: after each step on a CPU, and on a GPU after as many as no row is sure to end within.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..scorers.lazy import LazyScorer
from ..scorers.rewrite import rewriters_of
from ..scorers.weighted import WeightedRows
from .call import Call
from .loop import explain, pick
from .plan import ended
from .ratio_policy import Choice

COLUMNS = ("rewards", "kl", "logprobs", "log_ratio", "beta")  # of an answer's tokens; see `Answer`


@dataclass
class Entry:
    """A prompt that may join: its ids int64 [P], what its row is drawn with, and how it ends.

    `processors` (None: those of the call, for all rows at once) and `criteria` (None: length and
    EOS alone) are asked with the row's own text."""

    index: int
    ids: Tensor
    steps: int
    beta: float
    temperature: float
    seed: int
    processors: LogitsProcessorList | None = None
    criteria: StoppingCriteriaList | None = None


@dataclass
class Row:
    """A row that runs, or has ended: the tokens of its answer, and `COLUMNS` of each."""

    entry: Entry
    tokens: list[int] = field(default_factory=list)
    columns: list[tuple[float, ...]] = field(default_factory=list)
    error: str | None = None

    def text(self) -> Tensor:
        """Prompt and answer int64 [1, P + t]."""
        answer = torch.tensor(self.tokens, dtype=torch.int64, device=self.entry.ids.device)
        return torch.cat([self.entry.ids, answer])[None]


@dataclass
class _Live:
    """What a step asks of rows: `position` int64 [B] in the answer, and that none has ended."""

    position: Tensor
    unfinished: Tensor


class Refill:
    """The rows of a batch that is kept full; `call` has its source, scorer, policy and record.

    Rows stand in the source and in the scorer in the order of `rows`."""

    def __init__(self, call: Call, eos: Iterable[int], sync_every: int) -> None:
        self.call, self.eos, self.sync_every = call, set(eos), sync_every
        self.rows: list[Row] = []
        self.joined: Tensor | None = None  # logits [n, V] of rows that have no token yet
        self.last: Tensor  # the newest token of each row, int64 [B, 1]
        self.live: _Live
        self._set(torch.zeros(0, dtype=torch.int64, device=call.policy.seeds.device), [])

    @torch.no_grad()
    def join(self, entries: Sequence[Entry]) -> None:
        """Take in prompts, whose answers begin with the next step."""
        assert self.joined is None
        prompts = [entry.ids for entry in entries]
        if isinstance(self.call.scorer, WeightedRows | LazyScorer):
            self.call.scorer.of_prompts([entry.index for entry in entries])
        for rewriter in rewriters_of(self.call.scorer):
            rewriter.expect([e.index for e in entries], [e.steps for e in entries])
        self.call.scorer.join(prompts)  # type: ignore[attr-defined]
        self.joined = self.call.source.join(prompts)  # type: ignore[attr-defined]
        self.rows += [Row(entry) for entry in entries]

    @torch.no_grad()
    def advance(self) -> list[Row]:
        """Run steps until the next look; the rows that have ended, which leave."""
        first = next((i for i, row in enumerate(self.rows) if not row.tokens), len(self.rows))
        if self.joined is not None:
            new = self.rows[first:]
            self._set(torch.cat([self.live.position, self.last.new_zeros(len(new))]), new)
        left = min(row.entry.steps - len(row.tokens) for row in self.rows)
        steps = [self._step(first if i == 0 else len(self.rows)) for i in range(self._looks(left))]
        slots, tokens, columns = (torch.stack(x, 1).tolist() for x in zip(*steps, strict=True))
        for row, *values in zip(self.rows, slots, tokens, columns, strict=True):
            self._note(row, *values)
        done = [row.error is not None or self._has_ended(row) for row in self.rows]
        gone = [row for row, over in zip(self.rows, done, strict=True) if over]
        if gone:
            kept = [i for i, over in enumerate(done) if not over]
            self._keep(torch.tensor(kept, dtype=torch.int64, device=self.last.device))
            self.rows = [self.rows[i] for i in kept]
        return gone

    def _looks(self, left: int) -> int:
        of_text = any(row.entry.processors or row.entry.criteria for row in self.rows)
        return 1 if of_text else min(self.sync_every, left)

    def _step(self, old: int) -> tuple[Tensor, Tensor, Tensor]:
        """One token in each row, the first `old` of which have one to go on from: slots (−1 where
        there was no choice), tokens [B], and the `COLUMNS` [B, 5]."""
        call, live = self.call, self.live
        parts = [call.source.advance(self.last[:old])] if old else []  # type: ignore[attr-defined]
        if self.joined is not None:
            parts.append(self.joined)
            self.joined = None
        choice = pick(call, self._processed(torch.cat(parts)), live)  # type: ignore[arg-type]
        slot = choice.slot.clamp(min=0)
        if self.sync_every == 1 and call.policy.check_nan is not False:
            self._blame(choice)
        call.scorer.commit(slot)
        columns = self._columns(choice._replace(slot=slot))
        self.last = choice.ids.gather(1, slot[:, None])
        live.position += 1
        bad = choice.slot if call.policy.check_nan is not False else slot
        return bad, self.last[:, 0], columns

    def _columns(self, choice: Choice) -> Tensor:
        of_step = self.call.record.of_step(self.live.unfinished, choice)
        chosen = choice.slot[:, None]
        logprobs = choice.logprobs.gather(1, chosen)[:, 0]
        log_ratio = -logprobs
        if self.call.policy.do_sample:
            log_ratio = choice.logq.gather(1, chosen)[:, 0] - logprobs
            log_ratio = log_ratio.masked_fill(of_step["kl"].isnan(), torch.nan)
        beta = self.call.policy.beta if choice.beta is None else choice.beta
        if choice.gated is not None:
            beta = beta.masked_fill(choice.gated, 0.0)
        return torch.stack([of_step["rewards"], of_step["kl"], logprobs, log_ratio, beta], 1)

    def _processed(self, logits: Tensor) -> Tensor:
        call = self.call
        if self.rows[0].entry.processors is not None:
            return torch.cat(
                [
                    row.entry.processors(row.text(), logits[i : i + 1].float())  # type: ignore[misc, arg-type]
                    for i, row in enumerate(self.rows)
                ]
            )
        if not call.processors:
            return logits
        return call.processors(self.last, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]

    def _blame(self, choice: Choice) -> None:
        for i in (choice.slot < 0).nonzero()[:, 0].tolist():
            self.rows[i].error = explain(choice, i)

    def _note(
        self, row: Row, slots: list[int], tokens: list[int], columns: list[tuple[float, ...]]
    ) -> None:
        """Take what a row got since the last look, as far as its end."""
        for slot, token, values in zip(slots, tokens, columns, strict=True):
            if slot < 0:
                row.error = row.error or "a NaN logit or reward, or no candidate that is possible"
                row.error = f"step {len(row.tokens)}: {row.error}"
                return
            row.tokens.append(token)
            row.columns.append(values)
            if token in self.eos and row.entry.criteria is None:
                return

    def _has_ended(self, row: Row) -> bool:
        if row.entry.criteria is not None:
            done = bool(ended(row.entry.criteria, row.text(), None))
        else:
            done = row.tokens[-1] in self.eos
        return done or len(row.tokens) >= row.entry.steps

    def _keep(self, rows: Tensor) -> None:
        self.call.source.keep_rows(rows)
        self.call.scorer.keep_rows(rows)  # type: ignore[attr-defined]
        self.call.policy = self.call.policy.keep_rows(rows)
        self.last = self.last[rows]
        self.live = _Live(self.live.position[rows], self.live.unfinished[rows])

    def _set(self, position: Tensor, new: Sequence[Row]) -> None:
        """Rows are at `position` [B] in their answers, the last of them `new`."""
        policy = self.call.policy
        columns: dict[str, Any] = {
            "beta": [row.entry.beta for row in new],
            "temperature": [row.entry.temperature for row in new],
            "seeds": [row.entry.seed for row in new],
        }
        for name, values in columns.items():
            before = getattr(policy, name)
            columns[name] = torch.cat([before, before.new_tensor(values)])
        self.call.policy = replace(policy, **columns)
        self.live = _Live(position, torch.ones_like(position, dtype=torch.bool))
        if not new:
            self.last = position.new_zeros((0, 1))
