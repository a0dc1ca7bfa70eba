"""Sequences of actions, of which a backspace is one, as trees that one forward computes.

A state is a prompt and an answer so far. The state behind a backspace is the one before the token
that it undoes, so the states that a sequence of actions visits are a tree: each node is a token,
and sees its ancestors and itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.attention import attention_spans
from .forward import TrainedParts


class Step(NamedTuple):
    """`action` taken at node `source`, leading to node `target`, after `before` others."""

    source: int
    action: int
    target: int
    before: int


@dataclass
class Tree:
    """Nodes of a row, the prompt's first: their `tokens`, `parents` (-1 for the root), and the
    `steps` that were taken between them. `end` is, where EOS was taken, its node and the number of
    actions up to it."""

    tokens: list[int]
    parents: list[int]
    steps: list[Step] = field(default_factory=list)
    end: tuple[int, int] | None = None

    def add(self, parent: int, token: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1


def undoes_too_much(actions: Sequence[int], backspace: int, eos: int) -> bool:
    """Whether a backspace among the actions has no token to undo, or would undo EOS."""
    text: list[int] = []
    for action in actions:
        if action != backspace:
            text.append(action)
        elif not text or text.pop() == eos:
            return True
    return False


def grow(prompt: Sequence[int], actions: Sequence[int], backspace: int, eos: int | None) -> Tree:
    """The states that `actions` visit from the end of `prompt`, and their steps."""
    tree = Tree(list(prompt), list(range(-1, len(prompt) - 1)))
    at = len(prompt) - 1
    for before, action in enumerate(actions):
        to = tree.parents[at] if action == backspace else tree.add(at, action)
        tree.steps.append(Step(at, action, to, before))
        at = to
    if actions and actions[-1] == eos:
        tree.end = at, len(actions)
    return tree


def add_slips(tree: Tree, rate: float, vocabulary: int, never: Sequence[int], seed: str) -> None:
    """At each step, with probability `rate`, another token of the vocabulary in the place of its
    action, but none of `never` (of which the first is the backspace), and behind that the step
    back. The slip itself is no step: nothing is to imitate it."""
    rng = random.Random(seed)
    for step in list(tree.steps):
        slips, token = rng.random() < rate, rng.randrange(vocabulary)
        if slips and step.action != never[0] and token not in (step.action, *never):
            node = tree.add(step.source, token)
            tree.steps.append(Step(node, never[0], step.source, step.before + 1))


class Nodes(NamedTuple):
    """Trees as a batch: `ids` and `positions` int64 [N, L], and `mask` [N, 1, L, L], which is added
    to attention scores. Padding nodes see themselves alone."""

    ids: Tensor
    positions: Tensor
    mask: Tensor


def batch_trees(trees: Sequence[Tree], device: torch.device, dtype: torch.dtype) -> Nodes:
    """The nodes of trees, in their order, padded on the right."""
    width = max(len(tree.tokens) for tree in trees)
    ids = torch.zeros(len(trees), width, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    rows = sees.numpy()  # thousands of small writes, which torch is slow at
    for n, tree in enumerate(trees):
        ids[n, : len(tree.tokens)] = torch.tensor(tree.tokens)
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                rows[n, node] |= rows[n, parent]
    positions = (sees.sum(-1) - 1).to(device)
    # Not boolean: eager attention adds a mask, and True would be 1.
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    return Nodes(ids.to(device), positions, mask[:, None].to(device))


@torch.no_grad()
def check_trees(parts: TrainedParts, longest: int) -> None:
    """Computes a small tree in one forward and path by path.

    Raises `ValueError` where the two differ, or where rows of `longest` tokens reach beyond a
    layer's window, which a mask of their own would open.
    """
    name = type(parts.inner).__name__
    # Tokens 0 to 4, of which 1 is undone.
    tree = grow([2, 1], [1, 0, 3, 4], backspace=0, eos=None)
    spans = [span for span in attention_spans(parts.rm.text_config).values() if span]
    if spans and min(spans) < longest:
        raise ValueError(
            f"{name} has layers that see {min(spans)} tokens and a row has {longest}; set "
            f"max_length={min(spans)}"
        )
    training = parts.model.training
    parts.model.eval()
    try:
        nodes = batch_trees([tree], parts.rm.device, parts.rm.dtype)
        together = parts.node_logits(nodes.ids, nodes.mask, nodes.positions, 0)[0]
        alone = []
        for node in range(len(tree.tokens)):
            path = [node]
            while tree.parents[path[0]] >= 0:
                path.insert(0, tree.parents[path[0]])
            ids = nodes.ids[:, path]
            alone.append(parts.node_logits(ids, torch.ones_like(ids), None, len(path) - 1)[0, 0])
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(_NO_TREES.format(name, f" ({error})")) from error
    finally:
        parts.model.train(training)
    expected = torch.stack(alone)
    least = 1e-4 if parts.rm.dtype in (torch.float32, torch.float64) else 5e-2
    if (together - expected).abs().max() > least * expected.abs().max():
        raise ValueError(_NO_TREES.format(name, ""))


_NO_TREES = (
    "{} does not tell undone tokens apart by a mask and positions, so loss_type='sequencematch' "
    "cannot train it{}; load it with attn_implementation='sdpa' or 'eager', or take a model with "
    "full attention and plain positions (GPT-2, Llama, Qwen, ...)"
)
