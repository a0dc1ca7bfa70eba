"""The paper's theorem by enumeration (arXiv 2406.07780): the ratio policy is the quotient of two
RLHF policies, those over prefixes of length i and i - 1."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import zoo
from oracle import lm_logits, public

import rgtg_fast

V, DEPTH, BETA = 7, 3, 1.3
TOKENS = tuple(range(1, V))  # PAD (0) has probability zero
PROMPT = torch.tensor([4, 2, 6, 6, 3])
Prefix = tuple[int, ...]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return zoo.build_lm("llama", vocab_size=V), zoo.build_rm("gpt2", vocab_size=V)


@pytest.fixture(scope="module")
def tree(models: Any) -> tuple[dict[Prefix, torch.Tensor], dict[Prefix, float]]:
    """log pi(. | x, y) [V] of every prefix shorter than DEPTH; r(x, y) of every prefix."""
    lm, rm = models
    logpi, reward = {}, {}
    with torch.no_grad():
        for length in range(DEPTH + 1):
            for y in itertools.product(TOKENS, repeat=length):
                ids = torch.cat([PROMPT, torch.tensor(y, dtype=torch.long)])
                reward[y] = float(public(rm)(ids[None]))
                if length < DEPTH:
                    logpi[y] = torch.log_softmax(lm_logits(lm, ids).double(), dim=-1)
    return logpi, reward


@pytest.fixture(scope="module")
def rlhf(tree: Any) -> list[dict[Prefix, float]]:
    """For i = 0..DEPTH: pi_i(y_1..i) = pi(y_1..i) exp(beta r(x, y_1..i)) / Z_i of every prefix."""
    logpi, reward = tree
    policies = []
    for i in range(DEPTH + 1):
        prefixes = list(itertools.product(TOKENS, repeat=i))
        weight = torch.tensor(
            [sum(float(logpi[y[:t]][y[t]]) for t in range(i)) + BETA * reward[y] for y in prefixes],
            dtype=torch.float64,
        ).exp()
        policies.append(dict(zip(prefixes, (weight / weight.sum()).tolist(), strict=True)))
    return policies


def ratio_policy(rlhf: list[dict[Prefix, float]], y: Prefix) -> torch.Tensor:
    """pi_i(y, v) / pi_{i-1}(y) over v in TOKENS, normalised."""
    i = len(y) + 1
    ratio = torch.tensor([rlhf[i][(*y, v)] / rlhf[i - 1][y] for v in TOKENS], dtype=torch.float64)
    return ratio / ratio.sum()


def prefixes_to_extend() -> list[Prefix]:
    return [y for i in range(DEPTH) for y in itertools.product(TOKENS, repeat=i)]


def test_ratio_of_rlhf_policies_is_the_tilted_next_token_policy(tree: Any, rlhf: Any) -> None:
    """pi_i / pi_{i-1} = c(y_<i) pi(v | y_<i) exp(beta r(y_<i, v)), c free of v."""
    logpi, reward = tree
    for y in prefixes_to_extend():
        i = len(y) + 1
        factors = torch.tensor(
            [
                rlhf[i][(*y, v)]
                / rlhf[i - 1][y]
                / float((logpi[y][v] + BETA * reward[(*y, v)]).exp())
                for v in TOKENS
            ]
        )
        assert factors.max() / factors.min() == pytest.approx(1.0, rel=1e-6)


def run(models: Any, **options: Any) -> Any:
    batch = zoo.left_pad([PROMPT])
    return rgtg_fast.generate(
        models[0], **batch, reward_model=models[1], k=V, beta=BETA, do_sample=True, top_k=0,
        temperature=1.0, num_return_sequences=400, max_new_tokens=DEPTH, seed=8,
        return_dict_in_generate=True, output_candidates=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["tree", "expand", "reencode"])
def test_generate_follows_the_ratio_of_rlhf_policies(models: Any, rlhf: Any, method: str) -> None:
    out = run(models, reward_method=method)
    answers = out.sequences[:, len(PROMPT) :]
    logq = torch.log_softmax(out.candidate_logprobs.double() + BETA * out.candidate_rewards, -1)
    seen = set()
    for b, t in itertools.product(range(len(answers)), range(DEPTH)):
        y = tuple(answers[b, :t].tolist())
        if y in seen:
            continue
        seen.add(y)
        by_id = dict(zip(out.candidate_ids[b, t].tolist(), logq[b, t].exp().tolist(), strict=True))
        ours = torch.tensor([by_id[v] for v in TOKENS], dtype=torch.float64)
        assert by_id[0] == 0.0
        torch.testing.assert_close(ours, ratio_policy(rlhf, y), rtol=1e-4, atol=1e-6)
    assert len(seen) > 30  # of 43 prefixes


def test_kl_is_that_of_the_ratio_policy_from_the_base(models: Any, tree: Any, rlhf: Any) -> None:
    logpi, _ = tree
    out = run(models)
    answers = out.sequences[:, len(PROMPT) :].tolist()
    for b, t in itertools.product(range(0, 400, 10), range(DEPTH)):
        y = tuple(answers[b][:t])
        q = ratio_policy(rlhf, y)
        kl = float((q * (q.log() - logpi[y][list(TOKENS)])).sum())
        assert float(out.kl[b, t]) == pytest.approx(kl, abs=1e-4)
