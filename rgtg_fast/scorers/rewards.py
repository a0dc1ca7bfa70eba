"""What people have as a reward, with what it needs said beside it, and sums of such rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from torch import Tensor

from ..models.reward_model import Label
from .combine import REDUCTIONS, Combination, check_number


class Arithmetic:
    """What gives rewards can be added, scaled and clamped; the result is a `WeightedRewards`.

    Numbers are floats, or float tensors [B] with a value for each prompt.
    """

    __array_ufunc__ = None  # else numpy's numbers would make an array of the object

    def __mul__(self, factor: Any) -> Any:
        return scaled(self, factor) if _is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        return self * (1 / divisor) if _is_number(divisor) else NotImplemented

    def __neg__(self) -> Any:
        return self * -1.0

    def __add__(self, other: Any) -> Any:
        return added(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def clamp(self, low: float, high: float) -> Any:
        """The rewards, those below `low` as `low` and those above `high` as `high`."""
        return clamped(self, low, high)


@dataclass(frozen=True, eq=False)
class Reward(Arithmetic):
    """A reward, with options of its own: a part of a sum, where parts need different ones.

    `0.7 * Reward(helpful) + 0.3 * Reward(armo, reward_label="safe").clamp(-3, 3)`. The options are
    those of `rgtg_fast.generate`, which says what `model` may be; None is what the call says.
    """

    model: Any
    reward_label: Label = None
    reward_kind: str | None = None
    reward_head: Any = None
    reward_tokenizer: Any = None
    reward_method: str | None = None
    eos_reward: str | None = None


class WeightedRewards(Arithmetic):
    """Several rewards as one: Σ w_i r_i, or another `reduction` of the w_i r_i.

    Args:
        parts: rewards, each anything that `rgtg_fast.generate` takes as `reward_model`.
        weights: one for each part: a float, or a float tensor [B] with a value for each prompt.
            None: 1 for each.
        reduction: "sum", "mean", "min", or "pessimistic": the mean less `penalty` standard
            deviations of the parts (divided by n), a lower bound by an ensemble
            (arXiv 2310.02743).
        penalty: c >= 0 of "pessimistic".
        offset: added to the result; a number as in `weights`.
        bounds: (lo, hi) that the result is clamped to.

    Arithmetic gives the same: `0.7 * a + 0.3 * b`, `(2 * a - 1).clamp(-3, 3)`, of scorers,
    `Reward`s and `WeightedRewards`. Each model is run once for a step, as it would be alone. A
    candidate that one part has no token for cannot be chosen.

    Raises `ValueError` for other numbers of weights, and what is not finite.

    Example: `generate(lm, **inputs, reward_model=WeightedRewards([helpful, harmless], [0.7, 0.3]))`
    """

    def __init__(
        self,
        parts: Sequence[Any],
        weights: Sequence[float | Tensor] | None = None,
        *,
        reduction: str = "sum",
        penalty: float = 0.0,
        offset: float | Tensor = 0.0,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.parts = list(parts)
        if not self.parts:
            raise ValueError("parts is empty; pass at least one reward")
        given = [1.0] * len(self.parts) if weights is None else list(weights)
        if len(given) != len(self.parts):
            raise ValueError(
                f"weights has {len(given)} values for {len(self.parts)} parts; pass one for each"
            )
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}; pass one of {', '.join(REDUCTIONS)}")
        penalty = check_number("penalty", penalty)
        if isinstance(penalty, Tensor) or penalty < 0 or (penalty and reduction != "pessimistic"):
            raise ValueError(
                f"penalty={penalty!r}; pass a float >= 0, with reduction='pessimistic'"
            )
        self.combination = Combination(
            tuple(check_number(f"weights[{i}]", w) for i, w in enumerate(given)),
            reduction,
            penalty,
            check_number("offset", offset),
            None if bounds is None else _bounds("bounds", bounds),
        )

    def of(self, parts: Sequence[Any], combination: Combination) -> WeightedRewards:
        """The same kind of object with other parts and another combination."""
        made = object.__new__(WeightedRewards)
        made.parts, made.combination = list(parts), combination
        return made


def leaves_of(reward: Any) -> list[Reward]:
    """The rewards that a reward is made of, each as a `Reward`."""
    if isinstance(reward, WeightedRewards):
        return [leaf for part in reward.parts for leaf in leaves_of(part)]
    return [reward if isinstance(reward, Reward) else Reward(reward)]


def of_rows(reward: Any, rows: Any) -> Any:
    """The reward with the tensors among its weights for rows `rows` (a function [N] -> [B])."""
    if not isinstance(reward, WeightedRewards):
        return reward
    old = reward.combination
    named = [(f"weights[{i}]", w) for i, w in enumerate(old.weights)] + [("offset", old.offset)]
    *weights, offset = [rows(n, v) if isinstance(v, Tensor) else v for n, v in named]
    changed = replace(old, weights=tuple(weights), offset=offset)
    return reward.of([of_rows(part, rows) for part in reward.parts], changed)


def scaled(reward: Any, factor: Any) -> WeightedRewards:
    """`factor` times the reward."""
    check_number("the factor of a reward", factor)
    old = reward.combination if isinstance(reward, WeightedRewards) else None
    if old is None or old.bounds is not None or old.reduction != "sum":
        return WeightedRewards([reward], [factor])
    weights = tuple(factor * w for w in old.weights)
    return reward.of(reward.parts, replace(old, weights=weights, offset=factor * old.offset))


def added(reward: Any, other: Any) -> WeightedRewards:
    """The reward and a number, or another reward."""
    if _is_number(other):
        old = _as_sum(reward)
        offset = old.combination.offset + check_number("what is added to a reward", other)
        return old.of(old.parts, replace(old.combination, offset=offset))
    one, two = _as_sum(reward), _as_sum(other)
    a, b = one.combination, two.combination
    combination = Combination(a.weights + b.weights, offset=a.offset + b.offset)
    return one.of([*one.parts, *two.parts], combination)


def clamped(reward: Any, low: float, high: float) -> WeightedRewards:
    """The reward between `low` and `high`."""
    bounds = _bounds("clamp", (low, high))
    old = reward if isinstance(reward, WeightedRewards) else WeightedRewards([reward])
    if old.combination.bounds is not None:
        return WeightedRewards([old], bounds=bounds)
    return old.of(old.parts, replace(old.combination, bounds=bounds))


def _as_sum(reward: Any) -> WeightedRewards:
    """The reward as a plain sum."""
    if isinstance(reward, WeightedRewards):
        plain = reward.combination.bounds is None and reward.combination.reduction == "sum"
        return reward if plain else WeightedRewards([reward])
    return WeightedRewards([reward])


def _bounds(name: str, value: Any) -> tuple[float, float]:
    try:
        low, high = (float(check_number(name, bound)) for bound in value)
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < high:
        raise ValueError(f"{name}: {value!r}; pass two finite numbers (lo, hi) with lo < hi")
    return low, high


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, Tensor)) and not isinstance(value, bool)
