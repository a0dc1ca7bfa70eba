"""Preference pairs, and the five reward models, all through `rgtg_fast.training`."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import numpy as np
import small_models
import torch
from torch import nn
from transformers import LlamaForCausalLM

from study_parts.tasks import Task

KINDS = ("full", "partial", "farma", "rad", "genarm")
LOSS = {"full": "full", "partial": "prefix", "farma": "farma", "rad": "rad", "genarm": "genarm"}


def make_pairs(task: Task, prompts: list[str], count: int, seed: int, noisy: bool) -> list[dict]:
    """`count` pairs of grammar replies as token ids, EOS included. The winner is drawn by
    Bradley-Terry from the gold rewards (`noisy`), or is the better one (ties are left out)."""
    rng = random.Random(seed)
    endless = iter(lambda: rng.choice(prompts), None)
    pairs = small_models.make_pairs(
        task.tokenizer, endless, task.sample_reply, task.gold, rng, noisy=noisy
    )
    return list(itertools.islice(pairs, count))


def labelled(pairs: list[dict]) -> list[dict]:
    """RAD's data out of the same judgements: winners are labelled 1, losers 0."""
    return [
        {"prompt_ids": p["prompt_ids"], "answer_ids": p[side], "label": label}
        for p in pairs
        for side, label in (("chosen_ids", 1.0), ("rejected_ids", 0.0))
    ]


def initial_model(task: Task, kind: str) -> nn.Module:
    """The language model's body with the head of this kind: zeros, but for GenARM's."""
    if kind in ("full", "partial", "rad"):
        return small_models.reward_model_on(task.lm)
    if kind == "genarm":
        return copy.deepcopy(task.lm)
    config = copy.deepcopy(task.lm.config)
    config.tie_word_embeddings = False
    model = LlamaForCausalLM(config)
    model.model.load_state_dict(task.lm.model.state_dict())
    nn.init.zeros_(model.lm_head.weight)
    return model


def trainer_of(task: Task, kind: str, model: nn.Module, data: Any, seed: int) -> Any:
    sizes = task.sizes
    rows = sizes.batch * (2 if kind == "rad" else 1)
    return small_models.reward_trainer(
        model,
        task.tokenizer,
        data,
        loss_type=LOSS[kind],
        learning_rate=task.learning_rate,
        per_device_train_batch_size=rows,
        # FaRMA's steps alternate between its two losses: twice as many for as many of each.
        num_train_epochs=sizes.epochs * (2 if kind == "farma" else 1),
        seed=seed,
    )


def train(task: Task, kind: str, seed: int) -> nn.Module:
    """A reward model of this kind on this seed's pairs (the same for all kinds)."""
    torch.manual_seed(seed)
    pairs = make_pairs(task, task.prompts["train"], task.sizes.pairs, 1000 + seed, noisy=True)
    model = initial_model(task, kind)
    data = labelled(pairs) if kind == "rad" else pairs
    trainer_of(task, kind, model, data, seed).train()
    return model.eval()


def margins(task: Task, kind: str, model: nn.Module, pairs: list[dict]) -> tuple[Any, Any]:
    """r(chosen prefix) - r(rejected prefix) [n, T] of `pairs`, and their labels [n, 3]: the two
    lengths and the number of tokens both begin with (as `rgtg_fast.training.metrics` takes them).

    RAD's rewards are read by the trainer of pairs: the model is a classifier all the same.
    """
    reader = trainer_of(task, "partial" if kind == "rad" else kind, model, pairs, 0)
    predicted = reader.predict(reader.train_dataset)
    model.eval()
    return np.asarray(predicted.predictions), np.asarray(predicted.label_ids)


def right_by_decile(margin: Any, labels: Any) -> list[list[float | None]]:
    """[10][n]: 1, 0 or 0.5 (a tie) for each pair at each decile of the longer answer's length; None
    where the two prefixes are still the same."""
    longest, equal = labels[:, :2].max(1).astype(int), labels[:, 2]
    rows = np.arange(len(margin))
    out: list[list[float | None]] = []
    for decile in range(1, 11):
        at = np.ceil(longest * decile / 10).astype(int)
        gap = margin[rows, at - 1]
        right = np.where(gap == 0, 0.5, gap > 0)
        out.append([float(r) if a > e else None for r, a, e in zip(right, at, equal, strict=True)])
    return out
