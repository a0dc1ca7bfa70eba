"""Decoding with every method, and what each answer is worth, costs and deviates from the base."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification

import rgtg_fast
from rgtg_fast.scorers import (
    AttentionCreditScorer,
    AutoregressiveScorer,
    RewardHead,
    RewriteScorer,
    VocabRewardScorer,
)
from study_parts.tasks import K, Task
from study_parts.training import PENALTIES

ROWS = 600  # rows of one call
KIND = {
    "ARGS": "full",
    "ARGS-G": "full",
    "PARGS": "partial",
    "PARGS-G": "partial",
    "FaRMA": "farma",
    "RAD": "rad",
    "GenARM": "genarm",
    "seq2seq": "seq2seq",
    "GenARM-prefix": "genarm_prefix",
    "soft-Q": "soft_q",
    "twist": "twist",
}
SMALLER = {
    "ABC": "abc",
    "ABC credit": "credit",
    "head": "head",
    "pessimistic, mild": "mild",
    "pessimistic, strong": "strong",
    "CREAM": "cream",
}
CREDIT_SHARE = 0.5
# One reward forward of one token serves all candidates.
SHARED = ("FaRMA", "GenARM", "GenARM-prefix", "seq2seq", "soft-Q", "twist")
# The guide's reward of an answer is the sum over its tokens.
PER_TOKEN = ("GenARM", "GenARM-prefix", "seq2seq", "twist")
# Where the candidates are not the k most likely tokens of the language model: as published, GenARM
# draws from the whole vocabulary, and FaRMA from the k best sums of both models.
CANDIDATES: dict[str, dict[str, Any]] = {
    "GenARM": {"k": None},
    "GenARM-prefix": {"k": None},
    "seq2seq": {"k": None},
    "twist": {"k": None},
    "FaRMA": {"candidates": "sum"},
}


@dataclass
class Answers:
    """Per answer: gold reward, KL from the base policy in nats (for greedy decoding, whose policy
    is a point, -log π(y)), the guide's reward of the whole answer, and new tokens."""

    gold: list[float]
    kl: list[float]
    proxy: list[float]
    tokens: list[int]

    def part(self, rows: slice) -> Answers:
        return Answers(*(values[rows] for values in asdict(self).values()))


def guide_of(task: Task, kind: str, model: Any) -> Any:
    """What `rgtg_fast.generate` takes as the reward model of this kind."""
    if kind in ("farma", "soft_q"):
        return VocabRewardScorer(model)
    if kind in ("genarm", "genarm_prefix", "twist"):
        return AutoregressiveScorer(model)
    if kind == "seq2seq":
        return RewriteScorer(model)
    if kind == "credit":
        return AttentionCreditScorer(model, CREDIT_SHARE)
    return RewardHead(task.lm, model.score) if kind in ("head", *PENALTIES) else model


def judge(task: Task, prompts: list[str], ids: Tensor) -> tuple[list[float], list[int]]:
    """Gold rewards and lengths (EOS included) of answers [N, T]."""
    eos = task.tokenizer.eos_token_id
    texts = task.tokenizer.batch_decode(ids, skip_special_tokens=True)
    finished = (ids == eos).any(1).tolist()
    gold = [task.gold(*row) for row in zip(prompts, texts, finished, strict=True)]
    return gold, (ids != task.tokenizer.pad_token_id).sum(1).tolist()


def guided(
    task: Task,
    guide: Any,
    prompts: list[str],
    betas: list[float],
    *,
    greedy: bool = False,
    cumulative: bool = False,
    seed: int,
    **candidates: Any,
) -> Answers:
    """One answer to each of N prompts, row i at weight `betas[i]`. `cumulative`: the guide's
    reward of an answer is the sum over its tokens (GenARM), not the last one. `candidates`: what
    `generate` is told of them; without it they are the task's K most likely tokens."""
    how = (
        {"k": K[task.name], "do_sample": not greedy} | ({} if greedy else {"top_k": 0}) | candidates
    )
    parts = [
        _guided(task, guide, prompts[i : i + ROWS], betas[i : i + ROWS], cumulative, s, how)
        for s, i in enumerate(range(0, len(prompts), ROWS), start=1000 * seed)
    ]
    fields = [asdict(part) for part in parts]
    return Answers(**{name: [v for f in fields for v in f[name]] for name in fields[0]})


def _guided(
    task: Task,
    guide: Any,
    prompts: list[str],
    betas: list[float],
    cumulative: bool,
    seed: int,
    how: dict[str, Any],
) -> Answers:
    inputs = task.tokenizer(prompts, return_tensors="pt", padding=True)
    out: Any = rgtg_fast.generate(
        task.lm,
        **inputs,
        reward_model=guide,
        beta=torch.tensor(betas),
        seed=seed,
        max_new_tokens=task.max_new_tokens,
        return_dict_in_generate=True,
        **how,
    )
    ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    gold, tokens = judge(task, prompts, ids)
    if cumulative:
        proxy = out.rewards.nansum(1)
    else:
        proxy = out.rewards.gather(1, torch.tensor(tokens)[:, None] - 1)[:, 0]
    return Answers(gold, out.kl.nansum(1).tolist(), proxy.tolist(), tokens)


@torch.no_grad()
def base_samples(task: Task, prompts: list[str], seed: int) -> tuple[Tensor, list[float], list]:
    """One plain sample of the language model for each prompt: ids [N, T], gold, tokens."""
    torch.manual_seed(seed)
    rows = []
    for i in range(0, len(prompts), ROWS):
        inputs = task.tokenizer(prompts[i : i + ROWS], return_tensors="pt", padding=True)
        out = task.lm.generate(
            **inputs, do_sample=True, top_k=0, max_new_tokens=task.max_new_tokens
        )
        ids = out[:, inputs["input_ids"].shape[1] :]
        missing = task.max_new_tokens - ids.shape[1]
        rows.append(torch.nn.functional.pad(ids, (0, missing), value=task.tokenizer.pad_token_id))
    ids = torch.cat(rows)
    return ids, *judge(task, prompts, ids)


@torch.no_grad()
def whole_rewards(task: Task, rm: LlamaForSequenceClassification, prompts: list[str], ids: Tensor):
    """The classifier's rewards [N] of whole answers [N, T]: its public forward pools the last."""
    pad = task.tokenizer.pad_token_id
    starts = task.tokenizer(prompts)["input_ids"]
    rows = [s + [i for i in a if i != pad] for s, a in zip(starts, ids.tolist(), strict=True)]
    rewards = []
    for i in range(0, len(rows), ROWS):
        part = rows[i : i + ROWS]
        width = max(map(len, part))
        padded = torch.tensor([r + [pad] * (width - len(r)) for r in part])
        rewards.append(rm(padded, attention_mask=(padded != pad).long()).logits[:, 0])
    return torch.cat(rewards)


def forward_tokens(method: str, length: float, k: int) -> dict[str, float]:
    """Tokens through the language model and the reward model for an answer of `length` tokens
    (prompts apart): what a method costs, whatever the machine. A draft counts as long as the answer
    that is made of it."""
    if method in ("base", "top-k"):
        return {"lm": length, "rm": 0.0}
    if method.startswith("best-of-"):
        n = int(method.removeprefix("best-of-"))
        return {"lm": n * length, "rm": n * length}
    if method == "seq2seq":
        return {"lm": 2 * length, "rm": 2 * length}
    return {"lm": length, "rm": length if method in SHARED else k * length}
