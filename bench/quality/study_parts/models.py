"""The reward model of a kind and a seed: trained once, kept in the study's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rgtg_fast.training import PreferenceDataset, fit_head, pair_features
from rgtg_fast.training.experimental import (
    PessimisticHead,
    attention_labels,
    reward_consistency,
)
from study_parts.tasks import Task
from study_parts.training import (
    CAUSAL,
    JUDGED,
    KINDS,
    PENALTIES,
    initial_model,
    labelled,
    train,
    training_pairs,
)
from study_parts.values import JUDGE, judged_samples, train_twist

SHARE = 0.5  # of ABC's reward that attention gives out
HEAD_L2 = 1e-4
TD_LAMBDA = 1.0  # of soft Q-learning
REFERENCE = 500  # pairs whose tokens are averaged
BATCH = 64


def model_of(task: Task, kind: str, seed: int, folder: Path) -> nn.Module:
    """The model of this kind on this seed's pairs, from `folder` if it is there."""
    if kind == "credit":
        return model_of(task, "full", seed, folder)
    saved = folder / task.name / "models" / f"seed{seed}_{kind}"
    if saved.exists():
        of = LlamaForCausalLM if kind in CAUSAL else LlamaForSequenceClassification
        return of.from_pretrained(saved, dtype=torch.float32).eval()
    model: Any = _trained(task, kind, seed, folder)
    if kind not in PENALTIES:
        partial = saved.with_suffix(".part")
        model.save_pretrained(partial)
        partial.rename(saved)
    return model


def _trained(task: Task, kind: str, seed: int, folder: Path) -> Any:
    def other(name: str) -> Any:
        return model_of(task, name, seed, folder)

    pairs = training_pairs(task, seed)
    if kind in KINDS:
        return train(task, kind, labelled(pairs) if kind == "rad" else pairs, seed)
    if kind in JUDGED:
        rows = judged_samples(task, other(JUDGE), seed)
        if kind == "twist":
            return train_twist(task, rows, seed)
        return train(task, kind, rows, seed, td_lambda=TD_LAMBDA)
    if kind == "abc":
        rows = attention_labels(other("full"), pairs, share=SHARE, batch_size=BATCH)
        return train(task, "rad", rows, seed, weights="uniform")
    if kind in ("half1", "half2"):
        return train(task, "partial", pairs[kind == "half2" :: 2], seed)
    if kind == "cream":
        known = PreferenceDataset(pairs)
        rate = reward_consistency(other("half1"), other("half2"), known, batch_size=BATCH)
        model = train(task, "partial", pairs, seed, consistency=rate)
        model.config.consistency = rate
        return model
    model = initial_model(task, "partial").eval()
    if kind == "head":
        known = PreferenceDataset(pairs)
        features = pair_features(task.lm, known, batch_size=BATCH)
        model.score.weight.data = fit_head(features, l2=HEAD_L2).weight[None]
        whole = pair_features(task.lm, known, full=True, batch_size=BATCH)
        reference = mean_feature(task, pairs[:REFERENCE])
        doubtful = PessimisticHead.from_features(
            whole, model.score.weight[0], 0.0, reference=reference
        )
        doubtful.save(_pessimistic(task, seed, folder))
        return model
    other("head")  # trains the head and stores its Σ, which is read below
    model.score = PessimisticHead.load(_pessimistic(task, seed, folder))
    model.score.penalty = PENALTIES[kind]
    return model


def _pessimistic(task: Task, seed: int, folder: Path) -> Path:
    path = folder / task.name / "models" / f"seed{seed}_pessimistic.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@torch.no_grad()
def mean_feature(task: Task, pairs: list[dict]) -> Tensor:
    """The mean hidden state of the language model over all tokens of the answers [H]."""
    total, count = torch.zeros(task.lm.config.hidden_size, dtype=torch.float64), 0
    rows = [(p["prompt_ids"], p[side]) for p in pairs for side in ("chosen_ids", "rejected_ids")]
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        # Padded on the right, where a causal model needs no mask.
        ids = pad_sequence([torch.tensor(x + y) for x, y in part], batch_first=True)
        hidden = task.lm.model(ids).last_hidden_state
        for row, (prompt, answer) in zip(hidden, part, strict=True):
            total += row[len(prompt) : len(prompt) + len(answer)].double().sum(0)
            count += len(answer)
    return (total / count).float()
