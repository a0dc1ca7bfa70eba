"""What the answers' tokens are worth to the language model that training begins with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .collate import PairCollator
from .data import TokenRows
from .forward import TrainedParts
from .objectives import answer_logprobs


def check_scores(data: TokenRows, name: str) -> None:
    """Raises `ValueError` for rows without the scores of both answers."""
    without = sum("chosen_score" not in r or "rejected_score" not in r for r in data.rows)
    if without:
        raise ValueError(
            f"{name}: {without} of {len(data)} rows have no chosen_score and rejected_score, the "
            "rewards of the two answers, which loss_type='copg' learns from; add them (the "
            "own_pairs.jsonl of on-policy rounds have them)"
        )


@torch.no_grad()
def add_reference(data: TokenRows, model: nn.Module, parts: TrainedParts, size: int) -> None:
    """Gives every row `reference`: log-probs of its answers' tokens, [chosen, rejected], under the
    model as it is, in eval mode, so that no second model is kept through training. A checkpoint is
    loaded later: a run that goes on has the reference of its beginning."""
    training = model.training
    model.eval()
    loader: Any = DataLoader(data, size, collate_fn=PairCollator())  # type: ignore[arg-type]
    rows = iter(data.rows)
    try:
        for batch in loader:
            batch = {key: value.to(parts.rm.device) for key, value in batch.items()}
            logprobs = answer_logprobs(parts, batch)
            lengths = batch["answer_mask"].sum(-1).tolist()
            for values, ends in zip(logprobs.cpu(), lengths, strict=True):
                row = next(rows)
                row["reference"] = [v[:end] for v, end in zip(values, ends, strict=True)]
    finally:
        model.train(training)
