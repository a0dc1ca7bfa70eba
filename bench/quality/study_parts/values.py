"""Value targets: prefixes learn what a reward model of the same seed says of whole answers.

Samples of the language model need no labels, so there are as many answers as the pairs have.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import get_cosine_schedule_with_warmup

from rgtg_fast.training.experimental import contrastive_twist_loss
from study_parts.methods import base_samples
from study_parts.tasks import Task
from study_parts.training import initial_model

JUDGE = "genarm"  # orders whole answers best, see `accuracy` in study.json
JUDGE_SCALE = 0.05  # what its log-probabilities were multiplied by in training
SCALE = 0.1  # of the twist's, as in genarm_prefix
GROUP = 8  # samples to one prompt
BATCH = 512


def judged_samples(task: Task, judge: nn.Module, seed: int) -> list[dict]:
    """As many samples of the language model as the pairs have answers, GROUP to each prompt one
    after the other, labelled with the judge's rewards of the whole answers, mean zero. (Labels of
    any size are allowed beside `targets`, which soft Q-learning does not read.)"""
    rng = random.Random(20_000 + seed)
    count = 2 * task.sizes.pairs // GROUP
    prompts = [p for p in rng.choices(task.prompts["train"], k=count) for _ in range(GROUP)]
    ids = base_samples(task, prompts, 20_000 + seed)[0]
    pad = task.tokenizer.pad_token_id
    starts = task.tokenizer(prompts)["input_ids"]
    rows = [
        {"prompt_ids": start, "answer_ids": [i for i in answer if i != pad]}
        for start, answer in zip(starts, ids.tolist(), strict=True)
    ]
    rewards = JUDGE_SCALE * _summed_logprobs(judge, rows)
    labels = (rewards - rewards.mean()).tolist()
    return [
        row | {"label": label, "targets": [label] * len(row["answer_ids"])}
        for row, label in zip(rows, labels, strict=True)
    ]


@torch.no_grad()
def _summed_logprobs(model: nn.Module, rows: list[dict]) -> Tensor:
    """Of whole answers [N]."""
    parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    return torch.cat(
        [torch.where(m, x, 0.0).sum(-1) for x, m in (_logprobs(model, p) for p in parts)]
    )


def _logprobs(model: Any, rows: list[dict]) -> tuple[Tensor, Tensor]:
    """Log-probs of the answers' tokens [N, T], right-padded, and their mask [N, T]."""
    # Padded on the right, where a causal model needs no mask.
    whole = [torch.tensor(row["prompt_ids"] + row["answer_ids"]) for row in rows]
    ids = pad_sequence(whole, batch_first=True)
    logits = model(ids[:, :-1], use_cache=False).logits
    known = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    lengths = torch.tensor([len(row["answer_ids"]) for row in rows])
    at = torch.arange(int(lengths.max()))
    first = torch.tensor([len(row["prompt_ids"]) for row in rows])[:, None] - 1
    answers = known.gather(1, (first + at).clamp(max=known.shape[1] - 1))
    return answers, at < lengths[:, None]


def train_twist(task: Task, rows: list[dict], seed: int) -> nn.Module:
    """A language model whose SCALE Σ log p of a prefix is its log-twist at β = 1, by contrastive
    twist learning on `rows`; as many answers a step and as many steps as a model of the pairs."""
    sizes = task.sizes
    torch.manual_seed(seed)
    model: Any = initial_model(task, "twist").train()
    groups = [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]
    per_step = 2 * sizes.batch // GROUP
    order = random.Random(seed)
    epochs = [order.sample(groups, len(groups)) for _ in range(sizes.epochs)]
    steps = [e[i : i + per_step] for e in epochs for i in range(0, len(e), per_step)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=task.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, len(steps))
    for batch in steps:
        known, mask = _logprobs(model, [row for group in batch for row in group])
        twists = SCALE * torch.where(mask, known, 0.0).cumsum(-1)
        rewards = torch.tensor([[row["label"] for row in group] for group in batch])
        shape = (len(batch), GROUP, -1)
        loss = contrastive_twist_loss(twists.view(shape), mask.view(shape), rewards)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
