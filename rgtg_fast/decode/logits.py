"""What gives the next token's logits: the frozen language model π, in one of two ways.

`HFLogits` is Hugging Face's own forward, cache and bookkeeping, for any model and option.
`CachedLogits` keeps the keys and values in a `SiblingCache` of width 1 and attends by plug-in:
nothing is concatenated and no mask is built; only the reading of the prefix grows with its length.
It is taken where a numerical probe finds it right for the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from .. import ops
from ..models import foreign
from ..models.cache import SiblingCache
from ..models.foreign import CACHE
from ..models.language_model import LanguageModel
from ..models.padding import has_holes, positions_of
from ..models.siblings import SiblingForward, fill_cache
from ..scorers.causal import StaticForward, language_model
from ..scorers.joint import JointScorer
from ..scorers.lazy import LazyScorer
from ..scorers.own_states import StateScorer
from ..scorers.weighted import leaves_of
from .rows import Rows


class LogitsSource(Protocol):
    """The contract between the decode loop and whatever gives logits."""

    attentions: Any  # of the last forward, where the generation configuration asks for them
    hidden_states: Any
    capturable: bool  # as a scorer's
    owns_cache: bool  # a `SiblingCache`, that of its `forward`

    @property
    def caches(self) -> Sequence[SiblingCache]:
        """As a scorer's."""

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Take the prompts int64 [B, P]; logits [B, V] of the next token."""

    def step(self, rows: Rows) -> Tensor:
        """Logits [B, V] after one more token, the last of `rows`."""

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with rows `rows` int64 [n] alone."""

    def can_keep_rows(self) -> bool:
        """Whether `keep_rows` is possible."""

    def finish(self, steps: int) -> Any:
        """The key/value cache to return after `steps` tokens were chosen, the last not fed."""


@runtime_checkable
class RowSource(Protocol):
    """What a source has more whose rows come and go by themselves, in the order of the scorer's."""

    def join(self, prompts: Sequence[Tensor]) -> Tensor:
        """Rows with these prompts (int64 [P] each) come in behind the others, and have come in to
        the scorer; logits [n, V] of their next tokens."""

    def advance(self, last: Tensor) -> Tensor:
        """Logits [n, V] of the first n rows, after the tokens `last` [n, 1]."""


class HFLogits:
    """`model.forward` with what `model.generate` prepared; any cache, embeddings, no cache."""

    capturable = owns_cache = False
    caches: Sequence[SiblingCache] = ()

    def __init__(
        self, model: Any, config: GenerationConfig, model_kwargs: dict[str, Any], batch: int
    ) -> None:
        self.model, self.config, self.model_kwargs, self.batch = model, config, model_kwargs, batch
        self.attentions = self.hidden_states = None

    def prefill(self, input_ids: Tensor) -> Tensor:
        return self._take(
            foreign.prefill(self.model, input_ids, self.config, self.model_kwargs), input_ids
        )

    def step(self, rows: Rows) -> Tensor:
        """One LM forward on the last token (on the whole sequence with `use_cache=False`)."""
        input_ids = rows.so_far()
        inputs = self.model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=1 if self.model_kwargs["use_cache"] else None,
            **self.model_kwargs,
        )
        return self._take(self.model(**inputs, return_dict=True), input_ids)

    def _take(self, outputs: Any, input_ids: Tensor) -> Tensor:
        self.model_kwargs = foreign.updated_kwargs(self.model, outputs, self.model_kwargs)
        self.attentions = outputs.get("attentions")
        self.hidden_states = outputs.get("hidden_states")
        return outputs.logits[:, -1].to(input_ids.device)

    def can_keep_rows(self) -> bool:
        """Only plain caches and arguments with a row for each row of the batch."""
        cache = self.model_kwargs.get(CACHE)
        plain = _keys_and_values_alone(cache)
        known = {CACHE, "attention_mask", "position_ids", "use_cache", "cache_position"}
        return plain and self.model_kwargs.keys() <= known

    def keep_rows(self, rows: Tensor) -> None:
        self.model_kwargs[CACHE].batch_select_indices(rows)
        for name in ("attention_mask", "position_ids"):
            value = self.model_kwargs.get(name)
            if value is not None and value.shape[0] == self.batch:
                self.model_kwargs[name] = value[rows.to(value.device)]
        self.batch = len(rows)

    def finish(self, steps: int) -> Any:
        return self.model_kwargs.get(CACHE)


