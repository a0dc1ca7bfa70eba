"""Several tokens of a guided text for one forward of the reward model, token for token the same.

The noise of a draw is keyed by (row seed, position, token id), so a guided text is a function of
its seed, and a drafted token is right or wrong: no probability of acceptance is needed. A round:

1. The language model goes ahead without rewards (chain.py): m times the candidates, and the one
   that the noise would choose.
2. One forward of the reward model scores the candidates at all m positions, each behind the drafts
   before it (`Scorer.score_comb`).
3. The guided choice at each position: those that are the drafts are kept, up to and with the first
   that is not, whose state is in the forward too. The language model forgets what comes after.

What is drafted costs the language model nothing that it would not have to do for a kept token, and
the reward model one forward of m * k tokens in place of m forwards of k. How far to draft is
weighed in pace.py. On a GPU, with m fixed, the language model's row and the reward model's m * k
tokens are each replayed from a CUDA graph (replayed.py); what is accepted is read by the host.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor

from ..scorers.tree import SiblingScorer
from .ahead import Speculation
from .call import Call
from .chain import Chain, Drafting
from .loop import ChoiceCheck
from .pace import NODES
from .plan import ended
from .ratio_policy import Choice
from .replayed import Replayed
from .rows import RaggedRows


class Round:
    """One call's rounds."""

    def __init__(self, call: Call, speculation: Speculation, rows: RaggedRows) -> None:
        self.call, self.speculation, self.rows = call, speculation, rows
        assert isinstance(call.scorer, SiblingScorer)
        self.source: Any = call.source
        self.scorer = call.scorer
        self.drafts = Drafting(call, speculation, rows)
        scorer, graph = call.scorer, call.graph
        # A graph of its own: two that share memory could not be replayed in turns.
        graph = None if graph is None else type(graph)(graph.device)
        comb = functools.partial(_comb, scorer)
        self.comb = Replayed(comb, graph, lambda: scorer.caches, speculation.most, commits=False)

    def changed(self) -> None:
        """The rows are others."""
        self.drafts.changed()
        self.comb.moved()

    def score(self, chain: Chain) -> tuple[Tensor, Tensor, Tensor]:
        """Guided slots [B, m], rewards (NaN where they cannot matter) and log-probabilities of the
        ratio policy [B, m, k]."""
        m, k = chain.depth, chain.ids.shape[2]
        ids, logprobs = chain.ids[:, :m], chain.logprobs[:, :m]
        ahead = torch.arange(m, device=ids.device)
        own = ahead < chain.count[:, None]
        keep = own[..., None].expand_as(ids)
        if self.call.policy.prune:  # those at -inf cannot win
            keep = keep & (logprobs != -torch.inf)
        if self.comb.runner.graph is None:
            rewards = self.scorer.score_comb(ids, chain.slots[:, : m - 1], keep)
        else:  # all that a round can have
            most = self.speculation.most
            (all_rewards,) = self.comb(chain.ids[:, :most], chain.slots[:, : most - 1])
            rewards = all_rewards[:, :m].masked_fill(~keep.to(all_rewards.device), torch.nan)
        rewards = self.call.policy.bounded(rewards.to(ids.device, torch.float32))
        position = (self.rows.position[:, None] + ahead).flatten()
        slot, logq = self.drafts.policy(m).select(
            logprobs.reshape(-1, k),
            rewards.where(keep, 0.0).view(-1, k),
            ids.reshape(-1, k),
            position,
        )
        s = self.speculation
        s.reward_forwards += 1
        assert chain.hidden is not None
        off = s.fitted.observe(chain.hidden[:, :m][own], ids[own], rewards[own], s.vocab_size)
        s.survival.observe_errors(off)
        return slot.view(-1, m), rewards, logq.view(-1, m, k)

    def take(self, chain: Chain, check: ChoiceCheck) -> None:
        """Score the chain, and put what is chosen behind the rows: up to and with the first token
        of each that is not the draft."""
        call, rows, s = self.call, self.rows, self.speculation
        begun = time.perf_counter()
        self.source.pause(rows.position)
        slot, rewards, logq = self.score(chain)
        m = chain.depth
        logprobs, drafts = chain.logprobs[:, :m], chain.slots[:, :m]
        scored = ~rewards.isnan() | (logprobs != -torch.inf)
        right = slot == drafts
        active, count = rows.unfinished.clone(), torch.zeros_like(rows.position)
        for d in range(m):
            active = active & rows.unfinished & (d < chain.count)
            if not active.any():
                break
            self._count(chain, d, active & (d + 1 < chain.count), right[:, d])
            columns = (slot, chain.ids[:, :m], logprobs, rewards, logq, scored)
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
        self.scorer.commit_comb(count, slot.gather(1, at)[:, 0].clamp(min=0))
        self.source.resume(rows.position)
        s.tokens += int(count.sum())
        s.costs.reward.add(chain.nodes // NODES, time.perf_counter() - begun)

    def _count(self, chain: Chain, d: int, looked_at: Tensor, right: Tensor) -> None:
        """Note which drafts at position d that the reward model `looked_at` [B] were `right`."""
        s = self.speculation
        kept = right.tolist()
        for row in looked_at.nonzero()[:, 0].tolist():
            s.drafted += 1
            s.kept += kept[row]
            if not s.fixed:
                s.survival.observe(chain.levels[row][d], kept[row])

    def _ask_criteria(self, active: Tensor) -> None:
        """End the rows that got a token and that a stopping criterion ends."""
        rows = self.rows
        for row in active.nonzero()[:, 0].tolist():
            if ended(self.call.criteria, rows.text(row), self.call.record.scores)[0]:
                rows.unfinished[row] = False


def _comb(scorer: SiblingScorer, ids: Tensor, chain: Tensor) -> tuple[Tensor]:
    return (scorer.score_comb(ids, chain),)


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
