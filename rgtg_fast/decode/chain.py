"""The language model's own continuation of rows: what a round of speculation scores.

A position of it holds the candidates, and the one that the noise would choose with the rewards that
are foreseen (fitted.py); that one is fed back, and the next position comes of it. Or a drafter
guesses the tokens, and one forward says how many of them would have been chosen
(`ChainSource.extend`): that many positions, and the one behind them, are gained by it. Whoever
guesses, the chain is the same.
"""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .ahead import Speculation
from .call import Call
from .drafters import SuffixDrafter
from .loop import process_logits
from .pace import observed
from .plan import keep_rows
from .ratio_policy import RatioPolicy
from .replayed import Replayed
from .rows import RaggedRows


class ChainSource(Protocol):
    """What a source of logits has more, to go ahead of its rows and back."""

    newest: Tensor  # [B, n, H], the hidden states that the last logits are of

    def known(self) -> Tensor | None:
        """Logits [B, V] of the next token, where they are known before it is fed."""

    def feed(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one more token int64 [B, 1] of each row."""

    def extend(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Logits [B, n, V] after each of the next tokens int64 [B, n], of which a row has the first
        `counts` [B] (behind them, anything)."""

    def crop(self, answers: Tensor) -> None:
        """Forget all but the prompts and the first `answers` - 1 tokens behind them, [B]."""

    def pause(self, answers: Tensor) -> None:
        """The reward model is next; the answers are `answers` [B] tokens long."""

    def resume(self, answers: Tensor) -> None:
        """The answers are `answers` [B] tokens long, and to be gone on from."""


class Chain:
    """A row b has `count[b]` positions, `room[b]` at most. Candidates `ids` int64 and `logprobs`
    fp32 [B, m, k], the `slots` int64 [B, m] that the noise chooses, and their `tokens` [B, m]; the
    language model's `hidden` states [B, m, H] that they came of; how safe each is (`levels`, lists
    [B] of `count`), how likely the rewards leave all of a row's as they are (`reached` [B]), and
    how many tokens the round will yield (`yields`)."""

    def __init__(self, rows: RaggedRows, k: int, most: int) -> None:
        batch, device = len(rows.position), rows.position.device
        left = (rows.limit - rows.position).clamp(max=most)
        self.room = left.where(rows.unfinished, 0)
        self.count = torch.zeros_like(left)
        # One column more, for what is dropped.
        shape = batch, most + 1
        self.ids = torch.zeros((*shape, k), dtype=torch.int64, device=device)
        self.logprobs = torch.full((*shape, k), -torch.inf, dtype=torch.float32, device=device)
        self.logprobs[..., 0] = 0.0  # what a row does not have is drawn from too, and dropped
        self.slots = torch.zeros(shape, dtype=torch.int64, device=device)
        self.hidden: Tensor | None = None
        self.tokens = torch.zeros_like(self.slots)
        self.levels: list[list[int]] = [[] for _ in range(batch)]
        self.reached = rows.unfinished.double().tolist()
        self.yields = 0.0
        self.nodes = 0  # candidates to score
        self.free = 0  # positions that took no forward

    @property
    def depth(self) -> int:
        """Positions of the longest row."""
        return int(self.count.max())

    def last(self, rows: RaggedRows) -> Tensor:
        """The newest token of each row [B, 1]."""
        own = self.tokens.gather(1, (self.count - 1).clamp(min=0)[:, None])
        return own.where(self.count[:, None] > 0, rows.last())

    def put(
        self,
        kept: Tensor,
        ids: Tensor,
        logprobs: Tensor,
        slots: Tensor,
        tokens: Tensor,
        hidden: Tensor,
    ) -> None:
        """Behind the rows, those of n positions [B, n, ...] that are `kept` bool [B, n]."""
        at = self.count[:, None] + torch.arange(kept.shape[1], device=kept.device)
        at = at.where(kept, self.slots.shape[1] - 1)
        row = torch.arange(len(at), device=at.device)[:, None]
        self.ids[row, at], self.logprobs[row, at] = ids, logprobs
        self.slots[row, at], self.tokens[row, at] = slots, tokens
        if self.hidden is None:
            self.hidden = hidden.new_zeros((*self.slots.shape, hidden.shape[-1]))
        self.hidden[row, at] = hidden
        self.count += kept.sum(1)


class Drafting:
    """Makes the chains of one call."""

    def __init__(self, call: Call, speculation: Speculation, rows: RaggedRows) -> None:
        self.call, self.speculation, self.rows = call, speculation, rows
        self.source: Any = call.source
        source = self.source
        fed = functools.partial(_fed, source)
        self.feed = Replayed(fed, call.graph, lambda: source.caches, 1, commits=True)
        self.changed()

    def changed(self) -> None:
        """The rows are others."""
        self.feed.moved()
        self.policies: dict[int, RatioPolicy] = {1: self.call.policy}
        self.processors: list[Any] | None = None

    def __call__(self, logits: Tensor | None) -> Chain:
        """The next chain; `logits` [B, V] of its first position where they are known already."""
        s, rows = self.speculation, self.rows
        chain = Chain(rows, self.policy(1).k, s.most)
        going = chain.room > 0
        logits = self.source.known() if logits is None else logits
        if logits is not None:
            self._append(chain, logits[:, None], rows.last()[:, :0], going.long())
            chain.free = 1
            going = self._going(chain)
        while bool(going.any()):
            self._extend(chain, going)
            going = self._going(chain)
        return chain

    def _extend(self, chain: Chain, going: Tensor) -> None:
        """By one forward of the language model, of the rows `going` bool [B]."""
        s, rows = self.speculation, self.rows
        left = chain.room - chain.count
        guesses, peek = chain.tokens[:, :0], None
        if s.drafter is not None:
            n = s.guesses(int(left.max()) - 1)
            # Those of the index are free: so it is known how good they are before they are used.
            if n or isinstance(s.drafter, SuffixDrafter):
                found = self._guess(chain, n or 1)
                guesses, peek = (found, None) if n else (guesses, found)
        begun = time.perf_counter()
        real = (guesses >= 0).long().cumprod(1).sum(1)
        counts = torch.minimum(real + 1, left).where(going, 0)
        n = int(counts.max())
        guesses = guesses[:, : n - 1]
        if n == 1 and bool((going | ~rows.unfinished).all()):
            logits, self.source.newest = self.feed(chain.last(rows))
        else:
            tokens = torch.cat([chain.last(rows), guesses.clamp(min=0)], dim=1)
            logits = self.source.extend(tokens, counts)
        s.lm_forwards += 1
        chosen = self._append(chain, logits, guesses, counts)
        if n > 1:
            self.source.crop(rows.position + chain.count)
        s.costs.draft.add(n, time.perf_counter() - begun)
        self._observe(guesses if peek is None else peek, chosen, counts)

    def _guess(self, chain: Chain, n: int) -> Tensor:
        """At most n guesses behind the chain, int64 [B, g]; `ValueError` for what is none."""
        s, begun = self.speculation, time.perf_counter()
        drafter: Any = s.drafter
        found = drafter.draft(self.rows, chain.tokens, chain.count, n, self.policy(1))
        s.costs.guess.add(1, (time.perf_counter() - begun) / n)
        name, batch = f"{type(drafter).__name__}.draft", len(chain.count)
        if not isinstance(found, Tensor) or found.dtype != torch.int64:
            got = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{name} gave {got}; it must give ids int64 [{batch}, g]")
        if found.dim() != 2 or len(found) != batch or found.shape[1] > n:
            raise ValueError(
                f"{name} gave guesses {list(found.shape)}; it must give [{batch}, g], g <= {n}"
            )
        largest = int(found.max()) if found.numel() else -1
        if largest >= s.vocab_size:
            raise ValueError(
                f"{name} guesses token {largest}; the language model has {s.vocab_size} tokens"
            )
        return found.to(chain.tokens.device)

    def _append(self, chain: Chain, logits: Tensor, guesses: Tensor, counts: Tensor) -> Tensor:
        """Put the positions behind the chain that logits [B, n, V] are of: the first, and those
        behind guesses [B, n - 1] that are right, `counts` [B] at most. The tokens chosen [B, n]."""
        s, rows = self.speculation, self.rows
        batch, n, vocab = logits.shape
        ahead = torch.arange(n, device=counts.device)
        inside = ahead < counts[:, None]
        if not bool(inside.all()):
            # Behind a row's own they are anything, and a NaN would make a warper raise.
            logits = logits.masked_fill(~inside[..., None], 0.0)
        scores = self.scores(logits, chain, guesses)
        policy = self.policy(n)
        position = ((rows.position + chain.count)[:, None] + ahead).flatten()
        logprobs, ids = policy.candidates(scores.reshape(-1, vocab))
        hidden = self.source.newest.to(ids.device)
        foreseen = s.fitted(hidden.flatten(0, 1), ids)
        slots, _ = policy.select(logprobs, foreseen, ids, position)
        slots = slots.clamp(min=0)
        levels: list[int] = []
        if not s.fixed and int((chain.room - chain.count).max()) > 1:
            expected = logprobs + policy.beta[:, None] * foreseen
            levels = s.survival.levels_of(lambda r: policy.alone(expected, ids, position, r))
        tokens = ids.gather(1, slots[:, None]).view(batch, n)
        right = (tokens[:, :-1] == guesses).long().cumprod(1).bool()
        kept = torch.cat([inside[:, :1], inside[:, 1:] & right], dim=1)
        if policy.prune:  # those at -inf are not scored
            scored = (logprobs != -torch.inf).sum(1).view(batch, n)
            chain.nodes += int((scored * kept).sum())
        else:
            chain.nodes += policy.k * int(kept.sum())
        if levels:
            over = self._over(position.view(batch, n) + 1, tokens)
            self._weigh(chain, levels, kept.sum(1).tolist(), over.tolist())
        ids, logprobs = ids.view(batch, n, -1), logprobs.view(batch, n, -1)
        chain.put(kept, ids, logprobs, slots.view(batch, n), tokens, hidden)
        return tokens

    def _weigh(
        self, chain: Chain, levels: list[int], kept: list[int], over: list[list[bool]]
    ) -> None:
        """Take in how safe the next positions are, of which each row has the first `kept`."""
        n = len(levels) // len(kept)
        for row, count in enumerate(kept):
            for i in range(count):
                level = levels[row * n + i]
                chain.levels[row].append(level)
                chain.yields += chain.reached[row]
                chain.reached[row] *= 0.0 if over[row][i] else self.speculation.survival.of(level)

    def _over(self, answers: Tensor, tokens: Tensor) -> Tensor:
        """Whether, bool [B, n], answers of so many tokens [B, n] that end in `tokens` [B, n] have
        ended."""
        limit = torch.as_tensor(self.rows.limit, device=answers.device)
        over = answers >= limit.view(-1, 1)
        if len(self.rows.eos):
            over |= (tokens[..., None] == self.rows.eos).any(-1)
        return over

    def _going(self, chain: Chain) -> Tensor:
        """Which rows [B] go on."""
        s = self.speculation
        going = chain.count < chain.room
        if s.fixed or not bool(going.any()):
            return going
        more = chain.count.new_tensor(chain.reached, dtype=torch.float64).where(going, 0.0)
        # As many candidates at a position as there were at those so far.
        nodes = chain.nodes + round(chain.nodes / int(chain.count.sum()) * int((more > 0).sum()))
        forwards = chain.depth - chain.free
        known = chain.depth, forwards, chain.nodes, nodes, chain.yields
        if not s.goes_on(*known, float(more.sum())):
            return torch.zeros_like(going)
        return more > 0

    def _observe(self, guesses: Tensor, chosen: Tensor, counts: Tensor) -> None:
        """Note how many guesses [B, g] were the tokens chosen [B, n], the first `counts` [B]."""
        n = min(guesses.shape[1], chosen.shape[1])
        if not n:
            return
        looked_at = torch.arange(n, device=counts.device) < counts[:, None]
        real = ((guesses[:, :n] >= 0) & looked_at).long().cumprod(1)
        right = ((guesses[:, :n] == chosen[:, :n]) * real).cumprod(1).sum(1)
        looked_at = torch.minimum(right + 1, real.sum(1))
        observed(self.speculation.guessed, float(right.sum()), float(looked_at.sum()))

    def scores(self, logits: Tensor, chain: Chain, guesses: Tensor) -> Tensor:
        """What HF's processors make of logits [B, n, V] behind the texts, the chain, and the first
        0 .. n - 1 of `guesses` [B, n - 1]."""
        call, rows = self.call, self.rows
        if not call.processors:
            return logits
        if not call.plan.reads_ids:
            flat = logits.flatten(0, 1)
            return process_logits(flat, call, rows)[1].view_as(logits)
        if self.processors is None:
            each = torch.arange(len(rows.position), device=rows.position.device).split(1)
            self.processors = [keep_rows(call.processors, row) for row in each]
        scores = logits.to(torch.float32, copy=True)
        for row, processors in enumerate(self.processors):
            drafted = chain.tokens[row, : int(chain.count[row])]
            for i in range(logits.shape[1]):
                text = rows.text(row, torch.cat([drafted, guesses[row, :i].clamp(min=0)]))
                scores[row, i] = processors(text, scores[row, i][None])[0]
        return scores

    def policy(self, m: int) -> RatioPolicy:
        """The policy with each row m times over."""
        if m not in self.policies:
            one = self.policies[1]
            each = {
                n: getattr(one, n).repeat_interleave(m) for n in ("beta", "temperature", "seeds")
            }
            self.policies[m] = replace(one, **each)
        return self.policies[m]


def _fed(source: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, 1, V] and hidden states [B, 1, H] after one more token [B, 1]."""
    logits = source.feed(tokens)
    return logits[:, None], source.newest
