"""How much a reward counts at a step: beta over the answer, and beta solved for a given KL."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_POINTS, _ROUNDS = 64, 6  # of the search for beta: it ends with 64^-6 of the largest


def schedule_of(factor: Callable[[int], float], steps: int, device: torch.device) -> Tensor:
    """What `factor` gives at tokens 0 .. steps - 1 of an answer, fp32 [steps].

    Raises `ValueError` where that is no finite number.
    """
    values = []
    for position in range(steps):
        value = factor(position)
        try:
            values.append(float(value))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            values.append(math.nan)
        if not abs(values[-1]) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"beta_schedule({position}) gave {value!r}; it must give a finite float for every "
                f"position of the answer, 0 to {steps - 1}"
            )
    return torch.tensor(values, dtype=torch.float32, device=device)


def kl_of(logprobs: Tensor, rewards: Tensor, beta: Tensor, temperature: Tensor) -> Tensor:
    """KL(q || π) in nats, float64 [..], of q = softmax((log π + β r) / T) over candidates [.., k].

    Those at -inf, in log π or r, have q = 0. `beta` and `temperature` are [..].
    """
    possible = (logprobs != -torch.inf) & (rewards != -torch.inf)
    logprobs = logprobs.double().masked_fill(~possible, -torch.inf)
    tilt = beta.double()[..., None] * rewards.double().masked_fill(~possible, 0.0)
    logq = ((logprobs + tilt) / temperature.double()[..., None]).log_softmax(-1)
    return torch.where(possible, logq.exp() * (logq - logprobs), 0.0).sum(-1)


def solve_beta(
    logprobs: Tensor, rewards: Tensor, most: Tensor, temperature: Tensor, budget: float
) -> Tensor:
    """β fp32 [B] between 0 and `most` [B] at which KL(q || π) is `budget`.

    `most` where the KL is less even there; 0 where it is more without any reward (as π has weight
    outside the candidates, and T may sharpen it). With T = 1 the KL grows with β; otherwise several
    β may do, and one of them is taken. Never waits for the device.
    """
    low, high = torch.zeros_like(most, dtype=torch.float64), most.double()
    share = torch.linspace(0, 1, _POINTS + 1, dtype=torch.float64, device=most.device)
    lp, r = logprobs[:, None], rewards[:, None]
    enough = kl_of(logprobs, rewards, high, temperature) <= budget
    nothing = kl_of(logprobs, rewards, low, temperature) >= budget
    for _ in range(_ROUNDS):
        points = low[:, None] + (high - low)[:, None] * share  # [B, _POINTS + 1]
        kl = kl_of(lp, r, points, temperature[:, None].expand_as(points))
        # The first point at which it is above, in whose interval to the left it is reached.
        above = (kl > budget)[:, 1:].byte().argmax(1, keepdim=True)
        low, high = points.gather(1, above)[:, 0], points.gather(1, above + 1)[:, 0]
    solved = (low + high) / 2
    return torch.where(enough, most.double(), torch.where(nothing, 0.0, solved)).float()


def entropy_of(logprobs: Tensor) -> Tensor:
    """The entropy fp32 [B], in nats, of π over the candidates [B, k] alone."""
    logp = logprobs.float().log_softmax(-1)
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)
