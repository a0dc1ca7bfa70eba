"""Sums of rewards, pairs and steering in CUDA graphs, by their emulation: the same as without."""

import pytest
import torch
import zoo
from test_graphs import assert_same_with_graph, cuda, guided  # noqa: F401

import rgtg_fast
from rgtg_fast import Reward, WeightedRewards

COLUMNS = ("rewards", "kl", "beta")


def a_sum(lm):
    head = rgtg_fast.RewardHead(lm, torch.randn(32, generator=torch.Generator().manual_seed(0)))
    weights = torch.tensor([1.0, -0.5, 2.0])
    return {
        "models": WeightedRewards([zoo.rm("llama"), zoo.rm("gpt2")], [0.7, weights]),
        "pair": (zoo.lm("gpt2"), zoo.lm("mistral")),
        "head": Reward(head).clamp(-1, 1) + 0.5 * Reward(zoo.rm("gemma3")),
        "ensemble": WeightedRewards(
            [zoo.rm("llama"), zoo.rm("gpt2")], reduction="pessimistic", penalty=0.5
        ),
    }


@pytest.mark.parametrize("kind", ["models", "pair", "head", "ensemble"])
def test_sums_are_captured(cuda, kind):  # noqa: F811
    lm = zoo.lm("llama")
    assert_same_with_graph(cuda, lm, a_sum(lm)[kind], do_sample=True)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": lambda t: 0.3 * t},
        {"kl_budget": 0.6, "beta": 5.0},
        {"kl_budget": 0.6, "beta": 5.0, "beta_schedule": lambda t: 1 / (1 + t), "temperature": 0.8},
    ],
)
def test_steering_is_captured(cuda, options):  # noqa: F811
    lm, rm = zoo.lm("llama"), zoo.rm("gpt2")
    want, got = assert_same_with_graph(cuda, lm, rm, do_sample=True, **options)
    torch.testing.assert_close(got.beta, want.beta, rtol=0, atol=0, equal_nan=True)
    cuda.log.clear()
    again = guided(lm, rm, do_sample=True, **options)
    assert torch.equal(again.sequences, want.sequences)


@pytest.mark.parametrize(
    ("part", "why"), [("text", "scoring by 'text'"), ("lazy", "scoring by 'lazy'")]
)
def test_what_runs_on_the_host_is_a_reason(cuda, part, why):  # noqa: F811
    options = {"max_new_tokens": 4, "cuda_graph": True, "check_nan": False}
    rm = zoo.rm("llama")
    if part == "text":
        rm = WeightedRewards(
            [rm, rgtg_fast.scorers.TextScorer(lambda t: [0.0] * len(t), Letters())]
        )
    else:
        options["min_entropy"] = 0.5
    with pytest.warns(UserWarning, match=f"cuda_graph=True has no effect: {why}"):
        rgtg_fast.generate(
            zoo.lm("llama"), **zoo.left_pad(zoo.prompts()), reward_model=rm, **options
        )


class Letters:
    """A tokenizer of ids as letters."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(0x100 + i) for i in ids)
