"""Sampled sequences against the exact distribution of the ratio policy, enumerated by full
forwards: a chi-square test over whole answers, one fixed seed each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from chi_square import chi_square_p
from oracle import lm_logits, public
from transformers import TopPLogitsWarper

import rgtg_fast

V, EOS = 8, 1
DRAWS = 4000
PROMPTS = [torch.tensor([3, 5, 2, 7, 4]), torch.tensor([6, 2])]
Processor = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module", params=["llama-gpt2", "gpt2-mpt"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """An LM and an RM (one scored by `tree`, one by `expand`) over eight tokens."""
    lm, rm = request.param.split("-")
    return zoo.build_lm(lm, vocab_size=V), zoo.build_rm(rm, vocab_size=V)


@torch.no_grad()
def enumerate_answers(
    lm: Any, rm: Any, prompt: torch.Tensor, steps: int, k: int, beta: float,
    temperature: float, process: Processor = lambda logits: logits,
) -> dict[tuple[int, ...], float]:  # fmt: skip
    """Probability of every answer of at most `steps` tokens (shorter ones end in EOS)."""
    reward = public(rm)

    def grow(answer: tuple[int, ...], p: float) -> dict[tuple[int, ...], float]:
        if len(answer) == steps or EOS in answer:
            return {answer: p}
        ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.long)])
        logits = process(lm_logits(lm, ids))
        cand = torch.argsort(logits, descending=True, stable=True)[:k]
        logp = torch.log_softmax(logits.double(), -1)[cand]
        rewards = reward(torch.cat([ids.expand(k, -1), cand[:, None]], dim=1)).double()
        q = torch.softmax((logp + beta * rewards) / temperature, dim=-1)
        out: dict[tuple[int, ...], float] = {}
        for token, weight in zip(cand.tolist(), q.tolist(), strict=True):
            if weight > 0:
                out |= grow((*answer, token), p * weight)
        return out

    return grow((), 1.0)


def draw(lm: Any, rm: Any, prompts: list[torch.Tensor], **options: Any) -> list[Counter]:
    """One Counter of answers per prompt, `DRAWS` answers each."""
    batch = zoo.left_pad(prompts)
    options = {"beta": 1.0, "top_k": 0, "do_sample": True, "eos_token_id": EOS} | options
    out = rgtg_fast.generate(lm, **batch, reward_model=rm, num_return_sequences=DRAWS, **options)
    answers = out[:, batch["input_ids"].shape[1] :].view(len(prompts), DRAWS, -1)
    counts = []
    for rows in answers.tolist():
        cut = [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
        counts.append(Counter(tuple(row) for row in cut))
    return counts


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize(
    ("k", "steps", "beta", "temperature"),
    [(4, 3, 1.0, 1.0), (V, 2, 1.0, 1.0), (4, 3, 2.0, 0.6), (3, 3, 0.5, 1.7), (5, 2, -1.0, 1.0)],
)
def test_answers_follow_the_ratio_policy(
    pair: Any, k: int, steps: int, beta: float, temperature: float
) -> None:
    probs = enumerate_answers(*pair, PROMPTS[0], steps, k, beta, temperature)
    assert sum(probs.values()) == pytest.approx(1.0)
    (counts,) = draw(
        *pair, PROMPTS[:1], k=k, beta=beta, temperature=temperature, max_new_tokens=steps, seed=3
    )
    assert chi_square_p(counts, probs) > 1e-4


def test_the_test_has_power(pair: Any) -> None:
    """The same draws do not fit a policy with a beta a third larger."""
    probs = enumerate_answers(*pair, PROMPTS[0], 3, 4, 1.33, 1.0)
    (counts,) = draw(*pair, PROMPTS[:1], k=4, max_new_tokens=3, seed=3)
    assert chi_square_p(counts, probs) < 1e-4


def test_top_p_shapes_the_candidates_and_their_logprobs(pair: Any) -> None:
    warper = TopPLogitsWarper(top_p=0.8)

    def process(logits: torch.Tensor) -> torch.Tensor:
        return warper(torch.empty(1, 0), logits[None])[0]

    probs = enumerate_answers(*pair, PROMPTS[0], 3, 5, 1.0, 0.9, process)
    (counts,) = draw(
        *pair, PROMPTS[:1], k=5, top_p=0.8, temperature=0.9, max_new_tokens=3, seed=4
    )  # fmt: skip
    assert chi_square_p(counts, probs) > 1e-4


def test_each_row_has_its_own_beta_and_temperature(pair: Any) -> None:
    betas, temperatures = torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.8])
    counts = draw(
        *pair, PROMPTS, k=4, beta=betas, temperature=temperatures, max_new_tokens=2, seed=5
    )
    for i, prompt in enumerate(PROMPTS):
        beta, temperature = float(betas[i]), float(temperatures[i])
        probs = enumerate_answers(*pair, prompt, 2, 4, beta, temperature)
        assert chi_square_p(counts[i], probs) > 1e-4


def test_seed_none_draws_from_the_policy_too(pair: Any) -> None:
    torch.manual_seed(0)
    probs = enumerate_answers(*pair, PROMPTS[1], 3, 4, 1.0, 1.0)
    (counts,) = draw(*pair, PROMPTS[1:], k=4, max_new_tokens=3)
    assert chi_square_p(counts, probs) > 1e-4
