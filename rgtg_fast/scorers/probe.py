"""Which way of scoring a reward model allows, found by running it, never by its name.

Each way is run for a few steps on two left-padded rows and compared with plain full forwards of the
same model without padding or cache. The head is replaced by a random projection of the hidden
state, so that a trained head's blind directions hide nothing.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.attention import attention_kernel, plain_attention
from ..models.reward_model import RewardModel
from .base import RewardModelScorer
from .expand import ExpandScorer
from .tree import TreeScorer

_SIBLINGS, _STEPS = 3, 3
# Allowed error as a share of the spread of the true values. A wrong mask, position or cache is off
# by the order of the spread itself; low precision needs room for reordered sums.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}

_verdicts: weakref.WeakKeyDictionary[Any, dict[tuple, Verdict]] = weakref.WeakKeyDictionary()


# Ways to run a method, the fastest first. "fused": attention from the cache, without masks.
WAYS: dict[str, tuple[str, ...]] = {"tree": ("fused", "masked"), "expand": ("expand",)}


@dataclass
class Verdict:
    """What the probe found: `pooled`, only the public forward gives the reward; `reasons`, why a
    way of scoring cannot be used, or None where it can. Ways not tried are not in it."""

    pooled: bool
    reasons: dict[str, str | None] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The fastest method found right."""
        return next((m for m in WAYS if self.way(m)), "reencode")

    def way(self, method: str) -> str | None:
        """The fastest right way to run `method`, or None."""
        ways = WAYS.get(method, ())
        return next((w for w in ways if self.reasons.get(w, "not tried") is None), None)

    def why_not(self, method: str) -> str | None:
        """Why `method` cannot be used; None where it can, or was not tried."""
        reasons = [self.reasons.get(way) for way in WAYS.get(method, ())]
        return None if None in reasons or not reasons else reasons[-1]


@torch.no_grad()
def probe(
    rm: RewardModel, max_length: int | None, methods: tuple[str, ...], backend: Any = "auto"
) -> Verdict:
    """The verdict for `rm` on sequences of up to `max_length` tokens.

    `methods` are tried in order, each by all its ways, until one is right. Verdicts are kept per
    model, attention implementation, dtype, device, attention kernel and the windows that
    `max_length` reaches: a slot-indexed window goes wrong only past its end.
    """
    length = _probe_length(rm, max_length)
    implementation = getattr(rm.text_config, "_attn_implementation", None)
    kernel = attention_kernel(backend, rm.device)
    key = (implementation, rm.dtype, str(rm.device), length, rm.check_public, rm.layer, kernel)
    known = _verdicts.setdefault(rm.model, {})
    with rm.evaluating():
        ids = _random_ids(rm, (2, length))
        if key not in known:
            known[key] = Verdict(pooled=rm.check_public and not _head_is_public(rm, ids[:1]))
        verdict = known[key]
        ways = [way for method in methods for way in WAYS[method]]
        for way in ways:
            if way not in verdict.reasons:
                verdict.reasons[way] = _why_not(rm, way, verdict.pooled, ids, backend)
            if verdict.reasons[way] is None:
                break
    return Verdict(verdict.pooled, {w: verdict.reasons[w] for w in ways if w in verdict.reasons})


def _probe_length(rm: RewardModel, max_length: int | None) -> int:
    """A few tokens; past every window in the configuration that the sequences can reach."""
    reached = [
        value
        for name, value in rm.text_config.to_dict().items()
        if ("window" in name or "chunk_size" in name)
        and type(value) is int
        and value > 0
        and (max_length is None or value < max_length + _SIBLINGS)
    ]
    length = max([7, *(w + 3 for w in reached)])
    limit = getattr(rm.text_config, "max_position_embeddings", None)
    return length if not limit else max(3, min(length, limit - _STEPS - 1))


def _why_not(rm: RewardModel, way: str, pooled: bool, ids: Tensor, backend: Any) -> str | None:
    """Why this way of scoring would be wrong for `rm`; None where it is right."""
    if pooled:
        return "its public forward is not its head on the last hidden state"
    if way == "fused" and attention_kernel(backend, rm.device) is None:
        return f"no compiled kernel of candidate_attention runs on {rm.device.type}"
    if way == "masked" and not plain_attention(rm.text_config):
        return f"{rm.text_config._attn_implementation!r} attention takes no dense 4D mask"
    projected = copy.copy(rm)
    weight = torch.randn(_hidden_size(rm, ids), generator=torch.Generator().manual_seed(1))
    projected.head = lambda hidden: hidden.float() @ weight.to(hidden.device)
    try:
        truth, noise = _full_forwards(projected, ids)
        scorer: RewardModelScorer
        if way == "expand":
            scorer = ExpandScorer(projected, _SIBLINGS, backend=backend)
        else:
            scorer = TreeScorer(projected, _SIBLINGS, fused=way == "fused", backend=backend)
        got = _run(scorer, ids, truth)
    except Exception as error:  # whatever a foreign model raises is a reason
        return f"it failed with {_brief(error)}"
    return _disagreement(got, truth, noise, rm.dtype)


