"""Sums of rewards, pairs and steering in CUDA graphs, by their emulation: the same as without."""

import pytest
import torch
import zoo
from test_graphs import assert_same_with_graph, cuda, guided  # noqa: F401

import rgtg_fast
from rgtg_fast import Reward, WeightedRewards
from rgtg_fast.scorers import AutoregressiveScorer, LogprobScorer, VocabRewardScorer

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


@pytest.mark.parametrize("options", [{"k": None}, {"k": 4, "candidates": "sum"}])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("kind", [AutoregressiveScorer, VocabRewardScorer, LogprobScorer])
def test_the_whole_vocabulary_is_captured(cuda, options, do_sample, kind):  # noqa: F811
    def run(**more):
        scorer = kind(zoo.lm("gpt2")) - 0.5 * AutoregressiveScorer(zoo.lm("mistral"))
        fixed = {"do_sample": do_sample, "output_candidates": False, "beta": 2.0} | options
        return guided(zoo.lm("llama"), scorer, **fixed, **more)

    want = run(cuda_graph=False)
    got = run()
    assert len(cuda.captures) == 1 and cuda.replays > 0
    assert torch.equal(got.sequences, want.sequences)
    for name in ("rewards", "kl"):
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)


def test_a_kept_graph_is_of_the_same_candidates_and_nucleus(cuda):  # noqa: F811
    fixed = {"do_sample": True, "output_candidates": False}
    for options in (
        {},
        {"candidates": "sum"},
        {"guided_top_p": 0.5},
        {"guided_top_p": 0.8},
        {"k": 1},
        {"k": None},
    ):
        scorer = AutoregressiveScorer(zoo.lm("gpt2"))
        want = guided(zoo.lm("llama"), scorer, cuda_graph=False, **fixed | options)
        got = guided(zoo.lm("llama"), scorer, **fixed | options)
        assert torch.equal(got.sequences, want.sequences), options
    assert len(cuda.captures) == 6


def test_a_nucleus_of_candidates_is_captured_and_one_of_all_is_not(cuda):  # noqa: F811
    lm, rm, pair = zoo.lm("llama"), zoo.rm("llama"), (zoo.lm("gpt2"), zoo.lm("mistral"))
    assert_same_with_graph(cuda, lm, rm, do_sample=True, guided_top_p=0.6)
    options = {"k": None, "guided_top_p": 0.6, "do_sample": True, "max_new_tokens": 4}
    with pytest.warns(UserWarning, match="no effect: guided_top_p= of the whole vocabulary"):
        rgtg_fast.generate(
            lm,
            **zoo.left_pad(zoo.prompts()),
            reward_model=pair,
            cuda_graph=True,
            check_nan=False,
            **options,
        )


@pytest.mark.parametrize("lm", ["llama", "gpt2"])
def test_rewards_of_next_tokens_from_the_states_of_the_language_model(cuda, lm):  # noqa: F811
    lm = zoo.lm(lm)
    size = lm.config.get_text_config().hidden_size
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(size, 16), torch.nn.Linear(16, zoo.VOCAB))
    head = rgtg_fast.VocabHead(lm, [0.3 * torch.randn(zoo.VOCAB, size), mlp], torch.randn(size))
    assert_same_with_graph(cuda, lm, head, do_sample=True)
    options = {"do_sample": True, "eos_token_id": list(range(3, 30)), "num_return_sequences": 3}
    for sync_every in (2, 3):
        options |= {"sync_every": sync_every, "return_dict_in_generate": False}
        want = guided(lm, head, cuda_graph=False, **options)
        assert torch.equal(guided(lm, head, **options), want)
