"""Which pairs to label: D-optimal choice against random choice, by what a head learns from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgtg_fast.training import (
    PairFeatures,
    PreferenceDataset,
    fit_head,
    pair_features,
)
from rgtg_fast.training.experimental import d_optimal
from study_parts.models import BATCH
from study_parts.tasks import Task
from study_parts.training import eval_pairs, training_pairs

COUNTS = (30, 100, 300)
RANDOM = 10  # random choices of each count
L2 = 1e-2


def compare_selections(task: Task, seed: int) -> dict[int, dict[str, list[float]]]:
    """By number of pairs, way of choosing them among this seed's training pairs and kind of labels
    (as drawn, or by the gold reward), the accuracy on whole answers for each evaluation prompt [P]
    of a head on the frozen language model that is fitted to them."""
    pairs = training_pairs(task, seed)
    pool, held_out = _features(task, pairs), _features(task, eval_pairs(task))
    labels = {"drawn": torch.ones(len(pool)), "exact": _exact_labels(task, pairs)}
    draw = torch.Generator().manual_seed(seed)

    def accuracy(index: Tensor, sign: Tensor) -> Tensor:
        n = len(index)
        alike = torch.full((n,), 1 / n)
        known = pool[index] * sign[index, None]
        head = fit_head(PairFeatures(known, torch.arange(n), torch.ones(n), alike), l2=L2)
        gap = held_out @ head.weight
        right = torch.where(gap == 0, 0.5, (gap > 0).float())
        return right.view(-1, task.sizes.eval_pairs).mean(-1)

    table: dict[int, dict[str, Any]] = {}
    for count in (n for n in COUNTS if n <= len(pool)):
        drawn = [torch.randperm(len(pool), generator=draw)[:count] for _ in range(RANDOM)]
        chosen = [d_optimal(pool, count).index]
        table[count] = {
            f"{way}, {name} labels": torch.stack([accuracy(i, sign) for i in choices]).mean(0)
            for name, sign in labels.items()
            for way, choices in (("random", drawn), ("d-optimal", chosen))
        }
    return {n: {way: row.tolist() for way, row in ways.items()} for n, ways in table.items()}


def _exact_labels(task: Task, pairs: list[dict]) -> Tensor:
    """1 where the gold reward agrees with the drawn winner or is the same, -1 elsewhere [n]."""
    read = task.tokenizer.decode
    gold = [
        [
            task.gold(read(p["prompt_ids"]), read(p[side][:-1]), True)
            for side in ("chosen_ids", "rejected_ids")
        ]
        for p in pairs
    ]
    return torch.tensor([-1.0 if chosen < rejected else 1.0 for chosen, rejected in gold])


def _features(task: Task, pairs: list[dict]) -> Tensor:
    """Differences of the whole answers' hidden states [n, H]."""
    known = PreferenceDataset(pairs)
    return pair_features(task.lm, known, full=True, batch_size=BATCH).differences
