"""Preference pairs, and reward models trained on them, all through `rgtg_fast.training`."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import numpy as np
import small_models
import torch
from torch import nn

from study_parts.tasks import Task

KINDS = ("full", "partial", "farma", "rad", "genarm", "seq2seq", "genarm_prefix")
# Language models, the others are classifiers.
CAUSAL = ("farma", "genarm", "seq2seq", "genarm_prefix", "soft_q", "twist")
# Trained on samples of the language model, judged by a reward model of the same seed.
JUDGED = ("soft_q", "twist")
READ_AS = {"soft_q": "farma", "twist": "genarm_prefix"}  # of pairs, by their trainers
# A pessimistic head each, of this penalty.
PENALTIES = {"mild": 1.0, "strong": 4.0}
# A smaller method's model is trained with the loss of one of these kinds.
LOSS = {kind: kind for kind in (*KINDS, "soft_q")} | {"partial": "prefix"}
EVAL_SEED = 7


def make_pairs(task: Task, prompts: list[str], count: int, seed: int) -> list[dict]:
    """`count` pairs of grammar replies as token ids, EOS included, the winner drawn by
    Bradley-Terry from the gold rewards."""
    rng = random.Random(seed)
    endless = iter(lambda: rng.choice(prompts), None)
    pairs = small_models.make_pairs(
        task.tokenizer, endless, task.sample_reply, task.gold, rng, noisy=True
    )
    return list(itertools.islice(pairs, count))


def training_pairs(task: Task, seed: int) -> list[dict]:
    """The pairs of this seed, the same for all reward models."""
    return make_pairs(task, task.prompts["train"], task.sizes.pairs, 1000 + seed)


def eval_pairs(task: Task) -> list[dict]:
    """For accuracy: as many pairs of each prompt of the `eval` split, one prompt after the other.
    The winner has the larger gold reward."""
    rng = random.Random(EVAL_SEED)
    pairs: list[dict] = []
    for prompt in task.prompts["eval"]:
        endless = small_models.make_pairs(
            task.tokenizer,
            itertools.repeat(prompt),
            task.sample_reply,
            task.gold,
            rng,
            noisy=False,
        )
        pairs += itertools.islice(endless, task.sizes.eval_pairs)
    return pairs


def labelled(pairs: list[dict]) -> list[dict]:
    """RAD's data out of the same judgements: winners are labelled 1, losers 0."""
    return [
        {"prompt_ids": p["prompt_ids"], "answer_ids": p[side], "label": label}
        for p in pairs
        for side, label in (("chosen_ids", 1.0), ("rejected_ids", 0.0))
    ]


def initial_model(task: Task, kind: str) -> nn.Module:
    """The language model itself for the kinds with a head over the vocabulary, as their authors
    begin; a head of zeros on its body for the others."""
    if kind in CAUSAL:
        return copy.deepcopy(task.lm)
    return small_models.reward_model_on(task.lm)


def trainer_of(
    task: Task, kind: str, model: nn.Module, data: Any, seed: int, **options: Any
) -> Any:
    sizes = task.sizes
    rows = sizes.batch * (2 if kind in ("rad", "soft_q") else 1)
    return small_models.reward_trainer(
        model,
        task.tokenizer,
        data,
        loss_type=LOSS[kind],
        learning_rate=task.learning_rate,
        per_device_train_batch_size=rows,
        # FaRMA's steps alternate between its two losses: twice the epochs give each loss as many
        # steps as another kind's has.
        num_train_epochs=sizes.epochs * (2 if kind == "farma" else 1),
        seed=seed,
        **options,
    )


def train(task: Task, kind: str, data: list[dict], seed: int, **options: Any) -> nn.Module:
    """A reward model trained by the loss of this kind; `options` of `PrefixRewardConfig`."""
    torch.manual_seed(seed)
    model = initial_model(task, kind)
    trainer_of(task, kind, model, data, seed, **options).train()
    return model.eval()


def margins(task: Task, kind: str, model: nn.Module, pairs: list[dict]) -> list[list]:
    """r(chosen prefix) - r(rejected prefix) of `pairs` at each decile of the longer answer's
    length, [10][n]; None where the two prefixes are still the same.

    Classifiers of any training are read by the trainer of pairs.
    """
    kind = READ_AS.get(kind, kind if kind in CAUSAL else "partial")
    reader = trainer_of(task, kind, model, pairs, 0)
    predicted = reader.predict(reader.train_dataset)
    model.eval()
    margin, labels = np.asarray(predicted.predictions), np.asarray(predicted.label_ids)
    longest, equal = labels[:, :2].max(1).astype(int), labels[:, 2]
    rows = np.arange(len(margin))
    out: list[list[float | None]] = []
    for decile in range(1, 11):
        at = np.ceil(longest * decile / 10).astype(int)
        gap = margin[rows, at - 1]
        out.append([float(g) if a > e else None for g, a, e in zip(gap, at, equal, strict=True)])
    return out
