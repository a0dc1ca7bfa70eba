"""Whether the forwards of a call run through `torch.compile`, and if not, why."""

from __future__ import annotations

import warnings
from typing import Any

from ..models.compiled import CompiledSiblings
from ..scorers.next_token import NextTokenScorer
from ..scorers.own_states import StateScorer
from ..scorers.tree import SiblingScorer
from ..scorers.weighted import WeightedScorer
from .call import Call
from .capture import why_not_module
from .logits import CachedLogits, JointLogits

WORTH = 64  # fewest steps of a captured graph that "auto" compiles for


def choose_compiled(asked: bool | str, call: Call) -> None:
    """Have the forwards of a call compiled: where that is `asked` for (with a warning that says why
    where it is not possible), or "auto" finds that a graph serves enough steps."""
    parts = call.scorer.leaves if isinstance(call.scorer, WeightedScorer) else [call.scorer]
    for part in parts:
        if isinstance(part, SiblingScorer | NextTokenScorer):
            part.compiled = None  # of an earlier call on the same object
    if asked is False or (asked == "auto" and (call.graph is None or call.plan.steps < WORTH)):
        return
    of_source = _why_not_source(call.source)
    if of_source is None and isinstance(call.source, CachedLogits):
        call.source.forward.compiled = CompiledSiblings(call.source.view, asked is True)
    of_scorer = [_why_not_scorer(part) for part in parts]
    for part, reason in zip(parts, of_scorer, strict=True):
        if reason is None and isinstance(part, SiblingScorer | NextTokenScorer):
            part.compiled = CompiledSiblings(part.rm, asked is True)
    for reason in (of_source, *of_scorer):
        if reason is not None and asked is True:
            warnings.warn(f"compile=True has no effect on {reason}", stacklevel=4)


def _why_not_source(source: Any) -> str | None:
    if isinstance(source, JointLogits):
        return None  # its forward is the scorer's
    if not isinstance(source, CachedLogits):
        return "the language model: it runs on Hugging Face's own cache"
    why = why_not_module(source.view.model, source.view.device)
    return None if why is None else f"the language model: it {why}"


def _why_not_scorer(scorer: Any) -> str | None:
    if isinstance(scorer, StateScorer):
        return None  # its forward is the language model's
    if not isinstance(scorer, SiblingScorer | NextTokenScorer):
        kind = getattr(scorer, "method", type(scorer).__name__)
        return f"scoring by {kind!r}: it does not run candidates as siblings over one prefix"
    if not scorer.capturable:
        return "the reward model: it does not run on a static cache without masks"
    why = why_not_module(scorer.rm.model, scorer.rm.device)
    return None if why is None else f"the reward model: it {why}"
