"""One call of a decoder of whole sequences: its models, and its prompts one after another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import transformers as tf
from torch import Tensor

from ..decode import many_options
from ..decode import options as numbers
from ..decode.logits import plain_language_model
from ..decode.plan import SCORES_ALONE, eos_ids
from ..decode.refill import Entry
from ..generate_many import FIRST_BOUND, Many
from ..models import foreign
from ..output import Answer
from ..prompts import Prepared, check_prompts, prepared_for, within_positions
from ..scorers.base import RowScorer
from ..scorers.causal import StaticForward
from ..scorers.rewards import of_rows
from ..scorers.rewrite import check_draft, rewriters_of
from ..scorers.turns import alone
from .output import SequenceAnswer
from .texts import Texts

# Options of `generate` that are about guiding token by token.
_OF_TOKENS = (
    *("k", "beta", "kl_budget", "beta_schedule", "min_entropy", "candidates", "prune"),
    *("guided_top_p", "reward_range", "sync_every", "check_nan"),
)
_SCORES_ALONE: tuple[type, ...] = (*SCORES_ALONE, tf.TemperatureLogitsWarper)

Decoder = Callable[[Texts, Entry], SequenceAnswer]


class Run(Many):
    """The models of a call, and the options that make π of the language model's logits.

    `backspace` is the token that takes another back, which begins no answer and is in no prompt;
    `greedy` says that the method may go without draws. `own` are options of the guide that it has a
    use for: `k` candidates, for one.
    """

    call: Texts

    def __init__(
        self,
        model: Any,
        reward_model: Any,
        tokenizer: Any,
        options: dict[str, Any],
        *,
        backspace: int | None = None,
        greedy: bool = False,
        **own: Any,
    ) -> None:
        self.backspace = backspace
        given = dict(options)
        many_options.check_options(given)
        many_options.check_tokenizer(tokenizer)
        for name in _OF_TOKENS:
            if name in given:
                raise ValueError(
                    f"{name}= is about guiding token by token; generate and generate_many take it"
                )
        sampled = given.setdefault("do_sample", True)
        if sampled is not True and not (greedy and sampled is False):
            raise ValueError(
                f"do_sample={given['do_sample']!r}: texts are drawn from the language model; "
                "leave it out"
            )
        if isinstance(given.get("temperature"), Tensor):
            raise ValueError("temperature must be a number: it is the language model's own")
        # None would mean 50, and texts would not be the language model's.
        config = given.get("generation_config") or getattr(model, "generation_config", None)
        if sampled:
            given.setdefault("top_k", getattr(config, "top_k", None) or 0)
        # Of the guide it would temper the ratio policy; here it makes π, as Hugging Face has it.
        self.temperature = given.pop("temperature", None)
        self.of_prompts = {name: given.get(name) for name in many_options.OF_PROMPTS}
        super().__init__(model, reward_model, 1, tokenizer, {"k": 1} | given | own)

    def results(self, prompts: Iterable[Any], decoder: Decoder) -> Iterator[SequenceAnswer]:
        """The answer of `decoder` to each prompt, in their order."""
        return self.in_turn(prompts, lambda: self._one_by_one(prompts, decoder))

    def in_turn(
        self, prompts: Iterable[Any], begin: Callable[[], Iterator[SequenceAnswer]]
    ) -> Iterator[SequenceAnswer]:
        """The answers to `prompts` of the iterator that `begin` gives, which has the scorers for
        itself until it ends."""
        many_options.check_prompts(prompts, self.of_prompts)
        return self._in_turn(begin)

    def _in_turn(self, begin: Callable[[], Iterator[SequenceAnswer]]) -> Iterator[SequenceAnswer]:
        with alone(self.guide.reward_model) as turn:
            try:
                for answer in self.modes.within(begin()):
                    yield answer
                    turn.taken()  # it may be another thread that goes on
            finally:
                self.finish()

    def entries(self, prompts: Iterable[Any]) -> Iterator[Entry | Answer]:
        """Each prompt checked and ready to join, or why it is not."""
        return self._entries(prompts)

    def _one_by_one(self, prompts: Iterable[Any], decoder: Decoder) -> Iterator[SequenceAnswer]:
        for entry in self.entries(prompts):
            if isinstance(entry, Answer):
                yield SequenceAnswer(entry.index, error=entry.error)
                continue
            try:
                self.make_room(entry)
                answer = decoder(self.call, entry)
                self.call.select([])
            except ValueError as error:
                self.finish()  # the models may have other rows than each other
                answer = SequenceAnswer(entry.index, error=str(error))
            yield answer

    def make_room(self, entry: Entry) -> None:
        """Have a batch that a prompt and its answer fit into; one that is made anew is empty."""
        if not self.has_room(entry):
            self.finish()
            tokens = len(entry.ids) + entry.steps
            prepared = self._prepared(entry.index, entry.ids)
            self.call = self._call_of(prepared, max(FIRST_BOUND, 2 * tokens))

    def has_room(self, entry: Entry) -> bool:
        """Whether the batch that there is has room for such a row."""
        return "call" in self.__dict__ and len(entry.ids) + entry.steps <= self.bound

    def finish(self) -> None:
        """Let go of keys, values and twins."""
        texts = self.__dict__.pop("call", None)
        if texts is not None and hasattr(texts.scorer, "finish"):
            texts.scorer.finish()

    def _prepared(self, index: int, ids: Tensor) -> Prepared:
        # Before the reward model's vocabulary is looked at, which need not have the token.
        if self.backspace is not None and (ids == self.backspace).any():
            raise ValueError(
                f"prompt holds the backspace token {self.backspace}, which is part of no text; "
                "take out it and the token before it"
            )
        return super()._prepared(index, ids)

    def _entry(self, index: int, prompt: Any) -> Entry:
        ids, prepared, checked = self._checked(index, prompt)
        plan = self._plan(prepared, checked.new_tokens, prepared.processors)
        of_rows(self.reward, lambda name, values: numbers.of_prompt(name, values, index))
        check_draft(self.reward, index)
        alike = all(type(processor) in _SCORES_ALONE for processor in prepared.processors)
        return Entry(
            index,
            ids,
            plan.steps,
            beta=0.0,
            temperature=1.0,
            seed=self._seed(index),
            processors=None if alike else prepared.processors,
            criteria=prepared.criteria if plan.foreign else None,
        )

    def _call_of(self, prepared: Prepared, bound: int) -> Texts:
        """The models, ready for rows of up to `bound` tokens or as many as they have positions
        for; without any row yet."""
        guide, ids = self.guide, prepared.input_ids
        if self.temperature is not None and "temperature" not in self.kwargs:
            self.kwargs["temperature"] = self.temperature
            prepared = prepared_for(self.model, ids[0], self.kwargs)
        checked = check_prompts(
            guide, self.reward, self.model, ids, prepared.config, prepared.model_kwargs
        )
        self.bound = within_positions(bound, self.model, self.reward, checked.as_text)
        config = copy.copy(prepared.config)
        config.max_length = self.bound
        rest = config, prepared.model_kwargs, guide.backend
        found = plain_language_model(self.model, ids, checked.mask, *rest)
        if found is None or found[1] != "fused":
            raise ValueError(
                f"model {type(self.model).__name__} runs on Hugging Face's own cache, and whole "
                "sequences need rows of their own length in it; use generate, or eval's best_of"
            )
        # Forwards shared with the language model would be token by token: found is left out.
        scorer = guide.make_scorer(
            self.reward, checked.as_text, self.bound, config, checked.vocab_size, None
        )
        if not isinstance(scorer, RowScorer) or not hasattr(scorer, "keep_rows"):
            raise ValueError(
                f"reward_model {type(scorer).__name__} has no rows that come and go (join, leave, "
                "extend, crop, keep_rows), which texts in progress need; see "
                "rgtg_fast.scorers.base.RowScorer"
            )
        for rewriter in rewriters_of(scorer):
            rewriter.draft_by(self.model, foreign.eos_tensor(config))
        alike = all(type(processor) in _SCORES_ALONE for processor in prepared.processors)
        return Texts(
            StaticForward(found[0], self.bound, guide.backend, eval_mode=False),
            scorer,
            prepared.processors if alike else tf.LogitsProcessorList(),
            set(eos_ids(prepared.criteria, self.device).tolist()),
            self.tokenizer,
            guide.backend,
            self.backspace,
        )
