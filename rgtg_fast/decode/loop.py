"""The decode loop: one function per arrow of a guided step.

    last token -> source -> logits [B, V] -> HF logits processors -> topk_logprobs
                                                                       |  ids, logprobs [B, k]
    next token <- commit(slot) <- ratio_sample <- rewards [B, k] <- scorer.score(ids)

Where a scorer knows the reward of every token, the candidates may be the best of log π + β r, or
the token drawn from all of them (vocabulary.py), instead of the most likely ones.

The loop knows no model: a source gives logits, a scorer gives rewards. It waits for the device only
when it has to know whether every row has ended: every `Plan.sync_every` steps. A step changes
tensors in place, so that the same one runs eagerly or is captured and replayed (graphs.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scorers.base import Scorer
from .call import Call
from .graphs import Runner
from .kept import reuse_of
from .plan import ended
from .ratio_policy import Choice, Contest
from .rows import ROOM, Rows
from .vocabulary import candidates_of_sum, draw_of_all, score


@torch.no_grad()
def decode(call: Call, input_ids: Tensor) -> dict[str, Any] | Tensor:
    """Extend prompts `input_ids` [B, P] until every row has ended.

    Returns the sequences int64 [B, P + T], or the fields of a `RewardGuidedOutput` where the record
    is on. Raises `ValueError` for a row whose step has no valid choice.
    """
    plan, source, scorer = call.plan, call.source, call.scorer
    reuse = reuse_of(call, input_ids)
    room = plan.steps if call.graph is not None else min(plan.steps, ROOM)
    rows = Rows(input_ids, plan, room if reuse is None else reuse.begin())
    check = ChoiceCheck(call.policy.check_nan, rows)
    scorer.prefill(*call.reward_prompt)

    def choose(logits: Tensor) -> None:
        raw, scores = process_logits(logits, call, rows)
        choice = pick(call, scores, rows)
        choice = choice._replace(slot=check(choice, rows))
        scorer.commit(choice.slot)
        call.record.write(rows, source, raw, scores, choice)
        rows.append(choice.ids, choice.slot)

    run = Runner(lambda: choose(source.step(rows)), call.graph, call.caches)
    if reuse is not None:
        reuse.follow(run, [rows, check, call.policy, call.record, source, scorer])
    for step in range(plan.steps):
        rows.reserve(step)
        if step:
            run(plan.steps - step)
        else:
            choose(source.prefill(input_ids))
        rows.taken = step + 1
        if call.streamer is not None:
            call.streamer.put(rows.last()[:, 0].cpu())
        if plan.foreign:
            rows.unfinished &= ~ended(call.criteria, rows.so_far(), call.record.scores)
        if (step + 1) % plan.sync_every or not plan.can_end:
            continue
        running = int(rows.unfinished.sum())
        if plan.synced_gpus:
            wait_for_peers(running == 0 or step + 1 == plan.steps, call, rows)
        if running == 0:
            break
        if plan.compact and 2 * running <= len(rows.unfinished):
            call.keep_rows(rows.compact())
            run.moved()
            if reuse is not None:
                reuse.leave()
                run.part()
    check.finish()
    if call.streamer is not None:
        call.streamer.end()
    steps = int(rows.steps)
    result = call.record.result(rows.sequences(rows.prompt + steps), steps, source.finish(steps))
    if reuse is not None:
        reuse.leave(result)
    return result


def process_logits(logits: Tensor, call: Call, rows: Rows) -> tuple[Tensor, Tensor]:
    """Raw logits [B, V] of the last position, and what HF's processors make of them.

    Processors get fp32, as in HF; without any, the logits stay in the model's dtype and are widened
    in registers by `topk_logprobs`.
    """
    if call.processors or call.record.wants_logits:
        logits = logits.to(torch.float32, copy=True)
    if not call.processors:
        return logits, logits
    ids = rows.so_far() if call.plan.reads_ids else rows.ids
    return logits, call.processors(ids, logits)  # type: ignore[arg-type]


def pick(call: Call, scores: Tensor, rows: Rows) -> Choice:
    """The candidates of a step with processed scores [B, V], and the draw among them."""
    policy, scorer = call.policy, call.scorer
    if policy.over == "all":
        return draw_of_all(policy, scorer, scores, rows.position)
    if policy.over == "sum":
        logprobs, ids = candidates_of_sum(policy, scorer, scores, rows.position)
    else:
        logprobs, ids = policy.candidates(scores)
    contest = policy.contenders(logprobs, ids, known(scorer, ids), rows)
    return weigh(call, logprobs, ids, contest, rows)


def weigh(call: Call, logprobs: Tensor, ids: Tensor, contest: Contest | None, rows: Rows) -> Choice:
    """Rewards of the candidates, and the draw from the ratio policy.

    One op where the reward is one linear head; bit for bit the same as the two it is made of.
    """
    if call.epilogue and contest is None:
        hidden, weight, bias = call.scorer.linear(ids)  # type: ignore[attr-defined]
        slot, rewards, logq = call.policy.step(logprobs, hidden, weight, bias, ids, rows.position)
        beta = call.policy.step_beta(logprobs, rewards, rows.position, None)
        return Choice(slot, ids, logprobs, rewards, logq, beta=beta)
    scored, gated = (None, None) if contest is None else (contest.scored, contest.gated)
    rewards = call.policy.bounded(score(call.scorer, ids, scored))
    beta = call.policy.step_beta(logprobs, rewards, rows.position, contest)
    slot, logq = call.policy.select(logprobs, rewards, ids, rows.position, contest, beta)
    return Choice(slot, ids, logprobs, rewards, logq, scored, gated, beta)


def known(scorer: Scorer, ids: Tensor) -> Tensor | None:
    """Which candidates are tokens of the reward model, bool [B, k]; None for all."""
    return scorer.known(ids) if hasattr(scorer, "known") else None


def wait_for_peers(done: bool, call: Call, rows: Rows) -> None:
    """Keep sharded models' collectives going: every rank reports each step, and a finished one runs
    forwards whose results are dropped until the last one is done."""
    if not torch.distributed.is_initialized():
        return
    while True:
        working = torch.tensor(0.0 if done else 1.0, dtype=torch.float32, device=rows.ids.device)
        torch.distributed.all_reduce(working)
        if not done or working.item() == 0:
            return
        call.source.step(rows)
        call.scorer.score(rows.last().expand(-1, call.policy.k))


class ChoiceCheck:
    """Turns the kernels' sentinel (slot −1: nothing to choose) into an error with row and step."""

    def __init__(self, check_nan: bool | None, rows: Rows) -> None:
        self.each_step = check_nan is True
        self.at_end = check_nan is None
        self.first_bad = torch.full_like(rows.origin, -1)

    def __call__(self, choice: Choice, rows: Rows, active: Tensor | None = None) -> Tensor:
        """The slots int64 [B], at least 0. Only `active` rows [B] count (None: the unfinished)."""
        slot = choice.slot
        if self.each_step and int(slot.min()) >= 0:  # the usual case, with one wait for the device
            return slot
        bad = (slot < 0) & (rows.unfinished if active is None else active)
        if self.each_step and bad.any():
            row = int(bad.nonzero()[0, 0])
            where = f"row {int(rows.origin[row])}, step {int(rows.position[row])}"
            raise ValueError(f"{where}: {explain(choice, row)}")
        if self.at_end:
            seen = self.first_bad[rows.origin]
            self.first_bad[rows.origin] = torch.where(bad & (seen < 0), rows.position, seen)
        return slot.clamp(min=0)

    def finish(self) -> None:
        if self.at_end and (self.first_bad >= 0).any():
            row = int((self.first_bad >= 0).nonzero()[0, 0])
            raise ValueError(
                f"row {row}, step {int(self.first_bad[row])}: a NaN logit or reward, or no "
                "candidate with a finite score; pass check_nan=True to stop at that step"
            )


def explain(choice: Choice, row: int) -> str:
    """Why there was nothing to choose in a row."""
    logprobs, rewards = choice.logprobs[row], choice.rewards[row]
    if choice.scored is not None:
        rewards = rewards[choice.scored[row]]
    if logprobs.isnan().any():
        what = "the language model's logits (after the logits processors) contain NaN or +inf"
    elif rewards.isnan().any() or (rewards == torch.inf).any():
        what = f"the reward model gave {rewards.tolist()} for the candidates"
    else:
        what = "no candidate has a finite score; the logits processors left no token to choose"
    return f"{what}; check the inputs and the models' dtype"
