"""Several tokens of a guided text for one forward of the reward model, token for token the same.

The noise of a draw is keyed by (row seed, position, token id), so a guided text is a function of
its seed, and a drafted token is right or wrong: no probability of acceptance is needed. A round:

1. The language model goes ahead without rewards: m times the candidates, and the one that the noise
   would choose, which is fed back (`draft`). Or a drafter guesses the tokens, and one forward of
   the language model says how many of them it would have chosen (`verify`).
2. One forward of the reward model scores the candidates at all m positions, each behind the drafts
   before it (`Scorer.score_comb`).
3. The guided choice at each position: those that are the drafts are kept, up to and with the first
   that is not, whose state is in the forward too. The language model forgets what comes after.

What is drafted costs the language model nothing that it would not have to do for a kept token, and
the reward model one forward of m * k tokens in place of m forwards of k. How far to draft is
weighed in pace.py.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..scorers.tree import TreeScorer
from .ahead import Speculation
from .call import Call
from .drafters import SuffixDrafter
from .logits import CachedLogits
from .loop import ChoiceCheck, process_logits
from .pace import observed
from .plan import ended, keep_rows
from .ratio_policy import Choice, RatioPolicy
from .rows import RaggedRows


class Drafts(NamedTuple):
    """The candidates of a round's m positions: ids int64 and log-probabilities fp32 [B, m, k];
    `chain` int64 [B, m], the slots that π's noise chooses; `reach` int64 [B], at how many of the
    positions a row is behind its own chain; `levels`, lists [m] of [B], how safe the chain is."""

    ids: Tensor
    logprobs: Tensor
    chain: Tensor
    reach: Tensor
    levels: list[list[int]]


class Round:
    """One call's rounds."""

    def __init__(self, call: Call, speculation: Speculation, rows: RaggedRows) -> None:
        self.call, self.speculation, self.rows = call, speculation, rows
        assert isinstance(call.source, CachedLogits) and isinstance(call.scorer, TreeScorer)
        self.source, self.scorer = call.source, call.scorer
        self.changed()

    def changed(self) -> None:
        """The rows are others."""
        self.policies: dict[int, RatioPolicy] = {1: self.call.policy}
        self.processors: list[Any] | None = None

    def drafts(self, logits: Tensor | None) -> Drafts:
        """The next drafts; `logits` [B, V] of the next token where they are known already."""
        s, rows = self.speculation, self.rows
        begun = time.perf_counter()
        peek = None
        if logits is None and (n := s.guesses(min(s.most, rows.remaining()) - 1)):
            guesses = s.drafter.draft(rows, n, self.call.policy)  # type: ignore[union-attr]
            if bool((guesses >= 0).any()):
                s.costs.guess.add(1, (time.perf_counter() - begun) / n)
                return self.verify(guesses)
        if isinstance(s.drafter, SuffixDrafter):  # its guesses are free: see how good they are
            peek = s.drafter.draft(rows, 1, self.call.policy)
        if logits is None:
            logits = self.source.step(rows)
            s.lm_forwards += 1
        drafts = self.draft(logits, begun)
        if peek is not None:
            seen = (peek >= 0)[:, 0] & rows.unfinished
            right = drafts.ids[:, 0].gather(1, drafts.chain[:, :1]) == peek
            observed(s.survival.guesses, int((right[:, 0] & seen).sum()), int(seen.sum()))
        return drafts

    def draft(self, logits: Tensor, begun: float) -> Drafts:
        """The language model's own continuation, from the `logits` [B, V] of the next token on,
        whose forward began at `begun`."""
        s, rows, policy = self.speculation, self.rows, self.call.policy
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        levels: list[list[int]] = []
        tokens: list[Tensor] = []
        reached = rows.unfinished.double().tolist()
        yields, most = 0.0, min(s.most, rows.remaining())
        while True:
            depth = len(steps)
            logprobs, ids, chain = self.choose(logits, depth, tokens)
            steps.append((ids, logprobs, chain))
            tokens.append(ids.gather(1, chain[:, None]))
            yields += sum(reached)
            if depth + 1 >= most:
                break
            position = rows.position + depth
            levels.append(s.survival.levels_of(lambda r: policy.alone(logprobs, ids, position, r)))  # noqa: B023
            over = (rows.position + len(steps) >= rows.limit) | self._ends(tokens[-1])
            survive = zip(reached, levels[-1], over.tolist(), strict=True)
            reached = [0.0 if end else p * s.survival.of(level) for p, level, end in survive]
            more = sum(reached)
            if not more or not (s.fixed or s.costs.one_more_pays(depth + 1, yields, more)):
                break
            logits = self.source.feed(tokens[-1])
            s.lm_forwards += 1
            begun = self._timed(begun)
        self._timed(begun)
        ids, logprobs, chain = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
        return Drafts(ids, logprobs, chain, torch.full_like(rows.position, len(steps)), levels)

    def verify(self, guesses: Tensor) -> Drafts:
        """The language model's candidates behind the last token and behind each of the guesses
        [B, g], -1 where there is none."""
        rows, source = self.rows, self.source
        begun = time.perf_counter()
        real = guesses >= 0
        tokens = guesses.clamp(min=0)
        count = real.sum(1) + 1
        logits = source.extend(torch.cat([rows.last(), tokens], dim=1), count)
        self.speculation.lm_forwards += 1
        batch, m, vocab = logits.shape
        # Behind a row's guesses they are anything, and a NaN would make a warper raise.
        behind = torch.arange(m, device=count.device) >= count[:, None]
        logits = logits.masked_fill(behind[..., None], 0.0)
        scores = self.scores(logits, tokens)
        policy, position = self.policy(m), self.positions(m)
        logprobs, ids = policy.candidates(scores.reshape(-1, vocab))
        chain, _ = policy.select(logprobs, torch.zeros_like(logprobs), ids, position)
        ids, logprobs = (t.view(batch, m, -1) for t in (ids, logprobs))
        chain = chain.clamp(min=0).view(batch, m)
        own = ids.gather(2, chain[..., None])[..., 0]
        right = (own[:, :-1] == tokens) & real
        reach = right.long().cumprod(1).sum(1) + 1
        self.speculation.costs.verify.add(m, time.perf_counter() - begun)
        looked_at = torch.minimum(reach, real.sum(1))[self.rows.unfinished]
        hits = (reach - 1)[self.rows.unfinished]
        observed(self.speculation.survival.guesses, float(hits.sum()), float(looked_at.sum()))
        m = int(reach.max())
        return Drafts(ids[:, :m], logprobs[:, :m], chain[:, :m], reach, [])

    def choose(
        self, logits: Tensor, depth: int, tokens: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates [B, k] of the next token behind `tokens`, and slots [B] without rewards."""
        before = torch.cat(tokens, dim=1) if tokens else None
        scores = self.scores(logits[:, None], before, depth)[:, 0]
        policy = self.call.policy
        logprobs, ids = policy.candidates(scores)
        none = torch.zeros_like(logprobs)
        slot, _ = policy.select(logprobs, none, ids, self.rows.position + depth)
        return logprobs, ids, slot.clamp(min=0)

    def scores(self, logits: Tensor, tokens: Tensor | None, depth: int = 0) -> Tensor:
        """What HF's processors make of logits [B, m, V] behind the texts and the first
        depth .. depth + m - 1 of `tokens` [B, n]."""
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
            for i in range(logits.shape[1]):
                more = None if tokens is None else tokens[row, : depth + i]
                scores[row, i] = processors(rows.text(row, more), scores[row, i][None])[0]
        return scores

    def score(self, drafts: Drafts) -> tuple[Tensor, Tensor, Tensor]:
        """Guided slots [B, m], rewards and log-probabilities of the ratio policy [B, m, k]."""
        s, begun = self.speculation, time.perf_counter()
        batch, m, k = drafts.ids.shape
        width = k
        if self.call.policy.prune:
            # Those at -inf come last and cannot win: what no position needs is not scored.
            width = max(1, int((drafts.logprobs != -torch.inf).sum(2).max()))
        rewards = self.scorer.score_comb(drafts.ids[:, :, :width], drafts.chain[:, :-1])
        rewards = self.call.policy.bounded(rewards.to(drafts.ids.device, torch.float32))
        rewards = torch.nn.functional.pad(rewards, (0, k - width))
        logprobs, flat, ids = (t.reshape(-1, k) for t in (drafts.logprobs, rewards, drafts.ids))
        slot, logq = self.policy(m).select(logprobs, flat, ids, self.positions(m))
        slot, logq = slot.view(batch, m), logq.view(batch, m, k)
        s.reward_forwards += 1
        s.costs.reward.add(m, time.perf_counter() - begun)
        s.survival.observe_rewards(rewards[:, 0, :width])
        rewards[..., width:] = torch.nan
        return slot, rewards, logq

    def policy(self, m: int) -> RatioPolicy:
        """The policy with each row m times over."""
        if m not in self.policies:
            one = self.policies[1]
            each = {
                n: getattr(one, n).repeat_interleave(m) for n in ("beta", "temperature", "seeds")
            }
            self.policies[m] = replace(one, **each)
        return self.policies[m]

    def positions(self, m: int) -> Tensor:
        ahead = torch.arange(m, device=self.rows.position.device)
        return (self.rows.position[:, None] + ahead).flatten()

    def _timed(self, begun: float) -> float:
        """A token was drafted from `begun` until now."""
        now = time.perf_counter()
        self.speculation.costs.draft.add(1, now - begun)
        return now

    def _ends(self, tokens: Tensor) -> Tensor:
        eos = self.rows.eos
        return (tokens == eos).any(1) if len(eos) else torch.zeros_like(self.rows.unfinished)

    def take(self, drafts: Drafts, check: ChoiceCheck) -> None:
        """Score the drafts, and put what is chosen behind the rows: up to and with the first token
        of each that is not the draft."""
        call, rows, s = self.call, self.rows, self.speculation
        slot, rewards, logq = self.score(drafts)
        scored = ~rewards.isnan() | (drafts.logprobs != -torch.inf)
        right = slot == drafts.chain
        active, count = rows.unfinished.clone(), torch.zeros_like(rows.position)
        for d in range(slot.shape[1]):
            active = active & rows.unfinished & (d < drafts.reach)
            if not active.any():
                break
            if d + 1 < slot.shape[1]:
                self._count(d, active & (d + 1 < drafts.reach), right, drafts)
            columns = (slot, drafts.ids, drafts.logprobs, rewards, logq, scored)
            choice = Choice(*(column[:, d] for column in columns))
            choice = choice._replace(slot=check(choice, rows, active))
            call.record.write_ragged(rows, choice, active)
            rows.put(choice.ids, choice.slot, active)
            count += active
            if call.streamer is not None:
                call.streamer.put(rows.last()[:, 0].cpu())
            if call.plan.foreign:
                self._ask_criteria(active)
            active = active & right[:, d]
        at = (count - 1).clamp(min=0)[:, None]
        self.scorer.commit_comb(count, slot.gather(1, at)[:, 0].clamp(min=0))  # type: ignore[attr-defined]
        self.source.crop(rows.position)  # type: ignore[attr-defined]
        s.tokens += int(count.sum())

    def _count(self, d: int, looked_at: Tensor, right: Tensor, drafts: Drafts) -> None:
        """Note which drafts that the reward model looked at were right."""
        s = self.speculation
        kept = looked_at & right[:, d]
        s.drafted += int(looked_at.sum())
        s.kept += int(kept.sum())
        for row in looked_at.nonzero()[:, 0].tolist():
            s.survival.observe(drafts.levels[d][row] if drafts.levels else None, bool(kept[row]))

    def _ask_criteria(self, active: Tensor) -> None:
        """End the rows that got a token and that a stopping criterion ends."""
        rows = self.rows
        for row in active.nonzero()[:, 0].tolist():
            if ended(self.call.criteria, rows.text(row), self.call.record.scores)[0]:
                rows.unfinished[row] = False


@torch.no_grad()
def speculate(call: Call, input_ids: Tensor) -> dict[str, Any] | Tensor:
    """As `decode`, for a call with a `speculation`."""
    plan, source, speculation = call.plan, call.source, call.speculation
    assert speculation is not None
    drafter = speculation.drafter
    rows = RaggedRows(input_ids, plan)
    check = ChoiceCheck(call.policy.check_nan, rows)
    rounds = Round(call, speculation, rows)
    call.scorer.prefill(*call.reward_prompt)
    logits: Tensor | None = source.prefill(input_ids)
    for forward in (source.forward, call.scorer.forward):  # type: ignore[attr-defined]
        forward.furthest = forward.position + plan.steps - 1
    if drafter is not None:
        drafter.begin(input_ids, source.attention_mask)  # type: ignore[attr-defined]
    while True:
        rows.make_room(speculation.most)
        rounds.take(rounds.drafts(logits), check)
        logits = None
        running = int(rows.unfinished.sum())
        if running == 0:
            break
        if plan.compact and 2 * running <= len(rows.unfinished):
            kept = rows.compact()
            call.keep_rows(kept)
            rounds.changed()
            if drafter is not None:
                drafter.keep_rows(kept)
    check.finish()
    if drafter is not None:
        drafter.finish()
    if call.streamer is not None:
        call.streamer.end()
    steps = rows.longest
    fields = call.record.result(rows.sequences(rows.prompt + steps), steps, source.finish(steps))
    if isinstance(fields, dict):
        fields["speculation"] = speculation.report()
    return fields
