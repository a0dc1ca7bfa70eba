"""The decode loop: one function per arrow of a guided step.

    last token -> policy -> logits [B, V] -> HF logits processors -> topk_logprobs
                                                                       |  ids, logprobs [B, k]
    next token <- commit(slot) <- ratio_sample <- rewards [B, k] <- scorer.score(ids)

The loop knows no model: a policy gives logits, a scorer gives rewards. It waits for the device only
when it has to know whether every row has ended: every `Plan.sync_every` steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from .. import ops
from ..scorers.base import RewardModelScorer, Scorer
from .plan import Plan, ended, eos_ids, foreign_criterion, keep_rows, last_step
from .policies import Policy
from .record import Record


@dataclass
class Guidance:
    """The ratio policy of a run: softmax((log π + β r) / T) over the k most likely tokens.

    `beta` and `temperature` are fp32 [B], `seeds` int64 [B], on the device of the ids; `check_nan`
    True reads a flag at every step, None once at the end, False never. Rewards are clamped to
    `reward_range`, and with `prune` those that cannot decide a step are not asked for.
    """

    k: int
    beta: Tensor
    temperature: Tensor
    seeds: Tensor
    do_sample: bool
    check_nan: bool | None
    backend: ops.Backend
    reward_range: tuple[float, float] | None = None
    prune: bool = False

    def __post_init__(self) -> None:
        device, rows = self.seeds.device, len(self.seeds)
        self._keep = ops.keep_kernel(self.backend, device)
        self._topk = ops.kernel("topk_logprobs", self.backend, device, rows)
        self._sample = ops.kernel("ratio_sample", self.backend, device, rows)

    def expand(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates of processed scores [B, V]: their log-probabilities and ids [B, k]."""
        return self._topk(scores, self.k)

    def contenders(
        self, logprobs: Tensor, ids: Tensor, known: Tensor | None, rows: Rows
    ) -> Tensor | None:
        """Which candidates [B, k] may win, whatever their rewards are; None without pruning.

        The noise of a draw is known before the rewards, so each candidate's best and worst possible
        value is: below the largest worst nobody wins. Those not `known` to the reward model and
        rows that have ended are out; of all rows together at least one candidate is in.
        """
        if not self.prune:
            return None
        assert self.reward_range is not None
        if known is not None:
            logprobs = logprobs.masked_fill(~known, -torch.inf)
        policy = self.beta, self.temperature, self.seeds, rows.position, self.do_sample
        keep = self._keep(logprobs, ids, *policy, *self.reward_range) & rows.unfinished[:, None]
        keep[:1, 0] |= ~keep.any()
        return keep

    def bounded(self, rewards: Tensor) -> Tensor:
        """Rewards within the range; -inf (an id that is no token) stays, and NaN does."""
        if self.reward_range is None:
            return rewards
        return rewards.clamp(*self.reward_range).where(rewards != -torch.inf, rewards)

    def select(
        self,
        logprobs: Tensor,
        rewards: Tensor,
        ids: Tensor,
        position: Tensor,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw (or pick) slots int64 [B] from the ratio policy, with its log-probabilities [B, k];
        `position` int64 [B] counts the answer's tokens. Only those in `keep` [B, k] can win."""
        if keep is not None:
            logprobs, rewards = logprobs.masked_fill(~keep, -torch.inf), rewards.where(keep, 0.0)
        policy = self.beta, self.temperature, self.seeds, position, self.do_sample
        return self._sample(logprobs, rewards, ids, *policy)

    def keep_rows(self, rows: Tensor) -> Guidance:
        columns = {n: getattr(self, n)[rows] for n in ("beta", "temperature", "seeds")}
        return replace(self, **columns)


class Rows:
    """The rows still running, and what has left: ids, which row is which, what has ended."""

    def __init__(self, input_ids: Tensor, pad: Tensor | None) -> None:
        self.input_ids, self.pad = input_ids, pad
        self.batch = input_ids.shape[0]
        self.origin = torch.arange(self.batch, device=input_ids.device)
        self.unfinished = torch.ones_like(self.origin, dtype=torch.bool)
        self.position = torch.zeros_like(self.origin)
        self.steps = torch.zeros((), dtype=torch.int64, device=input_ids.device)
        self.left: list[tuple[Tensor, Tensor]] = []

    def append(self, ids: Tensor, slot: Tensor) -> Tensor:
        """Put the chosen tokens [B] (padding where a row has ended) behind the rows."""
        tokens = ids.gather(1, slot[:, None])[:, 0]
        if self.pad is not None:
            tokens = torch.where(self.unfinished, tokens, self.pad)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        self.position += 1
        return tokens

    def compact(self) -> Tensor:
        """Let the ended rows leave; the rows kept, int64 [n], of those so far."""
        self.left.append((self.origin[~self.unfinished], self.input_ids[~self.unfinished]))
        rows = self.unfinished.nonzero()[:, 0]
        for name in ("input_ids", "origin", "unfinished", "position"):
            setattr(self, name, getattr(self, name)[rows])
        return rows

    def sequences(self, length: int) -> Tensor:
        """All rows [B, length] in their order, padded where they ended early."""
        if not self.left:
            return self.input_ids[:, :length]
        assert self.pad is not None
        out = self.pad.to(self.input_ids).expand(self.batch, length).clone()
        for origin, ids in [*self.left, (self.origin, self.input_ids)]:
            width = min(length, ids.shape[1])
            out[origin, :width] = ids[:, :width]
        return out


@torch.no_grad()
def guided_decode(
    policy: Policy,
    scorer: Scorer,
    input_ids: Tensor,
    guidance: Guidance,
    plan: Plan,
    record: Record,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    streamer: Any = None,
) -> dict[str, Any] | Tensor:
    """Extend prompts `input_ids` [B, P] until every row has ended; the scorer is prefilled.

    Returns the sequences int64 [B, P + T], or the fields of a `RewardGuidedOutput` where `record`
    is on. Raises `ValueError` for a row whose step has no valid choice.
    """
    prompt = input_ids.shape[1]
    rows = Rows(input_ids, plan.pad)
    check = ChoiceCheck(guidance.check_nan, rows)
    # Hugging Face's own criteria are known beforehand, and need not be asked.
    foreign = foreign_criterion(criteria) is not None
    eos = eos_ids(criteria, input_ids.device)
    steps = plan.steps if foreign else last_step(plan.steps, criteria, prompt)
    for step in range(steps):
        raw = policy.step(rows.input_ids) if step else policy.prefill(input_ids)
        logits, scores = process_logits(raw, rows.input_ids, processors, record.wants_logits)
        logprobs, ids = guidance.expand(scores)
        keep = guidance.contenders(logprobs, ids, known(scorer, ids), rows)
        rewards = guidance.bounded(score(scorer, ids, keep))
        slot, logq = guidance.select(logprobs, rewards, ids, rows.position, keep)
        slot = check(slot, rows, logprobs, rewards, step)
        scorer.commit(slot)
        step_values = slot, ids, logprobs, rewards, logq, keep
        record.add(policy, logits, scores, rows.unfinished, *step_values)
        del raw, logits
        if plan.sync_every > 1:
            rows.steps += rows.unfinished.any()
        tokens = rows.append(ids, slot)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if foreign:
            rows.unfinished &= ~ended(criteria, rows.input_ids, record.scores)
        elif len(eos):
            rows.unfinished &= (tokens[:, None] != eos).all(1)
        if (step + 1) % plan.sync_every or not (foreign or len(eos) or plan.synced_gpus):
            continue
        running = int(rows.unfinished.sum())
        if plan.synced_gpus:
            wait_for_peers(running == 0 or step + 1 == steps, policy, rows.input_ids, scorer, ids)
        if running == 0:
            break
        if plan.compact and 2 * running <= len(rows.unfinished):
            kept = rows.compact()
            policy.keep_rows(kept)
            scorer.keep_rows(kept)  # type: ignore[attr-defined]
            guidance = guidance.keep_rows(kept)
            processors = keep_rows(processors, kept)
    check.finish()
    if streamer is not None:
        streamer.end()
    steps = int(rows.steps) if plan.sync_every > 1 else step + 1
    return record.result(rows.sequences(prompt + steps), steps, policy.finish(steps))


def known(scorer: Scorer, ids: Tensor) -> Tensor | None:
    """Which candidates are tokens of the reward model, bool [B, k]; None for all."""
    return scorer.known(ids) if isinstance(scorer, RewardModelScorer) else None


def score(scorer: Scorer, ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Rewards [B, k] of the candidates (NaN of those not in `keep`, where it is given);
    `ValueError` where a scorer gives another shape."""
    rewards = scorer.score(ids) if keep is None else scorer.score(ids, keep)  # type: ignore[call-arg]
    if not isinstance(rewards, Tensor):
        raise ValueError(
            f"{type(scorer).__name__}.score gave {type(rewards).__name__}; it must give a tensor "
            f"of rewards {list(ids.shape)}"
        )
    if rewards.shape != ids.shape:
        raise ValueError(
            f"rewards has shape {list(rewards.shape)} for candidates {list(ids.shape)}; "
            f"{type(scorer).__name__}.score must give one number for each candidate"
        )
    return rewards.to(ids.device, torch.float32)


def process_logits(
    logits: Tensor, input_ids: Tensor, processors: LogitsProcessorList, keep_raw: bool
) -> tuple[Tensor, Tensor]:
    """Raw logits [B, V] of the last position, and what HF's processors make of them.

    Processors get fp32, as in HF; without any, the logits stay in the model's dtype and are widened
    in registers by `topk_logprobs`.
    """
    if processors or keep_raw:
        logits = logits.to(torch.float32, copy=True)
    return logits, processors(input_ids, logits) if processors else logits  # type: ignore[arg-type]


def wait_for_peers(
    done: bool, policy: Policy, input_ids: Tensor, scorer: Scorer, ids: Tensor
) -> None:
    """Keep sharded models' collectives going: every rank reports each step, and a finished one runs
    forwards whose results are dropped until the last one is done."""
    if not torch.distributed.is_initialized():
        return
    while True:
        working = torch.tensor(0.0 if done else 1.0, device=input_ids.device)
        torch.distributed.all_reduce(working)
        if not done or working.item() == 0:
            return
        policy.step(input_ids)
        scorer.score(ids)


class ChoiceCheck:
    """Turns the kernels' sentinel (slot −1: nothing to choose) into an error with row and step."""

    def __init__(self, check_nan: bool | None, rows: Rows) -> None:
        self.each_step = check_nan is True
        self.at_end = check_nan is None
        self.first_bad = torch.full_like(rows.origin, -1)

    def __call__(
        self, slot: Tensor, rows: Rows, logprobs: Tensor, rewards: Tensor, step: int
    ) -> Tensor:
        if self.each_step and int(slot.min()) >= 0:  # as a rule, in one operation
            return slot
        bad = (slot < 0) & rows.unfinished
        if self.each_step and bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(_explain(int(rows.origin[row]), step, logprobs[row], rewards[row]))
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


def _explain(row: int, step: int, logprobs: Tensor, rewards: Tensor) -> str:
    if logprobs.isnan().any():
        what = "the language model's logits (after the logits processors) contain NaN or +inf"
    elif rewards.isnan().any() or (rewards == torch.inf).any():
        what = f"the reward model gave {rewards.tolist()} for the candidates"
    else:
        what = "no candidate has a finite score; the logits processors left no token to choose"
    return f"row {row}, step {step}: {what}; check the inputs and the models' dtype"