def _disagreement(got: Tensor, truth: Tensor, noise: float, dtype: torch.dtype) -> str | None:
    error = (got - truth).abs().max().item()
    spread = truth.std().item()
    if error <= max(TOLERANCE[dtype] * spread, 10 * noise):
        return None
    return f"it differs from full forwards by {error:.2g} where values spread by {spread:.2g}"


def _head_is_public(rm: RewardModel, ids: Tensor) -> bool:
    """Whether head(base(ids)) at the last token is what the public forward gives. True where there
    is nothing to compare with; a public forward that fails is told of."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        inspect.signature(rm.model.forward).bind(**inputs)
    except TypeError:  # a holder of base and head without a forward of its own
        return True
    try:
        logits = getattr(rm.model(**inputs), "logits", None)
    except Exception as failed:  # one that wants pairs or labels may raise anything
        warnings.warn(
            f"the forward of {type(rm.model).__name__} failed with {_brief(failed)}, so nothing "
            "tells whether its head on the last hidden state is its reward; it is taken to be",
            stacklevel=2,
        )
        return True
    if logits is None:
        return True
    if logits.shape == (1, ids.shape[1], 1):  # token classification: a reward at every position
        logits = logits[:, -1]
    if logits.numel() != 1:
        return True
    try:
        hidden, _ = rm.forward_base(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        every = rm.rewards(hidden, "reference")[0]
    except Exception:  # an encoder's head may need more; the public forward, which works, is right
        return False
    if every[-1].isnan() and logits.isnan().all():  # broken weights, not another structure
        return True
    spread = every.std().item() + logits.abs().item() * 1e-3
    error = (every[-1] - logits.reshape(()).float()).abs().item()
    return error <= max(TOLERANCE[rm.dtype], 0.02) * spread


def _hidden_size(rm: RewardModel, ids: Tensor) -> int:
    try:
        return rm.forward_base(ids[:1, :2], use_cache=False)[0].shape[-1]
    except Exception:  # reported by the full forwards that follow
        return 1


def _random_ids(rm: RewardModel, shape: tuple[int, int]) -> Tensor:
    ids = torch.randint(0, rm.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    pad = getattr(rm.text_config, "pad_token_id", None)
    if pad is not None:  # some models read padding off the ids
        ids = ids.where(ids != pad, (pad + 1) % rm.vocab_size)
    return ids.to(rm.device)


def _candidates(rm: RewardModel, step: int) -> Tensor:
    ids = torch.arange(2 * _SIBLINGS, device=rm.device).view(2, _SIBLINGS)
    return (ids * 7 + step * 5 + 1) % rm.vocab_size


def _slots(rm: RewardModel, step: int) -> Tensor:
    return torch.tensor([step % _SIBLINGS, (step + 1) % _SIBLINGS], device=rm.device)


def _run(scorer: RewardModelScorer, ids: Tensor, truth: Tensor) -> Tensor:
    """Rewards [steps, 2, siblings] of the scorer; the second row is a third shorter. Where it can
    skip candidates it does so at one step, which must hurt neither the others nor later steps."""
    mask = torch.ones_like(ids)
    mask[1, : ids.shape[1] // 3] = 0
    scorer.prefill(ids, mask)
    out = []
    for step in range(_STEPS):
        candidates = _candidates(scorer.rm, step)
        if scorer.can_skip and step == 1:
            keep = torch.tensor([[False, True, True], [False, False, True]], device=ids.device)
            out.append(scorer.score(candidates, keep).where(keep, truth[step]))
        else:
            out.append(scorer.score(candidates))
        scorer.commit(_slots(scorer.rm, step))
    return torch.stack(out)


def _full_forwards(rm: RewardModel, ids: Tensor) -> tuple[Tensor, float]:
    """The same rewards by full unpadded forwards, and how far two such forwards differ."""
    rows = [ids[0], ids[1, ids.shape[1] // 3 :]]
    out, noise = [], 0.0
    for step in range(_STEPS):
        candidates, slots = _candidates(rm, step), _slots(rm, step)
        values = []
        for b in range(2):
            texts = torch.cat([rows[b].expand(_SIBLINGS, -1), candidates[b][:, None]], dim=-1)
            values.append(_last_reward(rm, texts))
            if step == 0:
                noise = max(noise, (_last_reward(rm, texts[:1]) - values[-1][:1]).abs().item())
            rows[b] = texts[slots[b]]
        out.append(torch.stack(values))
    return torch.stack(out), noise


def _last_reward(rm: RewardModel, ids: Tensor) -> Tensor:
    hidden, _ = rm.forward_base(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return rm.rewards(hidden[:, -1:])[:, 0].to(ids.device)


def _brief(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"