class CachedLogits:
    """The language model on a `SiblingCache` of width 1; `cache` is the one to give back filled."""

    attentions = hidden_states = None
    capturable = owns_cache = True

    def __init__(
        self,
        view: LanguageModel,
        attention_mask: Tensor,
        capacity: int,
        backend: ops.Backend,
        cache: DynamicCache,
    ) -> None:
        self.view, self.attention_mask, self.cache = view, attention_mask, cache
        self.static = StaticForward(view, capacity, backend, eval_mode=False)
        # [B], tokens of the prompts
        self.counts = torch.zeros(0, dtype=torch.int64, device=view.device)

    def prefill(self, input_ids: Tensor) -> Tensor:
        self.prompt = input_ids.shape[1]
        device = self.view.device
        mask = self.attention_mask.to(device)
        self.counts = mask.sum(1)
        hidden = self.static.prefill(input_ids.to(device), mask)
        self.newest = hidden[:, None]
        return self.static.logits(hidden).to(input_ids.device)

    def join(self, prompts: Sequence[Tensor]) -> Tensor:
        hidden = self.static.join([prompt.to(self.view.device) for prompt in prompts])
        known = [self.newest[:, -1:]] if len(self.counts) else []
        self.newest = torch.cat([*known, hidden[:, None]])
        counts = self.counts.new_tensor([len(prompt) for prompt in prompts])
        self.counts = torch.cat([self.counts, counts])
        return self.static.logits(hidden).to(prompts[0].device)

    def advance(self, last: Tensor) -> Tensor:
        device, n = self.view.device, len(last)
        rows = None if n == len(self.counts) else torch.arange(n, device=device)
        hidden = self.static.step(last.to(device), rows)
        self.newest = torch.cat([hidden[:, None], self.newest[n:]])
        return self.static.logits(hidden).to(last.device)

    def states(self) -> Tensor:
        """See `scorers.own_states.States`."""
        return self.newest[:, -1]

    def step(self, rows: Rows) -> Tensor:
        return self.feed(rows.last())

    def feed(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one more token int64 [B, 1]."""
        hidden = self.static.step(tokens.to(self.view.device))
        self.newest = hidden[:, None]
        return self.static.logits(hidden).to(tokens.device)

    def extend(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Logits [B, n, V] after each of the next tokens int64 [B, n], of which a row has the first
        `counts` [B] (behind them, anything)."""
        device = self.view.device
        self.newest = hidden = self.forward.extend(tokens.to(device), counts.to(device))
        logits = self.static.logits(hidden.flatten(0, 1))
        return logits.view(*tokens.shape, -1).to(tokens.device)

    def crop(self, answers: Tensor) -> None:
        """Forget all but the prompts and the first `answers` - 1 tokens behind them, [B]."""
        self.forward.crop(self.counts + answers.to(self.view.device) - 1)

    def known(self) -> None:
        """None: the newest token is not fed yet."""

    def pause(self, answers: Tensor) -> None:
        """The reward model has a cache of its own."""

    def resume(self, answers: Tensor) -> None:
        self.crop(answers)

    def can_keep_rows(self) -> bool:
        return True

    def keep_rows(self, rows: Tensor) -> None:
        rows = rows.to(self.view.device)
        self.static.keep_rows(rows)
        self.counts, self.newest = self.counts[rows], self.newest[rows]

    @property
    def forward(self) -> SiblingForward:
        """The language model's, of one sibling."""
        return self.static.forward

    @property
    def caches(self) -> Sequence[SiblingCache]:
        return (self.forward.cache,)

    def finish(self, steps: int) -> Any:
        (own,) = self.caches
        return fill_cache(self.cache, own, self.prompt + steps - 1, len(self.static.slot))


class JointLogits:
    """The logits of a `JointScorer`'s winners; it has no forward of its own."""

    attentions = hidden_states = None
    capturable, owns_cache = True, False
    caches: Sequence[SiblingCache] = ()  # the scorer's

    def __init__(
        self,
        view: LanguageModel,
        scorer: JointScorer,
        attention_mask: Tensor,
        cache: DynamicCache,
    ) -> None:
        self.view, self.scorer, self.cache = view, scorer, cache
        self.attention_mask = attention_mask
        self.rest = view.rest()
        # [B], tokens of the prompts
        self.counts = torch.zeros(0, dtype=torch.int64, device=view.device)

    def prefill(self, input_ids: Tensor) -> Tensor:
        self.prompt = input_ids.shape[1]
        self.counts = self.attention_mask.to(self.view.device).sum(1)
        self.newest = self.scorer.next_hidden[:, None]
        return self._logits().to(input_ids.device)

    def step(self, rows: Rows) -> Tensor:
        return self._logits().to(rows.ids.device)

    def join(self, prompts: Sequence[Tensor]) -> Tensor:
        counts = self.counts.new_tensor([len(prompt) for prompt in prompts])
        self.counts = torch.cat([self.counts, counts])
        return self._logits(slice(-len(prompts), None)).to(prompts[0].device)

    def advance(self, last: Tensor) -> Tensor:
        return self._logits(slice(len(last))).to(last.device)

    def states(self) -> Tensor:
        """See `scorers.own_states.States`."""
        return self.scorer.next_hidden

    def _logits(self, rows: slice = slice(None)) -> Tensor:
        return self._logits_of(self.scorer.next_hidden[rows])

    def _logits_of(self, hidden: Tensor) -> Tensor:
        return self.rest.logits(hidden, self.forward.output_type)

    def known(self) -> Tensor:
        self.newest = self.scorer.next_hidden[:, None]
        return self._logits().to(self.attention_mask.device)

    def feed(self, tokens: Tensor) -> Tensor:
        """As `CachedLogits`, ahead of the scorer's rows."""
        return self.extend(tokens, torch.ones_like(tokens[:, 0]))[:, 0]

    def extend(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """As `CachedLogits`, ahead of the scorer's rows."""
        device = self.view.device
        self.newest = hidden = self.scorer.look_ahead(tokens.to(device), counts.to(device))
        logits = self._logits_of(hidden.flatten(0, 1))
        return logits.view(*tokens.shape, -1).to(tokens.device)

    def crop(self, answers: Tensor) -> None:
        self.scorer.look_back(self.counts + answers.to(self.view.device) - 1)

    def pause(self, answers: Tensor) -> None:
        """The scorer goes on from its own rows."""
        self.crop(answers + 1)

    def resume(self, answers: Tensor) -> None:
        """The scorer's rows are at their ends."""

    @property
    def forward(self) -> SiblingForward:
        return self.scorer.forward

    def can_keep_rows(self) -> bool:
        return True

    def keep_rows(self, rows: Tensor) -> None:
        """The scorer's rows are the source's."""
        self.counts = self.counts[rows.to(self.view.device)]

    def finish(self, steps: int) -> Any:
        rows = len(self.scorer.next_hidden)
        return fill_cache(self.cache, self.scorer.forward.cache, self.prompt + steps - 1, rows)


def logits_source(
    model: Any,
    found: tuple[LanguageModel, str] | None,
    scorer: Any,
    attention_mask: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    backend: ops.Backend,
) -> LogitsSource:
    """The source of a call; `found` is what `plain_language_model` gave for it."""
    source: LogitsSource
    if found is not None:
        view, way = found
        cache = model_kwargs[CACHE]
        parts = leaves_of(scorer.scorer if isinstance(scorer, LazyScorer) else scorer)
        joint = next((part for part in parts if isinstance(part, JointScorer)), None)
        if joint is not None or way == "fused":
            if joint is not None:
                source = JointLogits(view, joint, attention_mask, cache)
            else:
                source = CachedLogits(view, attention_mask, config.max_length, backend, cache)
            for part in parts:
                if isinstance(part, StateScorer):
                    part.source = source
            return source
    return HFLogits(model, config, model_kwargs, len(attention_mask))


def plain_language_model(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    backend: ops.Backend,
) -> tuple[LanguageModel, str] | None:
    """`language_model`, or None where a call asks for Hugging Face's own loop.

    It does by naming a cache (`cache=` with something in it, `cache_implementation=`),
    by wanting attentions or hidden states, or by passing anything beyond ids and mask.
    """
    if not _is_plain_call(input_ids, attention_mask, config, model_kwargs):
        return None
    return language_model(model, config.max_length, backend)


def _is_plain_call(
    input_ids: Tensor, mask: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> bool:
    given = {name: value for name, value in model_kwargs.items() if value is not None}
    known = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}
    asked = (
        config.cache_implementation,
        config.prefill_chunk_size,
        config.output_attentions,
        config.output_hidden_states,
    )
    if any(asked) or not given.keys() <= known or mask.shape != input_ids.shape:
        return False
    if has_holes(mask):  # the cache would reorder its slots, and is given back to the caller
        return False
    cache, positions = given.get(CACHE), given.get("position_ids")
    if not _keys_and_values_alone(cache) or not given.get("use_cache"):
        return False
    if cache.get_seq_length():  # type: ignore[union-attr]
        return False
    return positions is None or torch.equal(positions, positions_of(mask))


def _keys_and_values_alone(cache: Any) -> bool:
    """No recurrent state, and nothing static or quantised."""
    return type(cache) is DynamicCache and all(isinstance(x, DynamicLayer) for x in cache.layers)
