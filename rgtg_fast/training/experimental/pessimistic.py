"""A reward head that trusts itself only where it has seen data."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..head_only import PairFeatures


class PessimisticHead(nn.Module):
    """r(φ) = θ·φ - c ‖φ‖_{Σ⁻¹}, the least reward that any head in a confidence ellipsoid gives.

    Σ = λ I + Σ_m Δ_m Δ_mᵀ over the *differences* Δ = φ(x, y_w) - φ(x, y_l) that θ was fitted to
    (Zhu, Jiao and Jordan, arXiv 2301.11270, whose Σ_D is 1/n of the sum): comparisons tell nothing
    of directions that both answers share. And it is, for any φ,

        θ·φ - c ‖φ‖_{Σ⁻¹} = min { θ'·φ : (θ' - θ)ᵀ Σ (θ' - θ) ≤ c² }

    Only rewards relative to one another are known from comparisons, so the paper subtracts a
    `reference` feature v from φ, such as the mean over the training answers; without it the part
    that all hidden states share is penalised too, much alike for all candidates of a step.

    A callable, hidden [..., H] -> fp32 [...], for `RewardHead(lm, head)` or `reward_head=`. All of
    it is computed in float64, ‖φ‖_{Σ⁻¹} as ‖L⁻¹φ‖ from the Cholesky factor Σ = L Lᵀ.

    Args:
        weight: θ, float [H] (or [1, H]).
        sigma: Σ, float [H, H], symmetric and positive definite.
        penalty: c >= 0; 0 gives the linear head.
        reference: v, float [H], or None for 0.

    Raises:
        ValueError: shapes that do not fit, a Σ that is not positive definite, a negative penalty.

    Example::

        features = pair_features(lm, pairs)                  # computed once, for both lines below
        head = PessimisticHead.from_features(features, fit_head(features).weight, penalty=2.0)
        out = rgtg_fast.generate(lm, **inputs, reward_model=RewardHead(lm, head))
    """

    weight: Tensor
    factor: Tensor
    reference: Tensor

    def __init__(
        self, weight: Tensor, sigma: Tensor, penalty: float, reference: Tensor | None = None
    ) -> None:
        super().__init__()
        weight = weight.detach().double().reshape(-1)
        width = weight.numel()
        if reference is None:
            reference = torch.zeros_like(weight)
        if sigma.shape != (width, width) or reference.numel() != width:
            raise ValueError(
                f"weight has {width} elements, sigma shape {list(sigma.shape)} and reference "
                f"{reference.numel()} elements; pass [H], [H, H] and [H]"
            )
        if not 0 <= penalty < float("inf"):
            raise ValueError(f"penalty={penalty}; pass a finite number >= 0")
        factor, failed = torch.linalg.cholesky_ex(sigma.detach().double())
        if failed or not factor.isfinite().all():
            raise ValueError("sigma is not positive definite; pass a larger l2")
        self.penalty = float(penalty)
        self.register_buffer("weight", weight)
        self.register_buffer("factor", factor)
        self.register_buffer("reference", reference.detach().double().reshape(-1).to(weight.device))

    @classmethod
    def from_features(
        cls,
        features: PairFeatures,
        weight: Tensor,
        penalty: float,
        *,
        l2: float = 1.0,
        reference: Tensor | None = None,
    ) -> PessimisticHead:
        """Σ = l2 I + Σ_m Δ_m Δ_mᵀ over the rows of `features`, each counted once.

        With `pair_features(..., full=True)` a row is a pair, as in the paper; otherwise it is a
        prefix of a pair, and as the prefixes of a pair are far from independent, Σ then claims more
        than is known, by up to their number: take a larger `penalty`.

        Raises `ValueError` for l2 <= 0.
        """
        return cls(weight, gram(features.differences, l2), penalty, reference)

    def uncertainty(self, hidden: Tensor) -> Tensor:
        """‖φ - v‖_{Σ⁻¹}, float64 [...], of hidden states [..., H]."""
        return self._norm(self._centred(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """Rewards fp32 [...] of hidden states [..., H]."""
        x = self._centred(hidden)
        return (x @ self.weight - self.penalty * self._norm(x)).float()

    def _centred(self, hidden: Tensor) -> Tensor:
        if hidden.device != self.weight.device:
            self.to(hidden.device)
        return hidden.double() - self.reference

    def _norm(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        solved = torch.linalg.solve_triangular(self.factor, rows.T, upper=False)  # [H, rows]
        return solved.norm(dim=0).view(x.shape[:-1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that `load` reads back exactly."""
        from safetensors.torch import save_file

        tensors = {name: buffer.contiguous() for name, buffer in self.named_buffers()}
        penalty = torch.tensor([self.penalty], dtype=torch.float64)
        save_file(tensors | {"penalty": penalty}, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PessimisticHead:
        """The head that `save` wrote. Raises `ValueError` for another kind of file."""
        from safetensors.torch import load_file

        tensors = load_file(Path(path))
        if set(tensors) != {"weight", "factor", "reference", "penalty"}:
            raise ValueError(
                f"{os.fspath(path)} holds {', '.join(sorted(tensors))}; pass a file written by "
                "PessimisticHead.save"
            )
        width = tensors["weight"].numel()
        head = cls(tensors["weight"], torch.eye(width), float(tensors["penalty"]))
        head.factor, head.reference = tensors["factor"], tensors["reference"]
        return head


def gram(features: Tensor, l2: float) -> Tensor:
    """l2 I + Σ_m x_m x_mᵀ of features [M, H], float64 [H, H]; raises `ValueError` for l2 <= 0."""
    if not 0 < l2 < float("inf"):
        raise ValueError(f"l2={l2}; pass a positive number")
    total = l2 * torch.eye(features.shape[1], dtype=torch.float64, device=features.device)
    for part in features.split(1 << 14):
        total += part.double().T @ part.double()
    return total
