"""Where a reward is one linear head, a step ends in one op, and gives the same bit for bit."""

import pytest
import tiny
import torch

import rgtg_fast
from rgtg_fast.decode.ratio_policy import RatioPolicy
from rgtg_fast.scorers.tree import SiblingScorer

COLUMNS = ("sequences", "rewards", "kl", "candidate_rewards")


@pytest.fixture
def epilogues(monkeypatch):
    """How many steps ended in `ops.ratio_step`."""
    seen = []
    step = RatioPolicy.step
    monkeypatch.setattr(RatioPolicy, "step", lambda *a: seen.append(1) or step(*a))
    return seen


def guided(lm, rm, **options):
    common = {"k": 6, "beta": 1.5, "max_new_tokens": 8, "seed": 3, "output_candidates": True}
    common |= {"return_dict_in_generate": True, "top_k": 0, **tiny.prompts(5, 9, 3)}
    common["speculate"] = False  # a round scores several positions, without this op
    return rgtg_fast.generate(lm, reward_model=rm, **(common | options))


def rewards(kind, lm):
    if kind == "classifier":
        return tiny.llama_rm(eos_token_id=None, pad_token_id=None)
    return rgtg_fast.RewardHead(lm, torch.randn(32, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("kind", ["classifier", "head"])
def test_one_op_gives_what_the_two_give(epilogues, monkeypatch, kind, do_sample):
    lm = tiny.llama_lm()
    one = guided(lm, rewards(kind, lm), do_sample=do_sample)
    assert len(epilogues) == one.rewards.shape[1]
    monkeypatch.setattr(SiblingScorer, "is_linear", lambda *_: False)
    two = guided(lm, rewards(kind, lm), do_sample=do_sample)
    assert len(epilogues) == one.rewards.shape[1]
    for name in COLUMNS:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, equal_nan=True)


def test_a_bias_is_part_of_it(epilogues):
    lm, weight = tiny.llama_lm(), torch.randn(32, generator=torch.Generator().manual_seed(0))
    plain = guided(lm, rgtg_fast.RewardHead(lm, weight))
    shifted = guided(lm, rgtg_fast.RewardHead(lm, weight, bias=2.0))
    assert epilogues and torch.equal(plain.sequences, shifted.sequences)
    torch.testing.assert_close(plain.rewards + 2, shifted.rewards, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {"eos_reward": "previous", "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD},
        {"reward_range": (-1.0, 1.0)},
        {"reward_method": "expand"},
    ],
)
def test_not_where_rewards_are_more_than_the_head(epilogues, options):
    guided(tiny.llama_lm(), tiny.llama_rm(), **options)
    assert not epilogues


def test_not_where_the_head_is_more_than_linear(epilogues):
    lm = tiny.llama_lm()
    head = torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    guided(lm, rgtg_fast.RewardHead(lm, head))
    assert not epilogues
