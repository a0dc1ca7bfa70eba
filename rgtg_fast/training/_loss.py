"""The pairwise loss in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_bt_loss(
    r_chosen: Tensor,
    r_rejected: Tensor,
    mask_chosen: Tensor,
    mask_rejected: Tensor,
    *,
    first: int = 1,
    weights: str = "uniform",
    margin: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
    extension: str = "hold",
) -> Tensor:
    n_chosen, n_rejected = mask_chosen.long().sum(-1), mask_rejected.long().sum(-1)
    longest = torch.maximum(n_chosen, n_rejected)
    at = torch.arange(r_chosen.shape[1], device=r_chosen.device)
    if extension == "hold":
        r_chosen = r_chosen.gather(1, torch.minimum(at, n_chosen[:, None] - 1))
        r_rejected = r_rejected.gather(1, torch.minimum(at, n_rejected[:, None] - 1))
    counted = (at < longest[:, None]) & (at >= first - 1)
    weight = counted.to(r_chosen.dtype)
    if weights == "linear":
        weight = weight * (at + 1)
    gap = r_chosen - r_rejected
    if margin is not None:
        gap = gap - torch.as_tensor(margin, device=gap.device).to(gap.dtype).reshape(-1, 1)
    loss = -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
    loss = loss + centering * (r_chosen + r_rejected) ** 2
    loss = loss.masked_fill(~counted, 0.0)
    total = weight.sum(-1)
    per_pair = (loss * weight).sum(-1) / total.clamp(min=1)
    return per_pair.sum() / (total > 0).sum().clamp(min=1)
