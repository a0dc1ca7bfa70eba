"""How the rewards of several scorers become one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("sum", "mean", "min", "pessimistic")


@dataclass(frozen=True, eq=False)
class Combination:
    """bounds(reduction(w_i · r_i) + offset) of rewards r_1 .. r_n.

    `weights`: floats, or float tensors [B] with a value for each row. `reduction`: "sum", "mean",
    "min" or "pessimistic", the mean less `penalty` standard deviations (of the population: divided
    by n). What one part says is no token (-inf) is none for all, whatever its weight.
    """

    weights: tuple[Any, ...]
    reduction: str = "sum"
    penalty: float = 0.0
    offset: Any = 0.0
    bounds: tuple[float, float] | None = None

    def __call__(self, rewards: list[Tensor], rows: Tensor | None) -> Tensor:
        """Rewards fp32 [n, k] of the parts' float [n, k]; of the rows int64 [n] (None: all)."""
        scaled = [self._column(w, r, rows) * r for w, r in zip(self.weights, rewards, strict=True)]
        if self.reduction == "sum":
            total = sum(scaled[1:], scaled[0])
        else:
            stacked = torch.stack(scaled)
            total = stacked.amin(0) if self.reduction == "min" else stacked.mean(0)
            if self.reduction == "pessimistic":
                total = total - self.penalty * (stacked - total).square().mean(0).sqrt()
        total = total + self._column(self.offset, total, rows)
        if self.bounds is not None:
            total = total.clamp(*self.bounds)
        for reward in rewards:
            total = total.masked_fill(reward == -torch.inf, -torch.inf)
        return total.float()

    def at_rows(self, rows: Tensor) -> Combination:
        """The same for rows `rows` int64 [n] of those that the tensors are for."""
        weights = tuple(_at(w, rows) for w in self.weights)
        return replace(self, weights=weights, offset=_at(self.offset, rows))

    @property
    def per_row(self) -> list[tuple[str, Tensor]]:
        """The tensors, each with its name."""
        named = [("weights", w) for w in self.weights] + [("offset", self.offset)]
        return [(name, value) for name, value in named if isinstance(value, Tensor)]

    @staticmethod
    def _column(value: Any, like: Tensor, rows: Tensor | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(like.device, like.dtype)
        return (value if rows is None else value[rows.to(value.device)])[:, None]


def _at(value: Any, rows: Tensor) -> Any:
    return value[rows.to(value.device)] if isinstance(value, Tensor) else value


def check_number(name: str, value: Any) -> Any:
    """A finite number, or a float tensor [B] of them; `ValueError` for anything else."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, Tensor):
        right = value.dim() == 1 and value.is_floating_point() and value.device.type != "meta"
        if not right or not bool(value.isfinite().all()):
            raise ValueError(
                f"{name} must be a finite float, or a finite float tensor [B] with a value for "
                f"each prompt; got a {value.dtype} tensor {list(value.shape)} on {value.device}"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(
            f"{name} must be a finite float, or a float tensor [B] with a value for each prompt; "
            f"got {value!r}"
        )
    return float(value)
