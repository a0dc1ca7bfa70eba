"""The language model's whole tree of answers, its optimal policies and its true prefix values."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rgtg_fast.models.foreign import CACHE
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
        out = task.lm(fed, use_cache=True, logits_to_keep=1, **{CACHE: cache})
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


def best_values(tree: Tree) -> dict[tuple[int, ...], float]:
    """V_max(prefix) = the largest gold reward of the tree's answers that begin with it: what
    FaRMA's R(y_i | y_<i) = max_v R(v | y_<=i) asks for, if v is a token of the tree and R(EOS)
    the gold reward."""
    best: dict[tuple[int, ...], float] = {}
    for answer, gold in zip(tree.answers, tree.gold.tolist(), strict=True):
        for end in range(1, len(answer) + 1):
            best[answer[:end]] = max(gold, best.get(answer[:end], gold))
    return best


def guided_frontier(
    tree: Tree, values: dict[tuple[int, ...], float], betas: Sequence[float] = OPTIMAL_BETAS
) -> list[tuple[float, float]]:
    """Expected gold reward and KL from the base, at each β, of the ratio policy
    π(v | y) exp(β values[y v]) / Z(y) at all tokens of the tree, its base normalised over it.

    With values (1/β) log E[exp(β gold) | prefix] this is `optimal_policy`; E[gold | prefix] is
    their limit at β -> 0, and `best_values` is that at β -> ∞.
    """
    mass: dict[tuple[int, ...], float] = defaultdict(float)
    for answer, p in zip(tree.answers, tree.probability.tolist(), strict=True):
        for end in range(len(answer) + 1):
            mass[answer[:end]] += p
    index = {prefix: i for i, prefix in enumerate(mass)}  # the empty prefix is 0, and pads paths
    paths = np.zeros((len(tree.answers), max(map(len, tree.answers))), dtype=int)
    for row, answer in enumerate(tree.answers):
        paths[row, : len(answer)] = [index[answer[: end + 1]] for end in range(len(answer))]
    nodes = list(mass)[1:]
    parent = np.array([index[prefix[:-1]] for prefix in nodes])
    base = np.log([mass[prefix] / mass[prefix[:-1]] for prefix in nodes])
    reward, gold = np.array([values[prefix] for prefix in nodes]), tree.gold.numpy()
    points = []
    for beta in betas:
        tilted, total = base + beta * reward, np.full(len(mass), -np.inf)
        np.logaddexp.at(total, parent, tilted)
        log_policy, log_ratio = (
            np.append(0.0, x - total[parent])[paths].sum(1) for x in (tilted, tilted - base)
        )
        policy = np.exp(log_policy)
        points.append((float(policy @ gold), float(policy @ log_ratio)))
    return points


def exact_values(task: Task) -> dict[str, Any]:
    """Over the test prompts, the frontiers of the optimal policies and of the ratio policy guided
    by V and by V_max; the trees' mass; and what V, and V_max, of the two prefixes of each
    evaluation pair differ by at each decile of the longer answer's length [10][P][n], the shorter
    answer held at its end; None: not in the tree."""
    test, held_out = task.prompts["test"], task.prompts["eval"]
    pairs, count = eval_pairs(task), task.sizes.eval_pairs
    mass, answers, optima = {}, {}, {}
    guided: dict[str, dict] = {"value": {}, "best": {}}
    gaps: dict[str, dict] = {"value": {}, "best": {}}
    for prompt in dict.fromkeys([*test, *held_out]):
        tree = enumerate_tree(task, prompt)
        mass[prompt], answers[prompt] = tree.probability.sum().item(), len(tree.answers)
        if prompt in test:
            optima[prompt] = [optimal_policy(tree, beta) for beta in OPTIMAL_BETAS]
        for name, known in (("value", prefix_values(tree)), ("best", best_values(tree))):
            if prompt in test:
                guided[name][prompt] = guided_frontier(tree, known)
            if prompt in held_out:
                first = held_out.index(prompt) * count
                part = pairs[first : first + count]
                gaps[name][prompt] = [_value_gaps(pair, known) for pair in part]
    return {
        "frontier": _frontier([optima[prompt] for prompt in test]),
        "mass": list(mass.values()),
        "answers": list(answers.values()),
        **{f"guided_by_{name}": _frontier([of[p] for p in test]) for name, of in guided.items()},
        **{
            f"{name}_gaps": [[[row[d] for row in of[p]] for p in held_out] for d in range(10)]
            for name, of in gaps.items()
        },
    }


def _frontier(points: list[list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Gold and KL [prompt][β] as one entry for each of OPTIMAL_BETAS."""
    table = np.array(points)
    return [
        {"beta": beta, "gold": table[:, i, 0].tolist(), "kl": table[:, i, 1].tolist()}
        for i, beta in enumerate(OPTIMAL_BETAS)
    ]


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
