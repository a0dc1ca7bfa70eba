"""The decode loop: one function per arrow of a guided step.

    last token -> LM forward -> logits [B, V] -> HF logits processors -> topk_logprobs
                                                                           |  ids, logprobs [B, k]
    next token <- commit(slot) <- ratio_sample <- rewards [B, k] <- scorer.score(ids)

The loop knows no reward model, a scorer knows no loop. `model._prefill` and
`model._update_model_kwargs_for_generation` are the only private helpers of transformers in use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from . import ops
from .output import RewardGuidedOutput
from .scorers.base import Scorer


@dataclass
class Guidance:
    """The ratio policy of a run: softmax((log π + β r) / T) over the k most likely tokens.

    `beta` and `temperature` are floats or fp32 [B]; `seeds` int64 [B], one per row; `check_nan`
    True reads a flag at every step, None once at the end, False never.
    """

    k: int
    beta: float | Tensor
    temperature: float | Tensor
    seeds: Tensor
    do_sample: bool
    check_nan: bool | None
    backend: ops.Backend


@torch.no_grad()
def guided_decode(
    model: Any,
    input_ids: Tensor,
    scorer: Scorer,
    guidance: Guidance,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    streamer: Any = None,
    synced_gpus: bool = False,
    output_candidates: bool = False,
) -> RewardGuidedOutput | Tensor:
    """Extend prompts `input_ids` [B, P] until every row is finished; the scorer is prefilled.

    Returns the sequences int64 [B, P + T], or a `RewardGuidedOutput` where the configuration asks
    for one. Raises `ValueError` for a row whose step has no valid choice.
    """
    batch = input_ids.shape[0]
    pad = getattr(generation_config, "_pad_token_tensor", None)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    record = Record(generation_config, output_candidates)
    check = ChoiceCheck(guidance.check_nan, batch, input_ids.device)
    unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    for step in range(generation_config.max_length):
        if step:
            outputs = lm_forward(model, input_ids, model_kwargs)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits, scores = process_logits(outputs, input_ids, logits_processor, record.wants_logits)
        logprobs, ids = ops.topk_logprobs(scores, guidance.k, backend=guidance.backend)
        rewards = scorer.score(ids)
        slot, logq = select(logprobs, rewards, ids, guidance, step)
        slot = check(slot, unfinished, logprobs, rewards, step)
        scorer.commit(slot)
        tokens = ids.gather(1, slot[:, None])[:, 0]
        if ends and pad is not None:
            tokens = torch.where(unfinished, tokens, pad.to(tokens.device))
        record.add(outputs, logits, scores, unfinished, slot, ids, logprobs, rewards, logq)
        del outputs, logits
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, record.scores)
        done = not unfinished.any()
        if synced_gpus:
            wait_for_peers(done, model, input_ids, model_kwargs, scorer, ids)
        if done:
            break
    check.finish()
    if streamer is not None:
        streamer.end()
    return record.result(input_ids, model_kwargs)


def lm_forward(model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Any:
    """One LM forward on the last token (on the whole sequence with `use_cache=False`)."""
    inputs = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=1 if model_kwargs["use_cache"] else None, **model_kwargs
    )
    return model(**inputs, return_dict=True)


def process_logits(
    outputs: Any, input_ids: Tensor, processors: LogitsProcessorList, keep_raw: bool
) -> tuple[Tensor, Tensor]:
    """Raw logits [B, V] of the last position, and what HF's processors make of them.

    Processors get fp32, as in HF; without any, the logits stay in the model's dtype and are widened
    in registers by `topk_logprobs`.
    """
    logits = outputs.logits[:, -1].to(input_ids.device)
    if processors or keep_raw:
        logits = logits.to(torch.float32, copy=True)
    return logits, processors(input_ids, logits) if processors else logits  # type: ignore[arg-type]


def select(
    logprobs: Tensor, rewards: Tensor, ids: Tensor, guidance: Guidance, step: int
) -> tuple[Tensor, Tensor]:
    """Draw (or pick) slots int64 [B] from the ratio policy, with its log-probabilities [B, k]."""
    return ops.ratio_sample(
        logprobs,
        rewards,
        ids,
        guidance.beta,
        guidance.temperature,
        guidance.seeds,
        step,
        guidance.do_sample,
        backend=guidance.backend,
    )


def wait_for_peers(
    done: bool,
    model: Any,
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    scorer: Scorer,
    ids: Tensor,
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
        lm_forward(model, input_ids, model_kwargs)
        scorer.score(ids)


class ChoiceCheck:
    """Turns the kernels' sentinel (slot −1: nothing to choose) into an error with row and step."""

    def __init__(self, check_nan: bool | None, batch: int, device: torch.device) -> None:
        self.each_step = check_nan is True
        self.at_end = check_nan is None
        self.first_bad = torch.full((batch,), -1, dtype=torch.int64, device=device)

    def __call__(
        self, slot: Tensor, unfinished: Tensor, logprobs: Tensor, rewards: Tensor, step: int
    ) -> Tensor:
        bad = (slot < 0) & unfinished
        if self.each_step and bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(_explain(row, step, logprobs[row], rewards[row]))
        if self.at_end:
            self.first_bad = torch.where(bad & (self.first_bad < 0), step, self.first_bad)
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


@dataclass
class Record:
    """Collects what `return_dict_in_generate` and its `output_*` flags ask for."""

    config: GenerationConfig
    output_candidates: bool
    columns: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c = self.config
        self.on = bool(c.return_dict_in_generate)
        self.scores: tuple | None = () if self.on and c.output_scores else None
        self.logits: tuple | None = () if self.on and c.output_logits else None
        self.attentions: tuple | None = () if self.on and c.output_attentions else None
        self.hidden_states: tuple | None = () if self.on and c.output_hidden_states else None

    @property
    def wants_logits(self) -> bool:
        return self.logits is not None or self.scores is not None

    def add(
        self,
        outputs: Any,
        logits: Tensor,
        scores: Tensor,
        unfinished: Tensor,
        slot: Tensor,
        ids: Tensor,
        logprobs: Tensor,
        rewards: Tensor,
        logq: Tensor,
    ) -> None:
        if not self.on:
            return
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.attentions is not None:
            self.attentions += (outputs.attentions,)
        if self.hidden_states is not None:
            self.hidden_states += (outputs.hidden_states,)
        # An impossible candidate has q = 0 and log q − log π = −inf or NaN: it adds nothing.
        q = logq.exp()
        kl = torch.where(q > 0, q * (logq - logprobs), 0.0).sum(-1)
        chosen = rewards.gather(1, slot[:, None])[:, 0]
        self._append("rewards", chosen.masked_fill(~unfinished, torch.nan))
        self._append("kl", kl.masked_fill(~unfinished, torch.nan))
        if self.output_candidates:
            self._append("candidate_ids", ids)
            self._append("candidate_logprobs", logprobs)
            self._append("candidate_rewards", rewards)

    def _append(self, name: str, value: Tensor) -> None:
        self.columns.setdefault(name, []).append(value)

    def result(self, sequences: Tensor, model_kwargs: dict) -> RewardGuidedOutput | Tensor:
        if not self.on:
            return sequences
        return RewardGuidedOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=self.scores,
            logits=self.logits,
            attentions=self.attentions,
            hidden_states=self.hidden_states,
            past_key_values=model_kwargs.get("past_key_values"),
            **{name: torch.stack(column, dim=1) for name, column in self.columns.items()},
        )
