"""What gives the next token's logits: the frozen language model π, in one of two ways.

`HFLogits` is Hugging Face's own forward, cache and bookkeeping, for any model and option.
`CachedLogits` keeps the keys and values in a `SiblingCache` of width 1 and attends by plug-in:
nothing is concatenated and no mask is built; only the reading of the prefix grows with its length.
It is taken where a numerical probe finds it right for the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer

from .. import ops
from ..models import foreign
from ..models.cache import SiblingCache
from ..models.foreign import CACHE
from ..models.language_model import LanguageModel
from ..models.padding import (
    groups_of_like_length,
    has_holes,
    positions_of,
    without_copies,
)
from ..models.parts import computing_dtype, numerics
from ..models.siblings import SiblingForward, fill_cache
from ..models.twin import Twins
from ..scorers.joint import JointScorer
from ..scorers.probe import TOLERANCE, probe
from .rows import Rows


class LogitsSource(Protocol):
    """The contract between the decode loop and whatever gives logits."""

    attentions: Any  # of the last forward, where the generation configuration asks for them
    hidden_states: Any
    capturable: bool  # as a scorer's

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

    capturable = False
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
    capturable = True

    def __init__(
        self,
        view: LanguageModel,
        attention_mask: Tensor,
        capacity: int,
        backend: ops.Backend,
        cache: DynamicCache,
    ) -> None:
        self.view, self.attention_mask, self.cache = view, attention_mask, cache
        self.forward = SiblingForward(view.twin(eval_mode=False), 1, capacity, True, backend)
        self.rest = view.rest()

    def prefill(self, input_ids: Tensor) -> Tensor:
        self.prompt = input_ids.shape[1]
        device = self.view.device
        mask = self.attention_mask.to(device)
        ids, own, copies = without_copies(input_ids.to(device), mask)
        last = self.forward.prefill(ids, own, copies)[:, -1]
        last = last if copies is None else last[copies.to(last.device)]
        self.slot = torch.zeros(len(mask), dtype=torch.int64, device=device)
        return self.rest.logits(last, self.forward.output_type).to(input_ids.device)

    def join(self, prompts: Sequence[Tensor]) -> Tensor:
        here = [prompt.to(self.view.device) for prompt in prompts]
        parts = [self.forward.join(group)[:, -1] for group in groups_of_like_length(here)]
        logits = self.rest.logits(torch.cat(parts), self.forward.output_type)
        self.slot = torch.zeros(
            self.forward.cache.batch, dtype=torch.int64, device=self.view.device
        )
        return logits.to(prompts[0].device)

    def advance(self, last: Tensor) -> Tensor:
        old, all_rows = len(last), len(self.slot)
        rows = None if old == all_rows else torch.arange(old, device=self.view.device)
        hidden = self.forward.siblings(last.to(self.view.device), rows=rows)
        self.forward.commit(self.slot[:old], rows)
        return self.rest.logits(hidden[:, 0], self.forward.output_type).to(last.device)

    def step(self, rows: Rows) -> Tensor:
        hidden = self.forward.siblings(rows.last().to(self.view.device))
        self.forward.commit(self.slot)
        logits = self.rest.logits(hidden[:, 0], self.forward.output_type)
        return logits.to(rows.ids.device)

    def can_keep_rows(self) -> bool:
        return True

    def keep_rows(self, rows: Tensor) -> None:
        rows = rows.to(self.view.device)
        self.forward.keep_rows(rows)
        self.slot = self.slot[rows]

    @property
    def caches(self) -> Sequence[SiblingCache]:
        return (self.forward.cache,)

    def finish(self, steps: int) -> Any:
        return fill_cache(self.cache, self.forward.cache, self.prompt + steps - 1, len(self.slot))


class JointLogits:
    """The logits of a `JointScorer`'s winners; it has no forward of its own."""

    attentions = hidden_states = None
    capturable = True
    caches: Sequence[SiblingCache] = ()  # the scorer's

    def __init__(self, view: LanguageModel, scorer: JointScorer, cache: DynamicCache) -> None:
        self.view, self.scorer, self.cache = view, scorer, cache
        self.rest = view.rest()

    def prefill(self, input_ids: Tensor) -> Tensor:
        self.prompt = input_ids.shape[1]
        return self._logits().to(input_ids.device)

    def step(self, rows: Rows) -> Tensor:
        return self._logits().to(rows.ids.device)

    def join(self, prompts: Sequence[Tensor]) -> Tensor:
        return self._logits(slice(-len(prompts), None)).to(prompts[0].device)

    def advance(self, last: Tensor) -> Tensor:
        return self._logits(slice(len(last))).to(last.device)

    def _logits(self, rows: slice = slice(None)) -> Tensor:
        hidden = self.scorer.next_hidden[rows]
        return self.rest.logits(hidden, self.scorer.forward.output_type)

    def can_keep_rows(self) -> bool:
        return True

    def keep_rows(self, rows: Tensor) -> None:
        """The scorer's rows are the source's."""

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
    if found is not None:
        view, way = found
        cache = model_kwargs[CACHE]
        if isinstance(scorer, JointScorer):
            return JointLogits(view, scorer, cache)
        if way == "fused":
            return CachedLogits(view, attention_mask, config.max_length, backend, cache)
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


_head_verdicts: weakref.WeakKeyDictionary[Any, dict[tuple, bool]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def language_model(
    model: Any, max_length: int, backend: ops.Backend
) -> tuple[LanguageModel, str] | None:
    """`model` taken apart, and the way its siblings run ("fused" or "masked", see `scorers.probe`).

    None where neither is right, or where the user has put something on the model that running its
    parts would pass by (hooks, a compiled or replaced forward, prompt tuning).
    """
    if (
        type(model).prepare_inputs_for_generation
        is not GenerationMixin.prepare_inputs_for_generation
        or "prepare_inputs_for_generation" in model.__dict__
    ):
        return None
    view = LanguageModel(model)
    if view.base is model:
        return None
    if not foreign.untouched(model, view.base):
        return None
    way = probe(view, max_length, ("tree",), backend).way("tree")
    if way is None or not _head_is_right(view):
        return None
    return view, way


def _head_is_right(view: LanguageModel) -> bool:
    """Whether `view.logits` of the base's hidden state are what the whole model gives."""
    known = _head_verdicts.setdefault(view.model, {})
    key = (view.dtype, str(view.device), numerics(view.device))
    if key not in known:
        ids = torch.arange(1, 4, device=view.device)[None] % view.vocab_size
        twins = Twins([view.model], eval_mode=True)  # kept: its copies are emptied when it is freed
        whole = twins[view.model]
        want = whole(input_ids=ids, use_cache=False, return_dict=True).logits[:, -1]
        hidden, out = view.twin().forward_base(ids, use_cache=False)
        got = view.rest(eval_mode=True).logits(hidden[:, -1], type(out))
        spread = want.float().std()
        error = (got.float() - want.float()).abs().max()
        allowed = TOLERANCE[computing_dtype(view)] * spread
        known[key] = bool(error <= allowed) or bool(want.isnan().any())
    return known[key]
