"""A scorer holds the text of the call that it serves: other threads' calls wait for their turn."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import tiny
import torch

import rgtg_fast
from rgtg_fast.scorers import AutoregressiveScorer, turns

THREADS, CALLS = 4, 5


def answers(lm, scorer, seed):
    options = {"k": 5, "beta": 1.0, "max_new_tokens": 6, "do_sample": True, "seed": seed}
    inputs = tiny.prompts(3 + seed % 5, 7, seed=seed)
    return rgtg_fast.generate(lm, **inputs, reward_model=scorer, **options).tolist()


def in_use(*scorers):
    gc.collect()  # a traceback holds the call that it is of
    return any(id(scorer) in turns._in_use for scorer in scorers)


def test_one_scorer_serves_many_threads():
    lm, scorer = tiny.llama_lm(), AutoregressiveScorer(tiny.gpt2_lm())
    seeds = range(THREADS * CALLS)
    want = [answers(lm, scorer, seed) for seed in seeds]
    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(lambda seed: answers(lm, scorer, seed), seeds))
    assert got == want


def test_sums_of_the_same_scorers_in_another_order_do_not_wait_for_each_other():
    lm = tiny.llama_lm()
    one, two = AutoregressiveScorer(tiny.gpt2_lm()), AutoregressiveScorer(tiny.llama_lm(seed=5))
    sums = [0.5 * one + two, two + 0.5 * one]
    want = answers(lm, sums[0], 0)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda i: answers(lm, sums[i % 2], 0), range(12), timeout=120))
    assert all(answer == want for answer in got) and not in_use(one, two)


@dataclass
class Unhashable(tiny.CountingScorer):
    """A dataclass compares by value, so it has no hash; it counts the calls that overlap."""

    weights: torch.Tensor
    inside: int = 0
    most: int = 0
    steps: int = 0
    prefills: int = 0
    committed: list = field(default_factory=list)

    def score(self, ids):
        self.inside += 1
        self.most = max(self.most, self.inside)
        rewards = super().score(ids)
        threading.Event().wait(0.001)  # lets other threads run
        self.inside -= 1
        return rewards


def test_calls_on_one_scorer_never_overlap():
    lm, scorer = tiny.llama_lm(), Unhashable(torch.zeros(tiny.vocab_size()))
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda seed: answers(lm, scorer, seed), range(THREADS)))
    assert scorer.most == 1 and scorer.prefills == THREADS
    assert not in_use(scorer)


def test_a_failed_call_lets_the_next_one_in():
    lm, scorer = tiny.llama_lm(), tiny.CountingScorer(torch.zeros(3))
    with pytest.raises(IndexError):
        answers(lm, scorer, 0)
    scorer.weights = torch.zeros(tiny.vocab_size())
    assert answers(lm, scorer, 0) and not in_use(scorer)


class Nested(tiny.CountingScorer):
    """Guides a text of its own, by `inner`, at each step."""

    def score(self, ids):
        answers(self.lm, self.inner or self, 1)
        return super().score(ids)


def test_a_call_within_the_call_that_a_scorer_serves_is_an_error():
    lm, scorer = tiny.llama_lm(), Nested(torch.randn(tiny.vocab_size()))
    scorer.lm, scorer.inner = lm, None
    with pytest.raises(ValueError, match=r"Nested serves the call .* scorer object of its own"):
        answers(lm, scorer, 0)
    assert not in_use(scorer)
    scorer.inner = tiny.CountingScorer(scorer.weights)
    assert answers(lm, scorer, 0) == answers(lm, scorer.inner, 0)
