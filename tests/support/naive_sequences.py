"""The decoders of whole sequences as their papers have them: no batch, no cache, public forwards.

A text is a `Node`, a prefix that was drawn. What a cached engine has to run is counted beside: a
prompt once, and of a node whose logits or reward are asked for the tokens since the nearest prefix
that was run.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rgtg_fast import ops


class Node:
    """A prefix: its parent, the token it adds, and log π of it."""

    def __init__(self, world: World, parent: Node | None, token: int | None, logp: float) -> None:
        self.world, self.parent, self.token, self.logp = world, parent, token, logp
        self.tokens: list[int] = [] if parent is None else [*parent.tokens, token]
        self.fed = self.read = parent is None
        self.known: torch.Tensor | None = None
        self.options: tuple[torch.Tensor, ...] | None = None
        self.judged: float | None = None

    @property
    def ended(self) -> bool:
        over = bool(self.tokens) and self.tokens[-1] in self.world.eos
        return over or len(self.tokens) >= self.world.steps

    def logprob(self) -> float:
        return 0.0 if self.parent is None else self.parent.logprob() + self.logp

    def logits(self) -> torch.Tensor:
        """[V], behind it."""
        if self.known is None:
            self.world.lm_tokens += self._run("fed")
            ids = torch.tensor([self.world.prompt + self.tokens])
            self.known = self.world.lm(input_ids=ids).logits[0, -1].float()
        return self.known

    def reward(self) -> float:
        if self.judged is None:
            self.world.reward_tokens += self._run("read")
            self.world.rewards += 1
            self.judged = self.world.reward_of(self.tokens)
        return self.judged

    def _run(self, flag: str) -> int:
        node, count = self, 0
        while not getattr(node, flag):
            setattr(node, flag, True)
            node, count = node.parent, count + 1
        return count

    def draw(self, seed: int) -> Node:
        """The next token, with the noise of the seed and its place."""
        place = len(self.tokens)
        _, ids, logp, *_ = ops.mix_logits(
            [self.logits()[None]], [1.0], 1, None, 1.0,
            torch.tensor([seed]), torch.tensor([place]), backend="reference",
        )  # fmt: skip
        return Node(self.world, self, int(ids), float(logp))

    def draw_until(self, seed: int, length: int) -> Node:
        node = self
        while not node.ended and len(node.tokens) < length:
            node = node.draw(seed)
        return node


class World:
    """A prompt, its models, and the counts of what they ran."""

    def __init__(
        self, lm: Any, reward: Callable[[torch.Tensor], torch.Tensor], prompt: Sequence[int],
        steps: int, eos: Sequence[int],
    ) -> None:  # fmt: skip
        self.lm, self.of_ids, self.prompt = lm, reward, list(prompt)
        self.steps, self.eos = steps, set(eos)
        self.lm_tokens = self.reward_tokens = len(self.prompt)
        self.rewards = 0
        self.root = Node(self, None, None, 0.0)

    def reward_of(self, tokens: Sequence[int]) -> float:
        return float(self.of_ids(torch.tensor([self.prompt + list(tokens)])))


def best(nodes: Sequence[Node]) -> Node:
    """The first with the largest reward."""
    winner = nodes[0]
    for node in nodes:
        if node.reward() > winner.reward():
            winner = node
    return winner


def seeds_of(seed: int, n: int) -> list[int]:
    return ops.split_seed(seed, n).tolist()


def best_of(world: World, seed: int, n: int) -> Node:
    return best([world.root.draw_until(s, world.steps) for s in seeds_of(seed, n)])


def blockwise(world: World, seed: int, n: int, block: int) -> tuple[Node, list[int]]:
    node, lengths = world.root, []
    while not node.ended:
        start = len(node.tokens)
        node = best([node.draw_until(s, start + block) for s in seeds_of(seed, n)])
        lengths.append(len(node.tokens) - start)
    return node, lengths


def speculative_rejection(world: World, seed: int, n: int, alpha: float, budget: int) -> Node:
    rows = list(zip([world.root] * n, seeds_of(seed, n), strict=True))
    length = 0
    while True:
        going = [node for node, _ in rows if not node.ended]
        length = max(length + 1, budget // max(len(going), 1) - len(world.prompt))
        rows = [(node.draw_until(s, length), s) for node, s in rows]
        rewards = [node.reward() for node, _ in rows]
        if all(node.ended for node, _ in rows):
            return best([node for node, _ in rows])
        ranked = sorted(range(len(rows)), key=lambda i: (-rewards[i], i))
        rows = [rows[i] for i in sorted(ranked[: max(1, round((1 - alpha) * len(rows)))])]


def treebon(world: World, seed: int, n: int, children: int, layers: int) -> Node:
    segment, parents = math.ceil(world.steps / layers), [world.root] * n
    for layer in range(1, layers + 1):
        seeds = seeds_of(seed, n)
        layer_nodes = [
            p.draw_until(s, layer * segment) for p, s in zip(parents, seeds, strict=False)
        ]
        if layer == layers or all(node.ended for node in layer_nodes):
            return best(layer_nodes)
        ranked = sorted(range(len(layer_nodes)), key=lambda i: (-layer_nodes[i].reward(), i))
        kept = [layer_nodes[i] for i in sorted(ranked[: n // children])]
        parents = [node for node in kept for _ in range(1 if node.ended else children)]
    raise AssertionError


def entropy(logits: torch.Tensor) -> float:
    p = logits.softmax(-1)
    return float(-(p * p.clamp(min=1e-45).log()).sum())


def cards(
    world: World, seed: int, *, target: float, threshold: float, alpha: float, beta: float,
    least: int, most: int, rejections: int,
) -> tuple[Node, list[int], int]:  # fmt: skip
    start = (1 - alpha) * world.reward_of([]) + alpha * target
    chance, node, lengths, rejected, tries = random.Random(seed), world.root, [], 0, 0
    while not node.ended:
        candidates: list[Node] = []
        while True:
            own = seeds_of(seed, tries + 1)[tries]
            z = node.draw(own)
            while not z.ended and len(z.tokens) - len(node.tokens) < most:
                if len(z.tokens) - len(node.tokens) >= least and entropy(z.logits()) >= threshold:
                    break
                z = z.draw(own)
            tries += 1
            candidates.append(z)
            if len(candidates) > rejections:
                chosen = best(candidates)
                if chosen.tokens != z.tokens:  # it has to be run again
                    for count in ("lm_tokens", "reward_tokens"):
                        more = len(chosen.tokens) - len(node.tokens)
                        more -= count == "lm_tokens" and chosen.ended and more
                        setattr(world, count, getattr(world, count) + more)
                    world.rewards += 1
                break
            tau = start + len(z.tokens) * (target - start) / world.steps
            if chance.random() < min(1.0, math.exp((z.reward() - min(tau, target)) / beta)):
                chosen = z
                break
            rejected += 1
        lengths.append(len(chosen.tokens) - len(node.tokens))
        node = chosen
        if not node.ended:
            node.logits()
    return node, lengths, rejected


def smc(
    world: World, seed: int, n: int, k: int, beta: float, share: float
) -> tuple[list[Node], list[float], float, int]:
    """Particles, their weights of sum 1, log Z, and which particle is the answer."""
    nodes, weights, log_z = [world.root] * n, torch.zeros(n, dtype=torch.float64), 0.0
    seeds, chance = seeds_of(seed, n), random.Random(seed)
    while not all(node.ended for node in nodes):
        for i, node in enumerate(nodes):
            if node.ended:
                continue
            logp, ids = node.logits().double().log_softmax(-1).sort(descending=True, stable=True)
            logp, ids = logp[:k], ids[:k]
            texts = [[*node.tokens, int(v)] for v in ids]
            rewards = torch.tensor([world.reward_of(text) for text in texts]).double()
            world.rewards += k
            world.reward_tokens += k
            slot, _ = ops.ratio_sample(
                logp.float()[None], rewards.float()[None], ids[None], beta, 1.0,
                torch.tensor([seeds[i]]), len(node.tokens), True, backend="reference",
            )  # fmt: skip
            child = Node(world, node, int(ids[slot]), float(logp[slot]))
            before = node.judged if node.tokens else 0.0
            child.judged = float(rewards[slot])
            weights[i] += torch.logsumexp(logp + beta * rewards, 0) - beta * before
            nodes[i] = child
        shares = weights.softmax(0)
        if float(1 / (shares**2).sum()) < share * n and not all(node.ended for node in nodes):
            log_z += float(weights.logsumexp(0)) - math.log(n)
            points = (torch.arange(n, dtype=torch.float64) + chance.random()) / n
            nodes = [
                nodes[min(n - 1, int(i))] for i in torch.searchsorted(shares.cumsum(0), points)
            ]
            weights = torch.zeros(n, dtype=torch.float64)
    shares = weights.softmax(0).tolist()
    (drawn,) = chance.choices(range(n), shares)
    return nodes, shares, log_z + float(weights.logsumexp(0)) - math.log(n), drawn


def candidates(node: Node, back: int, k: int, reward: str) -> tuple[torch.Tensor, ...]:
    """The k most likely tokens behind a prefix: log π, rewards and ids; `reward` is "none", "text",
    or "tokens" for one that is a sum over them."""
    scores, world = node.logits().clone(), node.world
    if node.parent is None:
        scores[back] = -torch.inf
    logp, ids = scores.double().log_softmax(-1).sort(descending=True, stable=True)
    logp, ids, rewards = logp[:k], ids[:k], torch.zeros(k)
    if reward != "none":
        before = world.reward_of(node.tokens) if reward == "tokens" else 0.0
        texts = [node.tokens[:-1] if v == back else [*node.tokens, v] for v in ids.tolist()]
        rewards = torch.tensor([world.reward_of(text) - before for text in texts])
        if (ids != back).any():
            world.reward_tokens += node._run("read") + k
            world.rewards += k
    return logp, rewards, ids


def backtrack(
    world: World, seed: int, back: int, *, k: int, beta: float, most: int, reward: str = "text",
    do_sample: bool = True,
) -> tuple[Node, int, int]:  # fmt: skip
    """The text, the steps, and how many of them were taken back."""
    node, draws, steps, undone = world.root, Counter[int](), 0, 0
    while not node.ended and steps < most:
        place, fresh = len(node.tokens), node.options is None
        if node.options is None:
            node.options = candidates(node, back, k, reward)
        logp, rewards, ids = node.options
        i = draws[place]
        slot, _ = ops.ratio_sample(
            logp.float()[None], rewards.float()[None], ids[None], beta, 1.0,
            torch.tensor([seeds_of(seed, i + 1)[i] if i else seed]), place, do_sample,
            backend="reference",
        )  # fmt: skip
        draws[place] += 1
        steps += 1
        if int(ids[slot]) == back:
            assert node.parent is not None
            node, undone = node.parent, undone + 1
            continue
        node = Node(world, node, int(ids[slot]), float(logp[slot]))
        node.read = fresh and reward != "none"  # the scorer goes on with a candidate
    return node, steps, undone
