"""`rgtg_fast.generate_many`: any number of prompts through one batch that is kept full."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from . import ops
from . import validation as check
from .decode import many_options
from .decode import options as numbers
from .decode.call import Call
from .decode.logits import RowSource, logits_source, plain_language_model
from .decode.modes import Modes
from .decode.plan import SCORES_ALONE, Plan, eos_ids, make_plan
from .decode.record import Record
from .decode.refill import COLUMNS, Entry, Refill, Row
from .decode.warpers import take_temperature, trailing
from .generate import generate, stop_strings_as_criterion
from .guided import OneCall
from .models import foreign
from .models.padding import left_padded
from .models.parts import ModelParts
from .output import Answer
from .prompts import CheckedPrompts, Prepared, check_prompts, prepared_for, within_positions
from .scorers.base import RowScorer
from .scorers.rewards import leaves_of, of_rows
from .scorers.rewrite import check_draft, drafts_at, makes_drafts, rewriters_of
from .scorers.tree import SiblingScorer
from .scorers.turns import alone

FIRST_BOUND = 1024  # tokens of prompt and answer that the models are probed for at first


def generate_many(
    model: Any,
    prompts: Iterable[Any],
    *,
    reward_model: Any = None,
    batch_size: int = 16,
    tokenizer: Any = None,
    **options: Any,
) -> Iterator[Answer]:
    """Answers to any number of prompts, guided as by `generate`, in the order they end.

    A batch is kept full: where an answer ends, its row is freed and the next prompt takes its
    place, without padding. Each answer has the tokens that `generate` gives for its prompt alone,
    with the prompt's own seed (near-ties, where two tokens differ by the rounding of sums in
    another order, aside).

    Args:
        model: a causal language model, as for `generate`.
        prompts: token ids (a list, or int64 [P]), or texts where `tokenizer` is given: any iterable
            of them, read one at a time as there is room.
        reward_model: as for `generate`.
        batch_size: rows at a time.
        tokenizer: encodes texts, as it is called with a text alone, and decodes answers.
        options: those of `generate`, but for what is about its batch. `beta`, `temperature`,
            `max_new_tokens` and `seed` may be tensors with a value for each prompt; an int `seed`
            is split among the prompts as among the rows of a batch: prompt i has
            `ops.split_seed(seed, i + 1)[i]`.
            Processors and criteria that read the text are called with one row at a time.

    Returns:
        An iterator of `Answer`s. A prompt that cannot be answered (empty, too long, ids out of
        range, a NaN reward) gives one with `error`, and takes no other with it. Closing the
        iterator, an exception and an interrupt free everything. A scorer given as `reward_model`
        serves this run alone until it ends. Autocast is, for all answers, as it was at the call.

    Raises:
        ValueError: before the first prompt is read: an option out of range, one that cannot be
            taken, models that do not match, a single prompt in the place of several.

    Models that need Hugging Face's own cache, and scorers whose rows cannot come and go
    (`scorers.base.RowScorer`), run in batches of prompts in their order, padded, as `generate`
    takes them; one warning says so.

    Example::

        for answer in rgtg_fast.generate_many(lm, texts, reward_model=rm, tokenizer=tok, seed=0):
            print(answer.index, answer.text, answer.rewards[-1])
    """
    many_options.check_options(options)
    many_options.check_tokenizer(tokenizer)
    many_options.check_prompts(prompts, {n: options.get(n) for n in many_options.OF_PROMPTS})
    batch_size = numbers.integer("batch_size", batch_size, 1)
    return Many(model, reward_model, batch_size, tokenizer, options).answers(prompts)


class Many:
    """One run of `generate_many`."""

    def __init__(
        self, model: Any, reward_model: Any, batch_size: int, tokenizer: Any, given: dict[str, Any]
    ) -> None:
        self.model, self.batch_size, self.tokenizer = model, batch_size, tokenizer
        own = {f.name for f in fields(OneCall)}
        self.guiding = {name: given[name] for name in given if name in own}
        self.kwargs = {name: value for name, value in given.items() if name not in own}
        self.new_tokens = many_options.new_tokens(self.kwargs)
        check.check_model(model)
        self.device = model.get_input_embeddings().weight.device
        pad = model.generation_config.pad_token_id
        any_prompt = torch.tensor([1 if pad == 0 else 0], device=self.device)
        check.check_call(model, any_prompt[None], self.kwargs, own)
        self.guide = OneCall(reward_model, tokenizer=tokenizer, **self.guiding)
        check.check_options(self.guide)
        self.reward = self.guide.taken_apart()
        models = [part.model for part in leaves_of(self.reward)]
        devices = self.device, *(rm.device for rm in models if isinstance(rm, ModelParts))
        self.modes = Modes(["cpu", *(device.type for device in devices)])
        stop_strings_as_criterion(model, tokenizer, self.kwargs)
        first = prepared_for(
            self.model, any_prompt, self.kwargs
        )  # what is wrong with it is wrong with all
        found = foreign.pad_tensor(first.config)
        if found is not None:  # else Hugging Face would say for each prompt that it takes EOS
            self.kwargs.setdefault("pad_token_id", int(found))
        self.seeds: int | Tensor = 0
        if self.guide.seed is not None:
            self.seeds = self.guide.seed
        elif first.config.do_sample:
            self.seeds = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        self.split = torch.zeros(
            0, dtype=torch.int64, device="cpu"
        )  # of an int seed, as far as needed
        self.samples = bool(first.config.do_sample)
        self.call = self._call_of(first, FIRST_BOUND)
        self.eos = set(eos_ids(first.criteria, self.device).tolist())

    def answers(self, prompts: Iterable[Any]) -> Iterator[Answer]:
        entries = self._entries(prompts)
        if not self._can_refill():
            yield from self.modes.within(self._in_batches(entries))
            return
        with alone(self.guide.reward_model) as turn:
            try:
                for answer in self.modes.within(self._refilled(entries)):
                    yield answer
                    turn.taken()  # it may be another thread that goes on
            finally:
                self._finish()

    def _refilled(self, entries: Iterator[Entry | Answer]) -> Iterator[Answer]:
        refill, waiting = self._refill(), next(entries, None)
        while True:
            joining: list[Entry] = []
            while waiting is not None and len(refill.rows) + len(joining) < self.batch_size:
                if isinstance(waiting, Answer):
                    yield waiting
                elif len(waiting.ids) + waiting.steps <= self.bound:
                    joining.append(waiting)
                elif refill.rows or joining:
                    break  # once the batch is empty, it is made anew for longer prompts
                else:
                    self._finish()
                    prepared = self._prepared(waiting.index, waiting.ids)
                    self.call = self._call_of(prepared, 2 * (len(waiting.ids) + waiting.steps))
                    refill = self._refill()
                    continue
                waiting = next(entries, None)
            if joining:
                refill.join(joining)
            if not refill.rows:
                return
            for row in refill.advance():
                yield self._answer(row)

    def _entries(self, prompts: Iterable[Any]) -> Iterator[Entry | Answer]:
        """Each prompt checked and ready to join, or why it is not."""
        for index, prompt in enumerate(prompts):
            try:
                yield self._entry(index, prompt)
            except ValueError as error:
                yield Answer(index, error=str(error))

    def _checked(self, index: int, prompt: Any) -> tuple[Tensor, Prepared, CheckedPrompts]:
        """A prompt's ids int64 [P], and what is known of it and of its options."""
        ids = numbers.prompt_ids(prompt, self.tokenizer).to(self.device)
        check.check_ids("prompt", ids[None])
        prepared = self._prepared(index, ids)
        given = prepared.input_ids, prepared.config, prepared.model_kwargs
        return ids, prepared, check_prompts(self.guide, self.reward, self.model, *given)

    def _entry(self, index: int, prompt: Any) -> Entry:
        ids, prepared, checked = self._checked(index, prompt)
        temperature, processors = take_temperature(prepared.processors)
        plan = self._plan(prepared, checked.new_tokens, processors)
        own = self.guide.temperature
        of_rows(self.reward, lambda name, values: numbers.of_prompt(name, values, index))
        check_draft(self.reward, index)
        alike = all(type(processor) in SCORES_ALONE for processor in processors)
        return Entry(
            index,
            ids,
            plan.steps,
            beta=numbers.of_prompt("beta", self.guide.beta, index),
            temperature=temperature
            if own is None
            else numbers.of_prompt("temperature", own, index),
            seed=self._seed(index),
            processors=None if alike else processors,
            criteria=prepared.criteria if plan.foreign else None,
        )

    def _prepared(self, index: int, ids: Tensor) -> Prepared:
        own = self.kwargs
        if self.new_tokens is not None:
            count = int(numbers.of_prompt("max_new_tokens", self.new_tokens, index))
            own = own | {"max_new_tokens": count}
        return prepared_for(self.model, ids, own)

    def _call_of(self, prepared: Prepared, bound: int) -> Any:
        """The models, ready for rows of up to `bound` tokens, or as many as they have positions
        for; without any row yet."""
        guide, (ids, *_) = self.guide, prepared
        checked = check_prompts(
            guide, self.reward, self.model, ids, prepared.config, prepared.model_kwargs
        )
        self.bound = within_positions(bound, self.model, self.reward, checked.as_text)
        config = copy.copy(prepared.config)
        config.max_length = self.bound
        _, processors = take_temperature(prepared.processors)
        rest = config, prepared.model_kwargs, guide.backend
        found = plain_language_model(self.model, ids, checked.mask, *rest)
        to_scorer = checked.as_text, self.bound, config, checked.vocab_size, found
        scorer = guide.make_scorer(self.reward, *to_scorer)
        for rewriter in rewriters_of(scorer):
            rewriter.draft_by(self.model, foreign.eos_tensor(config))
        of_any_row = replace(guide, beta=1.0, temperature=1.0, seed=0)
        policy = of_any_row.ratio_policy(1, 1, self.device, config, 1.0, self.bound)
        policy = policy.keep_rows(torch.zeros(0, dtype=torch.int64, device=self.device))
        policy.prune = check.prunes(scorer, guide.prune, False)
        call = Call(
            source=logits_source(self.model, found, scorer, checked.mask, *rest),
            scorer=scorer,
            reward_prompt=checked.reward_prompt,
            policy=policy,
            plan=self._plan(prepared, checked.new_tokens, processors),
            record=Record(config, False),
            processors=processors,
            criteria=prepared.criteria,
            epilogue=policy.reward_range is None
            and policy.kl_budget is None
            and policy.top_p is None
            and isinstance(scorer, SiblingScorer)
            and scorer.is_linear(self.device),
        )
        alike = all(type(processor) in SCORES_ALONE for processor in processors)
        if alike and policy.over == "lm":
            look = self.device.type == "cpu"
            call.processors, policy.warpers = trailing(
                processors, policy.k, checked.vocab_size, look
            )
        return call

    def _plan(self, prepared: Prepared, new_tokens: int, processors: LogitsProcessorList) -> Plan:
        return make_plan(
            new_tokens,
            prepared.input_ids,
            processors,
            prepared.criteria,
            foreign.pad_tensor(prepared.config),
            sync_every=self.guide.sync_every,
            compact=False,
            step_by_step=False,
            whole_batch=False,
            synced_gpus=False,
        )

    def _can_refill(self) -> bool:
        source, scorer = self.call.source, self.call.scorer
        if isinstance(source, RowSource) and isinstance(scorer, RowScorer):
            return True
        what = (
            f"{type(scorer).__name__} has no rows that come and go"
            if isinstance(source, RowSource)
            else f"{type(self.model).__name__} runs on Hugging Face's own cache"
        )
        if self.guide.k is None or self.guide.guided_top_p is not None:
            raise ValueError(
                f"k=None and guided_top_p= need rows that come and go, and {what}; call generate "
                "for batches of prompts"
            )
        warnings.warn(
            f"generate_many goes through the prompts in padded batches of {self.batch_size}, as "
            f"{what}: rows wait for the longest answer of their batch",
            stacklevel=3,
        )
        return False

    def _refill(self) -> Refill:
        return Refill(self.call, self.eos, self.call.plan.sync_every)

    def _finish(self) -> None:
        """Let go of keys, values and twins."""
        if hasattr(self.call.scorer, "finish"):
            self.call.scorer.finish()
        del self.call

    def _answer(self, row: Row) -> Answer:
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        columns = zip(*row.columns, strict=True) if row.columns else [()] * len(COLUMNS)
        lists = dict(zip(COLUMNS, map(list, columns), strict=True))
        return Answer(row.entry.index, row.tokens, text, error=row.error, **lists)

    def _seed(self, index: int) -> int:
        if isinstance(self.seeds, Tensor):
            return int(numbers.of_prompt("seed", self.seeds, index))
        if index >= len(self.split):
            self.split = ops.split_seed(self.seeds, 2 * index + 1024)
        return int(self.split[index])

    def _in_batches(self, entries: Iterator[Entry | Answer]) -> Iterator[Answer]:
        del self.call
        batch: list[Entry] = []
        for entry in itertools.chain(entries, [None]):
            if isinstance(entry, Answer):
                yield entry
                continue
            if entry is not None:
                batch.append(entry)
            # What reads the text would see the padding; drafts may be as long as their answers.
            apart = any(e.processors is not None or e.criteria is not None for e in batch)
            apart |= makes_drafts(self.reward) and len({e.steps for e in batch}) > 1
            if batch and (entry is None or apart or len(batch) == self.batch_size):
                alone = [[e] for e in batch] if apart else [batch]
                for rows in alone:
                    yield from self._batch(rows)
                batch = []

    def _batch(self, batch: list[Entry]) -> Iterator[Answer]:
        """The answers to prompts of one call of `generate`; by themselves where that fails."""
        ids, mask = left_padded([entry.ids for entry in batch])
        dtypes = dict.fromkeys(("beta", "temperature"), torch.float32) | {"seed": torch.int64}
        numbers_of_rows = {
            name: torch.tensor([getattr(entry, name) for entry in batch], dtype=dtype, device="cpu")
            for name, dtype in dtypes.items()
        }
        indices = [entry.index for entry in batch]
        reward = of_rows(self.guide.reward_model, lambda name, values: values[indices])
        reward = drafts_at(reward, indices)
        kwargs = {n: v for n, v in self.kwargs.items() if n not in ("max_length", "max_new_tokens")}
        try:
            out: Any = generate(
                self.model,
                ids,
                attention_mask=mask,
                reward_model=reward,
                tokenizer=self.tokenizer,
                max_new_tokens=max(entry.steps for entry in batch),
                return_dict_in_generate=True,
                output_candidates=True,
                **self.guiding | numbers_of_rows,
                **kwargs,
            )
        except ValueError as error:
            if len(batch) == 1:
                yield Answer(batch[0].index, error=str(error))
                return
            for entry in batch:
                yield from self._batch([entry])
            return
        chosen = out.sequences[:, ids.shape[1] :]
        columns = self._columns(out, chosen, numbers_of_rows).tolist()
        for i, entry in enumerate(batch):
            tokens = chosen[i].tolist()[: entry.steps]
            ends = [at + 1 for at, token in enumerate(tokens) if token in self.eos]
            n = min(ends, default=len(tokens))
            yield self._answer(Row(entry, tokens[:n], columns[i][:n]))

    def _columns(self, out: Any, tokens: Tensor, of_rows: dict[str, Tensor]) -> Tensor:
        """The `COLUMNS` [B, T, 5] of tokens [B, T] in the output of `generate`."""
        drawn = out.candidate_ids == tokens[..., None]
        logprobs = torch.where(drawn, out.candidate_logprobs, 0.0).sum(-1)
        log_ratio = -logprobs
        beta = out.beta
        if beta is None:
            beta = of_rows["beta"].to(drawn.device, torch.float32)[:, None].expand_as(out.rewards)
        if self.samples:
            temperature = of_rows["temperature"].to(drawn.device)[:, None, None]
            scored = (out.candidates_scored > 0)[..., None]
            tilt = torch.where(scored, beta[..., None] * out.candidate_rewards, 0.0)
            scores = (out.candidate_logprobs + tilt) / temperature
            logq = torch.where(drawn, torch.log_softmax(scores, -1), 0.0).sum(-1)
            log_ratio = (logq - logprobs).masked_fill(out.kl.isnan(), torch.nan)
        return torch.stack([out.rewards, out.kl, logprobs, log_ratio, beta], -1)
