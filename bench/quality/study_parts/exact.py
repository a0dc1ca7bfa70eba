"""The language model's whole tree of answers, its optimal policies and its true prefix values."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from study_parts.tasks import Task
from study_parts.training import eval_pairs

LEAST = 1e-6  # prefixes less likely than this are left out
OPTIMAL_BETAS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass
class Tree:
    """The answers to one prompt with their probabilities [M] (of sum < 1: what is left out is
    less likely than LEAST or longer than the limit) and gold rewards [M]."""

    answers: list[tuple[int, ...]]
    probability: Tensor
    gold: Tensor


@torch.no_grad()
def enumerate_tree(task: Task, prompt: str) -> Tree:
    """Every answer to `prompt` that has a probability of at least LEAST, level by level."""
    start, eos = task.tokenizer(prompt)["input_ids"], task.tokenizer.eos_token_id
    answers: list[tuple[int, ...]] = []
    ends: list[float] = []
    level: list[tuple[int, ...]] = [()]
    logprobs = torch.zeros(1, dtype=torch.float64)
    cache, fed = DynamicCache(config=task.lm.config), torch.tensor([start])
    for _ in range(task.max_new_tokens):
        out = task.lm(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        total = logprobs[:, None] + out.logits[:, -1].double().log_softmax(-1)
        rows, tokens = (total >= torch.tensor(LEAST).log()).nonzero(as_tuple=True)
        children = [(*level[r], t) for r, t in zip(rows.tolist(), tokens.tolist(), strict=True)]
        values, done = total[rows, tokens], tokens == eos
        answers += [c for c, d in zip(children, done.tolist(), strict=True) if d]
        ends += values[done].tolist()
        level = [c for c, d in zip(children, done.tolist(), strict=True) if not d]
        if not level:
            break
        logprobs, fed = values[~done], tokens[~done, None]
        cache.batch_select_indices(rows[~done])
    texts = task.tokenizer.batch_decode(answers, skip_special_tokens=True)
    gold = [task.gold(prompt, text, True) for text in texts]
    return Tree(answers, torch.tensor(ends, dtype=torch.float64).exp(), torch.tensor(gold).double())


def optimal_policy(tree: Tree, beta: float) -> tuple[float, float]:
    """Expected gold reward and KL from the base of π*(y) ∝ π(y) exp(β gold(y)), the policy with
    the largest expected gold reward at its KL. The base is taken as normalised over the tree."""
    base = (tree.probability / tree.probability.sum()).log()
    tilted = (base + beta * tree.gold).log_softmax(0)
    weight = tilted.exp()
    return (weight * tree.gold).sum().item(), (weight * (tilted - base)).sum().item()


def prefix_values(tree: Tree) -> dict[tuple[int, ...], float]:
    """V(prefix) = E[gold | prefix] under the base policy, for every prefix of the tree."""
    mass: dict[tuple[int, ...], float] = defaultdict(float)
    reward: dict[tuple[int, ...], float] = defaultdict(float)
    for answer, p, gold in zip(
        tree.answers, tree.probability.tolist(), tree.gold.tolist(), strict=True
    ):
        for end in range(1, len(answer) + 1):
            mass[answer[:end]] += p
            reward[answer[:end]] += p * gold
    return {prefix: reward[prefix] / mass[prefix] for prefix in mass}


def exact_values(task: Task) -> dict[str, Any]:
    """The frontier of the optimal policies over the test prompts, the mass of the trees, and what
    the true values V of the two prefixes of each evaluation pair differ by at each decile of the
    longer answer's length [10][P][n], the shorter answer held at its end; None: not in the tree."""
    test, held_out = task.prompts["test"], task.prompts["eval"]
    pairs, count = eval_pairs(task), task.sizes.eval_pairs
    optima, mass, answers, gaps = {}, {}, {}, {}
    for prompt in dict.fromkeys([*test, *held_out]):
        tree = enumerate_tree(task, prompt)
        mass[prompt], answers[prompt] = tree.probability.sum().item(), len(tree.answers)
        if prompt in test:
            optima[prompt] = [optimal_policy(tree, beta) for beta in OPTIMAL_BETAS]
        if prompt in held_out:
            known, first = prefix_values(tree), held_out.index(prompt) * count
            gaps[prompt] = [_value_gaps(pair, known) for pair in pairs[first : first + count]]
    points = torch.tensor([optima[prompt] for prompt in test])  # [P, β, 2]
    return {
        "frontier": [
            {"beta": beta, "gold": points[:, i, 0].tolist(), "kl": points[:, i, 1].tolist()}
            for i, beta in enumerate(OPTIMAL_BETAS)
        ],
        "mass": list(mass.values()),
        "answers": list(answers.values()),
        "value_gaps": [[[row[d] for row in gaps[p]] for p in held_out] for d in range(10)],
    }


def _value_gaps(pair: dict, known: dict[tuple[int, ...], float]) -> list[float | None]:
    """V(prefix of the chosen answer) - V(prefix of the rejected one) at each decile."""
    sides = [pair["chosen_ids"], pair["rejected_ids"]]
    longest = max(map(len, sides))
    gaps: list[float | None] = []
    for decile in range(1, 11):
        end = math.ceil(longest * decile / 10)
        chosen, rejected = (known.get(tuple(side[:end])) for side in sides)
        missing = chosen is None or rejected is None
        gaps.append(None if missing else round(chosen - rejected, 6))
    return gaps
