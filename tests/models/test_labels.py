"""Reward models with several labels, and heads on models that pool."""

import pytest
import tiny
import torch
import zoo
from torch import nn

import rgtg_fast


def guided(lm, rm, **options):
    call = {**zoo.left_pad(zoo.prompts()), "k": 4, "max_new_tokens": 4}
    call |= {"return_dict_in_generate": True}
    return rgtg_fast.generate(lm, reward_model=rm, **(call | options))


@pytest.mark.parametrize(
    ("problem", "reward"),
    [
        (None, lambda logits: logits.log_softmax(-1)),
        ("multi_label_classification", nn.functional.logsigmoid),
        ("regression", lambda logits: logits),
    ],
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_reward_is_the_public_logits_of_the_label(name, problem, reward):
    rm = zoo.build_rm(name, num_labels=3, problem_type=problem)
    out = guided(zoo.lm("llama"), rm, reward_label=1)
    for row, prompt in enumerate(zoo.prompts()):
        ids = torch.cat([prompt, out.sequences[row, -4:]])
        with torch.no_grad():
            logits = rm(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits
        torch.testing.assert_close(out.rewards[row, -1], reward(logits)[0, 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_likelihood_of_what_a_model_of_one_number_judges(name):
    rm = zoo.build_rm(name)
    out = guided(zoo.lm("llama"), rgtg_fast.presets.cd_fudge(rm)["reward_model"])
    want = guided(zoo.lm("llama"), rm, beta=0.0)
    assert (out.rewards < 0).all() and (want.rewards > 0).any()
    for row, prompt in enumerate(zoo.prompts()):
        ids = torch.cat([prompt, out.sequences[row, -4:]])
        with torch.no_grad():
            logit = rm(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, 0]
        reward = nn.functional.logsigmoid(logit)
        torch.testing.assert_close(out.rewards[row, -1], reward, rtol=1e-3, atol=1e-3)


def test_a_label_may_be_named():
    rm = zoo.build_rm("llama", num_labels=2)
    rm.config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
    lm = zoo.lm("llama")
    by_name, by_index = (guided(lm, rm, reward_label=label) for label in ("POSITIVE", 1))
    assert torch.equal(by_name.rewards, by_index.rewards)
    with pytest.raises(ValueError, match=r"'GOOD' is none of the labels.*NEGATIVE, POSITIVE"):
        guided(lm, rm, reward_label="GOOD")
    with pytest.raises(ValueError, match=r"2 labels.*NEGATIVE, POSITIVE.*reward_label="):
        guided(lm, rm)


def test_a_label_of_a_model_with_one_number_is_refused():
    with pytest.raises(ValueError, match="reward_label=0 is for a model with several labels"):
        guided(zoo.lm("llama"), zoo.rm("llama"), reward_label=0)


def test_a_head_on_a_model_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match=r"reward_head.*is no causal model"):
        guided(zoo.lm("llama"), zoo.rm("bert"), reward_head=nn.Linear(32, 1))


def test_a_head_on_a_causal_model_is_taken():
    rm = tiny.llama_rm()
    got = guided(tiny.llama_lm(), rm, reward_head=rm.score)
    assert torch.equal(got.rewards, guided(tiny.llama_lm(), rm).rewards)
