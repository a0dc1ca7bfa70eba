"""Which way of scoring a reward model allows, found by running it, never by its name.

Each way is run for a few steps on two left-padded rows and compared with plain full forwards of the
same model without padding or cache. The head is replaced by a random projection of the hidden
state: a trained head may ignore directions in which the hidden states are wrong.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.attention import attention_kernel, plain_attention
from ..models.foreign import Unsupported, forward_of
from ..models.parts import ModelParts, computing_dtype, numerics
from ..models.reward_model import RewardModel
from .base import RewardModelScorer
from .expand import ExpandScorer
from .tree import TreeScorer

_SIBLINGS, _STEPS = 3, 3
# Allowed error as a share of the spread of the true values. A wrong mask, position or cache is off
# by the order of the spread itself; low precision needs room for reordered sums.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}

# Per model: key -> whether only the public forward gives its reward (pooled); (key, pooled) ->
# why each way fails.
_verdicts: weakref.WeakKeyDictionary[Any, dict[tuple, Any]] = weakref.WeakKeyDictionary()
# Held while a model is probed: threads that begin at once would each probe it.
_probing = threading.RLock()


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
    rm: ModelParts, max_length: int | None, methods: tuple[str, ...], backend: Any = "auto"
) -> Verdict:
    """The verdict for `rm` on sequences of up to `max_length` tokens.

    `methods` are tried in order, each by all its ways, until one is right. Verdicts are kept per
    model and its forward, attention implementation, dtype, device, attention kernel, autocast,
    default dtype and the windows that `max_length` reaches: a slot-indexed window goes wrong only
    past its end. One that came from an error which may have other reasons than the model's
    structure (memory, what else the process does) is for this call only, until the next call has
    met the same error.

    Raises `ValueError` for a `reward_head` on a model whose hidden states look ahead.
    """
    length = _probe_length(rm, max_length)
    key = _key(rm, length, backend)
    ways = [way for method in methods for way in WAYS[method]]
    passing: dict[str, str | None] = {}
    with _probing:
        known = _verdicts.setdefault(rm.model, {})
        pooled = known.get(key)
        if pooled is None:
            pooled, lasting = _is_pooled(rm, _random_ids(rm, length)[:1])
            if lasting:
                known[key] = pooled
        reasons: dict[str, str | None]
        failures: dict[str, str | None]  # of the call before this one
        reasons, failures = known.setdefault((key, pooled), ({}, {}))
        for way in ways:
            if way not in reasons:
                reason, keep = _why_not(rm, way, pooled, _random_ids(rm, length), backend)
                if keep or (keep is None and failures.get(way) == reason):
                    reasons[way] = reason
                else:
                    passing[way] = failures[way] = reason
            if (reasons | passing)[way] is None:
                break
        found = reasons | passing
    return Verdict(pooled, {w: found[w] for w in ways if w in found})


def _key(rm: ModelParts, length: int, backend: Any) -> tuple:
    head = (rm.check_public, rm.label) if isinstance(rm, RewardModel) else None
    kernel = attention_kernel(backend, rm.device)
    here = rm.dtype, str(rm.device), numerics(rm.device)
    return rm.implementation, here, length, head, rm.layer, kernel, forward_of(rm.model)


def _probe_length(rm: ModelParts, max_length: int | None) -> int:
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


def _why_not(
    rm: ModelParts, way: str, pooled: bool, ids: Tensor, backend: Any
) -> tuple[str | None, bool | None]:
    """Why this way of scoring would be wrong for `rm`, None where it is right; and whether that is
    worth keeping (None: if it comes again)."""
    if pooled:
        return "its public forward is not its head on the last hidden state", True
    if way == "fused" and attention_kernel(backend, rm.device) is None:
        return f"no compiled kernel of candidate_attention runs on {rm.device.type}", True
    if way == "masked" and not plain_attention(rm.implementation):
        return f"{rm.implementation!r} attention takes no dense 4D mask", True
    projected: Any = copy.copy(rm)
    projected.rewards = _project
    scorer: RewardModelScorer
    try:
        if way == "expand":
            scorer = ExpandScorer(projected, _SIBLINGS, backend=backend)
        else:
            scorer = TreeScorer(projected, _SIBLINGS, fused=way == "fused", backend=backend)
        got, asked = _run(scorer, ids)  # before the full forwards, which take longer: it may fail
        truth, noise = _full_forwards(projected.twin(), ids)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return f"it failed with {type(error).__name__}", False
    except Exception as error:  # whatever a foreign model raises is a reason
        return f"it failed with {_brief(error)}", isinstance(error, Unsupported) or None
    got = got.where(asked, truth)
    return _disagreement(got, truth, noise, computing_dtype(rm)), True


def _project(hidden: Tensor, backend: Any = "auto") -> Tensor:
    """A fixed random projection of hidden states [.., H] to numbers [..]."""
    generator, width = torch.Generator("cpu").manual_seed(1), hidden.shape[-1:]
    weight = torch.randn(width, generator=generator, dtype=torch.float32, device="cpu")
    return hidden.float() @ weight.to(hidden.device)


def _disagreement(got: Tensor, truth: Tensor, noise: float, dtype: torch.dtype) -> str | None:
    error = (got - truth).abs().max().item()
    spread = truth.std().item()
    if error <= max(TOLERANCE[dtype] * spread, 10 * noise):
        return None
    return f"it differs from full forwards by {error:.2g} where values spread by {spread:.2g}"


def _is_pooled(rm: ModelParts, ids: Tensor) -> tuple[bool, bool]:
    """Whether only the public forward of `rm` gives its reward, and whether that is worth keeping.

    Raises `ValueError` for a head of the caller's that would read positions which look ahead.
    """
    if not isinstance(rm, RewardModel):
        return False, True
    twin = rm.twin()
    if not rm.check_public:
        _check_causal(twin, ids)
        return False, True
    right, lasting = _head_is_public(twin, ids)
    return not right, lasting


def _check_causal(twin: RewardModel, ids: Tensor) -> None:
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1 + twin.vocab_size // 2) % twin.vocab_size
    one, two = (
        twin.forward_base(i, attention_mask=torch.ones_like(i), use_cache=False)[0][0].float()
        for i in (ids, changed)
    )
    moved, spread = (one - two)[:-1].abs().max(), (one - two)[-1].abs().max()
    if moved > max(TOLERANCE[computing_dtype(twin)], 0.02) * spread:
        raise ValueError(
            f"reward_head reads the hidden state of the last position, and "
            f"{type(twin.model).__name__} is no causal model: what follows a position changes its "
            "hidden state, and such models are trained with a pooled one; leave reward_head out "
            "(the model's own forward then gives the reward; reward_label= chooses among several "
            "labels), or pass a scorer"
        )


def _head_is_public(rm: RewardModel, ids: Tensor) -> tuple[bool, bool]:
    """Whether head(base(ids)) at the last token is what the public forward of the twin gives, and
    whether that is worth keeping. True where there is nothing to compare with; a public forward
    that fails is told of."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        inspect.signature(rm.model.forward).bind(**inputs)
    except TypeError:  # a module with base and head but no forward of its own
        return True, True
    try:
        logits = getattr(rm.model(**inputs), "logits", None)
    except Exception as failed:  # a forward that wants pairs or labels may raise anything
        warnings.warn(
            f"the forward of {type(rm.model).__name__} failed with {_brief(failed)}, so nothing "
            "tells whether its head on the last hidden state is its reward; it is taken to be",
            stacklevel=2,
        )
        return True, False
    if logits is None:
        return True, True
    if logits.dim() == 3 and logits.shape[:2] == ids.shape:  # token classification: every position
        logits = logits[:, -1]
    if rm.label is None and logits.numel() != 1:
        return True, True
    public = rm.of_logits(logits.reshape(-1))
    try:
        hidden, _ = rm.forward_base(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        every = rm.rewards(hidden, "reference")[0]
    except Exception:  # an encoder's head may take more than hidden states: use the public forward
        return False, False
    if every[-1].isnan() and public.isnan():  # broken weights: says nothing of the structure
        return True, True
    spread = every.std().item() + public.abs().item() * 1e-3
    error = (every[-1] - public).abs().item()
    return error <= max(TOLERANCE[computing_dtype(rm)], 0.02) * spread, True


def _random_ids(rm: ModelParts, length: int) -> Tensor:
    """Two rows [2, length], always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(
        0, rm.vocab_size, (2, length), generator=generator, dtype=torch.int64, device="cpu"
    )
    pad = getattr(rm.text_config, "pad_token_id", None)
    if pad is not None:  # some models find padding by its id
        ids = ids.where(ids != pad, (pad + 1) % rm.vocab_size)
    return ids.to(rm.device)


def _candidates(rm: ModelParts, step: int) -> Tensor:
    ids = torch.arange(2 * _SIBLINGS, device=rm.device).view(2, _SIBLINGS)
    return (ids * 7 + step * 5 + 1) % rm.vocab_size


def _slots(rm: ModelParts, step: int) -> Tensor:
    slots = [step % _SIBLINGS, (step + 1) % _SIBLINGS]
    return torch.tensor(slots, dtype=torch.int64, device=rm.device)


def _run(scorer: RewardModelScorer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards [steps, 2, siblings] of the scorer, and which of them it was asked for; the second
    row is a third shorter. A scorer that can skip candidates does so at one step, which must hurt
    neither the others nor later steps."""
    mask = torch.ones_like(ids)
    mask[1, : ids.shape[1] // 3] = 0
    scorer.prefill(ids, mask)
    out = []
    shape = (_STEPS, 2, _SIBLINGS)
    asked = torch.ones(shape, dtype=torch.bool, device=ids.device)
    for step in range(_STEPS):
        candidates = _candidates(scorer.rm, step)
        if scorer.can_skip and step == 1:
            kept = [[False, True, True], [False, False, True]]
            asked[step] = torch.tensor(kept, dtype=torch.bool, device=ids.device)
            out.append(scorer.score(candidates, asked[step]))
        else:
            out.append(scorer.score(candidates))
        scorer.commit(_slots(scorer.rm, step))
    return torch.stack(out), asked


def _full_forwards(twin: Any, ids: Tensor) -> tuple[Tensor, float]:
    """The same rewards by full unpadded forwards, and how far two such forwards differ."""
    rows = [ids[0], ids[1, ids.shape[1] // 3 :]]
    out, noise = [], 0.0
    for step in range(_STEPS):
        candidates, slots = _candidates(twin, step), _slots(twin, step)
        values = []
        for b in range(2):
            texts = torch.cat([rows[b].expand(_SIBLINGS, -1), candidates[b][:, None]], dim=-1)
            values.append(_last_reward(twin, texts))
            if step == 0:
                again = _last_reward(twin, texts[:1])
                noise = max(noise, (again - values[-1][:1]).abs().item())
            rows[b] = texts[slots[b]]
        out.append(torch.stack(values))
    return torch.stack(out), noise


def _last_reward(twin: Any, ids: Tensor) -> Tensor:
    hidden, _ = twin.forward_base(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return twin.rewards(hidden[:, -1:])[:, 0].to(ids.device)


def _brief(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"
