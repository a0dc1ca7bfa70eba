"""Twisted sequential Monte Carlo: particles drawn by the ratio policy, weighed and resampled."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from ..decode import options as numbers
from ..decode.refill import Entry
from .best_of import chosen, raise_errors
from .checks import MOST_TEXTS, real
from .output import SequenceAnswer
from .run import Run
from .texts import Texts


def twisted_smc(
    model: Any,
    prompts: Iterable[Any],
    *,
    reward_model: Any,
    n: int = 16,
    k: int = 10,
    beta: float = 1.0,
    ess_threshold: float = 0.5,
    tokenizer: Any = None,
    **options: Any,
) -> Iterator[SequenceAnswer]:
    """Samples of the sequence-level target π(y | x) exp(β r(x, y)) / Z, exact in the limit of n.

    Twisted sequential Monte Carlo (Zhao et al., arXiv 2404.17546; as a particle filter
    Doucet & Johansen, 2009). The targets on the way are γ_t(y_1..t) = π(y_1..t | x)
    exp(β r(x, y_1..t)), the twist being the reward of the prefix, and γ_0 = 1. The proposal is the
    ratio policy q(v | y) ∝ π(v | y) exp(β r(x, y v)) over the k most likely tokens, so that a
    particle's weight is multiplied by

        γ_t / (γ_{t-1} q) = exp(-β r(x, y_1..t-1)) Σ_v π(v | y_1..t-1) exp(β r(x, y_1..t-1 v))

    (without the first factor at t = 1). A particle that has ended keeps its weight. Where the
    effective sample size (Σ w)² / Σ w² falls below `ess_threshold` n, n particles are drawn from
    them by systematic resampling, and weights are equal again. The product of the mean weights at
    these times and at the end is an unbiased estimate of Z = Σ_y π(y | x) exp(β r(x, y)), over the
    texts that candidates lead to: all of them, where k is the vocabulary.

    Args:
        model, prompts, reward_model, tokenizer, options: as for `best_of`. Particle j draws with
            row seed `ops.split_seed(seed, n)[j]`, whatever text it is.
        n: particles.
        k: candidates of a step, up to 64.
        beta: β, of the reward.
        ess_threshold: share of n, from 0 (never resample) to 1 (always, unless weights are equal).

    Returns:
        An iterator of a `SequenceAnswer` for each prompt, in their order: one particle, drawn by
        the weights; all of them, with `weight`, as `candidates`; and `log_z`.

    Raises:
        ValueError: as `best_of`.
    """
    n, k = numbers.integer("n", n, 1, MOST_TEXTS), numbers.integer("k", k, 1, 64)
    filter = _Filter(n, k, real("beta", beta), real("ess_threshold", ess_threshold))
    if not 0 <= filter.ess_threshold <= 1:
        raise ValueError(f"ess_threshold={ess_threshold!r}; pass a share from 0 to 1")
    run = Run(model, reward_model, tokenizer, options, k=k)
    return run.results(prompts, filter)


@dataclass(frozen=True)
class _Filter:
    """The numbers of the method, which make a decoder."""

    n: int
    k: int
    beta: float
    ess_threshold: float

    def __call__(self, texts: Texts, entry: Entry) -> SequenceAnswer:
        texts.join([entry])
        texts.select([0] * self.n)
        seeds = ops.split_seed(entry.seed, self.n)
        chance = random.Random(entry.seed)
        weights, log_z = [0.0] * self.n, 0.0  # logarithms, since the last resampling
        while running := [row for row, text in enumerate(texts.rows) if not text.ended]:
            gains = self._step(texts, running, seeds[running])
            raise_errors(texts)
            for row, gain in zip(running, gains, strict=True):
                weights[row] += gain
            shares, total = normalised(weights)
            size = 1 / math.fsum(share**2 for share in shares)
            if size < self.ess_threshold * self.n and not all(t.ended for t in texts.rows):
                log_z += total - math.log(self.n)
                ancestors = systematic(shares, chance.random())
                # Before they are copied: what copies have in common is run once.
                texts.advance([row for row in sorted(set(ancestors)) if not texts.rows[row].ended])
                texts.select(ancestors)
                weights = [0.0] * self.n
        shares, total = normalised(weights)
        (drawn,) = chance.choices(range(self.n), shares)
        answer = chosen(texts, drawn, shares)
        answer.log_z = log_z + total - math.log(self.n)
        return answer

    def _step(self, texts: Texts, rows: list[int], seeds: torch.Tensor) -> list[float]:
        """One token in each of these rows; the logarithms of what their weights gain."""
        texts.advance(rows)
        scores = texts.scores[rows]
        logprobs, ids = ops.topk_logprobs(scores, self.k, backend=texts.backend)
        rewards = texts.ask(rows, ids)
        slots, logq = ops.ratio_sample(
            logprobs,
            rewards.to(scores.device),
            ids,
            self.beta,
            1.0,
            seeds.to(scores.device),
            texts.positions(rows),
            True,
            backend=texts.backend,
        )
        texts.commit(rows, slots.clamp(min=0))
        gains = []
        columns = (x.double().cpu() for x in (logprobs, logq, rewards))
        for row, slot, token_ids, logp, log_ratio, reward in zip(
            rows, slots.tolist(), ids.tolist(), *columns, strict=True
        ):
            text = texts.rows[row]
            if slot < 0:
                if bool(logp.isnan().any()):
                    texts.fail(row, "the language model's logits contain NaN or +inf")
                text.ended = True  # without a candidate, and so without weight
                gains.append(-math.inf)
                continue
            before = text.reward if text.tokens and not texts.per_token else 0.0
            new = float(reward[slot])
            text.reward = text.reward + new if texts.per_token else new
            texts.add(row, [token_ids[slot]], [float(logp[slot])])
            text.unread = 0
            gains.append(float(logp[slot] - log_ratio[slot]) + self.beta * (new - before))
        return gains


def normalised(weights: Sequence[float]) -> tuple[list[float], float]:
    """Shares, of sum 1, of weights that are logarithms, and the logarithm of their sum;
    `ValueError` where all are 0."""
    top = max(weights)
    if top == -math.inf:
        raise ValueError(
            "no particle has a candidate that is possible: rewards and log-probs are -inf; pass a "
            "larger k or n, or check the reward model"
        )
    total = top + math.log(math.fsum(math.exp(w - top) for w in weights))
    return [math.exp(w - total) for w in weights], total


def systematic(shares: Sequence[float], offset: float) -> list[int]:
    """As many draws from shares as there are: i is drawn once for each (j + offset) / n in its part
    of [0, 1)."""
    n, end = len(shares), 0.0
    drawn: list[int] = []
    for i, share in enumerate(shares):
        end += share
        while len(drawn) < n and (len(drawn) + offset) / n < end:
            drawn.append(i)
    # The shares' sum may be a little below 1.
    return drawn + [n - 1] * (n - len(drawn))
