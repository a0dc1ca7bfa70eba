"""A reward head on a frozen language model: features once, then a convex problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..models.reward_model import RewardModel
from .collate import PairCollator
from .data import PreferenceDataset
from .objectives import answer_columns

_MOST_EVALUATIONS = 500  # of the loss in `fit_head`; a fit needs far fewer


@dataclass
class PairFeatures:
    """Differences φ(x, y_w[1:i]) - φ(x, y_l[1:i]) of last hidden states, all prefixes in one list.

    `differences` fp32 [M, H]; `pair` and `length` int64 [M], the pair's number and i; `weight` fp32
    [M], summing to 1: the mean over pairs of the mean over prefixes is a weighted sum. After its
    end the shorter answer keeps its last hidden state, so the loss is `prefix_bt_loss`'s ("hold").
    """

    differences: Tensor
    pair: Tensor
    length: Tensor
    weight: Tensor


@dataclass
class HeadFit:
    """A fitted head: `weight` fp32 [H], the loss reached (penalty excluded), prefix accuracy and
    the number of evaluations of the loss."""

    weight: Tensor
    loss: float
    accuracy: float
    evaluations: int


@torch.no_grad()
def pair_features(
    lm: nn.Module,
    dataset: PreferenceDataset,
    *,
    first: int = 1,
    full: bool = False,
    layer: int = -1,
    batch_size: int = 16,
) -> PairFeatures:
    """Features of every prefix, from one forward of the frozen `lm` per batch, in eval mode.

    Prefixes of `first` tokens and more count; with `full=True` the whole answers only. `layer` is
    `RewardHead`'s: -1 for the last hidden state after the final norm, else an index into
    `hidden_states`.

    Raises `ValueError` for a pair without a prefix of `first` tokens.
    """
    rm = RewardModel(lm, head=nn.Identity()).twin()
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    seen = 0
    batches: Any = DataLoader(dataset, batch_size, collate_fn=PairCollator())
    for batch in batches:
        batch = {name: value.to(rm.device) for name, value in batch.items()}
        ids, lengths = batch["input_ids"], batch["answer_mask"].sum(-1)
        hidden, out = rm.forward_base(
            ids.flatten(0, 1),
            attention_mask=batch["attention_mask"].flatten(0, 1),
            output_hidden_states=layer != -1,
            use_cache=False,
        )
        if layer != -1:
            hidden = out.hidden_states[layer]
        longest, width = lengths.amax(-1), batch["answer_mask"].shape[-1]
        if int(longest.min()) < first:
            raise ValueError(
                f"a pair's longer answer has {int(longest.min())} tokens, first={first}; pass a "
                "smaller first, or min_answer_tokens to the dataset"
            )
        columns = answer_columns(hidden.view(*ids.shape, -1), batch["start"], width)  # [N, 2, T, H]
        at = torch.arange(columns.shape[2], device=ids.device)
        held = torch.minimum(at, lengths[..., None] - 1)[..., None]
        columns = columns.gather(2, held.expand(-1, -1, -1, columns.shape[-1])).float()
        counted = (at < longest[:, None]) & (at >= first - 1)
        if full:
            counted = at == longest[:, None] - 1
        pair, column = counted.nonzero(as_tuple=True)
        weight = (counted / counted.sum(-1, keepdim=True))[counted]
        difference = (columns[:, 0] - columns[:, 1])[counted]
        parts.append((difference.cpu(), pair.cpu() + seen, column.cpu() + 1, weight.cpu()))
        seen += len(ids)
    differences, pair, length, weight = (torch.cat(x) for x in zip(*parts, strict=True))
    return PairFeatures(differences, pair, length, weight / seen)


def fit_head(
    features: PairFeatures,
    *,
    l2: float = 1e-4,
    label_smoothing: float = 0.0,
) -> HeadFit:
    """The head θ that minimises Σ_m w_m · BT(θ · Δ_m) + l2/2 · |θ ∘ s|², by L-BFGS.

    s is each feature's root mean square difference, so l2 acts on comparable features; the problem
    is convex and the result does not depend on a start. The weight goes to `RewardHead(lm, weight)`
    or into the `score` layer of a classifier on the same base; a bias would cancel.

    Raises `ValueError` for l2 <= 0 (separable pairs have no finite optimum without it).
    """
    if not l2 > 0:
        raise ValueError(f"l2={l2}; pass a positive number")
    scale = (features.differences**2).mean(0).sqrt().clamp(min=1e-6)
    x, weight = features.differences / scale, features.weight
    theta = torch.zeros(x.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [theta],
        max_iter=_MOST_EVALUATIONS,
        max_eval=_MOST_EVALUATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def bt() -> Tensor:
        gap = x @ theta
        loss = -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
        return (loss * weight).sum()

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimiser.zero_grad()
        loss = bt() + l2 / 2 * (theta**2).sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        head = (theta / scale).detach()
        return HeadFit(head, float(bt()), head_accuracy(head, features), evaluations)


def head_accuracy(weight: Tensor, features: PairFeatures) -> float:
    """Mean over pairs of the share of prefixes that `weight` [H] orders right; ties count half."""
    gap = features.differences @ weight.to(features.differences)
    right = torch.where(gap == 0, 0.5, (gap > 0).float())
    return float((right * features.weight).sum())
