"""A causal language model on a static cache, where a numerical probe finds that right for it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from .. import ops
from ..models import foreign
from ..models.language_model import LanguageModel
from ..models.padding import groups_of_like_length, without_copies
from ..models.parts import computing_dtype, numerics
from ..models.siblings import SiblingForward
from ..models.twin import Twins
from .probe import TOLERANCE, probe

_head_verdicts: weakref.WeakKeyDictionary[Any, dict[tuple, bool]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def language_model(
    model: Any, max_length: int | None, backend: ops.Backend
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


class StaticForward:
    """A causal model, one token a row and step, on a `SiblingCache` of width 1.

    What a step changes is updated in place. `eval_mode` is that of the twin that runs.
    """

    def __init__(
        self, view: LanguageModel, capacity: int, backend: ops.Backend, eval_mode: bool
    ) -> None:
        self.device = view.device
        self.forward = SiblingForward(view.twin(eval_mode), 1, capacity, True, backend)
        self.rest = view.rest(eval_mode)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden states [B, H] of the prompts int64 [B, P], padded on the left."""
        self.slot = torch.zeros(len(input_ids), dtype=torch.int64, device=self.device)
        ids, own, copies = without_copies(input_ids, attention_mask)
        last = self.forward.prefill(ids, own, copies)[:, -1]
        return last if copies is None else last[copies.to(last.device)]

    def join(self, prompts: Sequence[Tensor]) -> Tensor:
        """Rows with these prompts (int64 [P] each) come in; their last hidden states [n, H]."""
        parts = [self.forward.join(group)[:, -1] for group in groups_of_like_length(prompts)]
        rows = self.forward.cache.batch
        self.slot = torch.zeros(rows, dtype=torch.int64, device=self.device)
        return torch.cat(parts)

    def step(self, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """The hidden states [n, H] of one more token int64 [n, 1] of rows int64 [n] (None: all)."""
        hidden = self.forward.siblings(ids, rows=rows)
        self.forward.commit(self.slot[: len(ids)], rows)
        return hidden[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, V] of hidden states [B, H]."""
        return self.rest.logits(hidden, self.forward.output_type)

    def keep_rows(self, rows: Tensor) -> None:
        self.forward.keep_rows(rows)
        self.slot = self.slot[rows]
