"""Which pairs are worth a label: D-optimal design, greedy and lazy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .pessimistic import gram

_BLOCK = 256  # candidates whose gains are brought up to date at once


@dataclass
class ChosenPairs:
    """`index` int64 [n], the rows chosen, in order; `gain` float64 [n], by how much each raised
    log det Σ; `evaluations`, how many gains were computed for it."""

    index: Tensor
    gain: Tensor
    evaluations: int


@torch.no_grad()
def d_optimal(
    features: Tensor,
    count: int,
    *,
    l2: float = 1.0,
    labelled: Tensor | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> ChosenPairs:
    """Greedy choice of `count` rows x of `features` that maximises log det Σ, Σ = l2 I + Σ x xᵀ.

    For a head fitted to comparisons by Bradley-Terry, x = φ(x, y_1) - φ(x, y_2) of a pair, Σ is the
    Fisher information but for the factors σ'(θ·x) <= 1/4, which are not known before labelling, and
    so the inverse of what is left to doubt. A row's gain (matrix determinant lemma) and the inverse
    once it is taken (Sherman-Morrison) are::

        log det(Σ + x xᵀ) - log det Σ = log(1 + xᵀ Σ⁻¹ x)
        (Σ + x xᵀ)⁻¹ = Σ⁻¹ - Σ⁻¹ x xᵀ Σ⁻¹ / (1 + xᵀ Σ⁻¹ x)

    Gains only fall as rows are taken (log det is submodular), so a gain from an earlier step is an
    upper bound, and only rows whose bound reaches the best one found are computed again: the choice
    is that of computing all of them. The rise is at least 1 - 1/e of that of
    the best set (Nemhauser, Wolsey and Fisher, 1978). In float64.

    Args:
        features: float [M, H]; their signs do not matter, so no label is needed.
        count: rows to choose, 1 to M.
        l2: λ > 0. The inverse loses digits as xᵀx / λ grows: gains err by up to 1e-15 xᵀx / λ.
        labelled: float [M0, H], features of pairs that have labels already.
        progress: called with the number chosen and the last gain.

    Raises:
        ValueError: a count, l2 or shapes out of range, or a feature that is not finite.

    Example::

        features = pair_features(lm, candidates, full=True).differences
        chosen = d_optimal(features, 100)
        rows = [candidates[i] for i in chosen.index.tolist()]
    """
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            f"features is {features.dtype} {list(features.shape)}; pass a float tensor [M, H]"
        )
    if not 1 <= count <= len(features):
        raise ValueError(f"count={count} of {len(features)} rows; pass 1 to {len(features)}")
    if labelled is not None and labelled.shape[1:] != features.shape[1:]:
        raise ValueError(
            f"labelled has shape {list(labelled.shape)}; pass [M0, {features.shape[1]}]"
        )
    x = features.double()
    if not x.isfinite().all():
        bad = int((~x.isfinite()).any(-1).nonzero()[0])
        raise ValueError(f"features row {bad} is not finite; leave it out, or load in float32")
    if (largest := float((x**2).sum(-1).max())) > 1e12 * l2 > 0:
        raise ValueError(
            f"l2={l2} is lost beside features of squared norm {largest:.3g} in float64; pass at "
            f"least {largest / 1e12:.3g}"
        )
    sigma = gram(x[:0] if labelled is None else labelled.to(x), l2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(sigma))

    def forms(rows: Tensor) -> Tensor:
        return ((rows @ inverse) * rows).sum(-1).clamp(min=0)

    form = forms(x)  # xᵀ Σ⁻¹ x, or a bound on it; -1 for rows taken
    fresh = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # step at which it was computed
    index, gain, evaluations = [], [], len(x)
    for step in range(count):
        while True:
            best = int(form.argmax())
            if fresh[best] == step:
                break
            # Those with the highest bounds: the true best is rarely far down.
            bounds, block = form.masked_fill(fresh == step, -1).topk(min(_BLOCK, len(x)))
            block = block[bounds >= 0]
            form[block] = forms(x[block])
            fresh[block] = step
            evaluations += len(block)
        taken = form[best].clone()
        direction = inverse @ x[best]
        inverse -= torch.outer(direction, direction) / (1 + taken)
        form[best] = -1
        index.append(best)
        gain.append(float(taken.log1p()))
        if progress is not None:
            progress(step + 1, gain[-1])
    return ChosenPairs(torch.tensor(index), torch.tensor(gain, dtype=torch.float64), evaluations)
