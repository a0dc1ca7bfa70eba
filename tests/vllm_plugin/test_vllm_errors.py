"""What the plug-in refuses, and what it says then."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from vllm_fakes import Job, RunnerV1, config, params

from rgtg_fast.demo.run import ASSETS
from rgtg_fast.vllm import RewardGuided
from rgtg_fast.vllm.settings import settings_of

CPU = torch.device("cpu")
LM = str(ASSETS / "lm")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"rgtg_bet": 1.0}, "did you mean rgtg_beta"),
        ({"rgtg": "maybe"}, "rgtg='maybe'"),
        ({"rgtg_k": 0}, "rgtg_k=0 is out of range"),
        ({"rgtg_k": 65}, "rgtg_k=65 is out of range"),
        ({"rgtg_k": 3.0}, "rgtg_k must be an int"),
        ({"rgtg_k": True}, "rgtg_k must be an int"),
        ({"rgtg_beta": float("inf")}, "rgtg_beta=inf"),
        ({"rgtg_beta": "2"}, "rgtg_beta='2'"),
        ({"rgtg_beta": [1.0]}, "rgtg_beta="),
        ({"rgtg_seed": 2**63}, "rgtg_seed="),
        ({"rgtg_seed": 1, "n": 2}, "pass seed="),
        ({"rgtg_draw": "hf"}, "rgtg_draw='hf'"),
        ({"rgtg_draw": ["rgtg"]}, "rgtg_draw="),
        ({"rgtg_draw": "rgtg"}, "there is none; pass seed="),
        ({"rgtg_preset": "rad"}, "rgtg_preset='rad'; pass one of pargs"),
        ({"rgtg_preset": ["pargs"]}, "rgtg_preset="),
        ({"rgtg_preset": "pargs_greedy"}, "pass temperature=0.0"),
        ({"rgtg_preset": "args_stochastic"}, "pass temperature=0.7"),
        ({"rgtg_preset": "pargs", "top_p": 0.9}, "pass top_p=1.0"),
        ({"rgtg_preset": "pargs", "top_k": 50}, "pass top_k=0"),
    ],
)
def test_a_request_that_asks_for_what_cannot_be_is_refused(own, said):
    with pytest.raises(ValueError, match=said):
        RewardGuided.validate_params(params(**own))


def test_penalties_are_refused_where_they_would_do_nothing():
    own = params(seed=1)
    own.frequency_penalty = 0.5
    with pytest.raises(ValueError, match=r"frequency_penalty=0\.5 .* rgtg_draw"):
        RewardGuided.validate_params(own)
    for extra in ({"rgtg_draw": "vllm"}, {"rgtg": False}, {"rgtg": 0}, {"rgtg": "false"}):
        own.extra_args = extra
        RewardGuided.validate_params(own)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"reward_modle": "x"}, "did you mean reward_model"),
        ({"reward_model": "x", "k": 65}, "k=65 is out of range"),
        ({"reward_model": "x", "beta": "1"}, "beta='1'"),
        ({"reward_model": "x", "kv_gib": 0}, "kv_gib=0"),
        ({"reward_model": "x", "draw": "own"}, "draw='own'"),
        ({"reward_model": "x", "reward_kind": "args"}, "reward_kind='args'"),
        ({"reward_model": "x", "reward_kind": "seq2seq"}, "reward_kind='seq2seq'"),
        ({"reward_model": "x", "guide": 1}, "guide=1"),
        ({"reward_model": ["x"]}, "list of two"),
        ({"reward_model": {"modle": "x"}}, "a mapping with one of"),
        ({"reward_model": {"model": LM, "kind": "head"}}, "hidden states, which vLLM does not"),
        ({"reward_model": {"parts": [LM, {"model": LM, "kind": "seq2seq"}]}}, "rewrites a draft"),
        ({"reward_model": LM, "preset": "parks"}, "preset='parks'"),
        ({"reward_model": LM, "preset": "dexperts"}, "preset dexperts, with 1 models"),
        ({"reward_model": LM, "preset": "cd_q"}, "needs the weights of heads"),
        ({}, "reward_model=None"),
        (None, "--additional-config"),
    ],
)
def test_options_of_the_engine_are_checked_by_name(own, said):
    with pytest.raises(ValueError, match=said):
        settings_of({} if own is None else {"rgtg": own})


def test_a_reward_model_with_too_few_positions_is_refused(folders):
    lm = tiny.llama_lm()
    with pytest.raises(ValueError, match="--max-model-len 64"):
        RewardGuided(config(lm, folders["gpt2"][0], max_len=65), CPU, False)


def test_a_reward_model_with_other_tokens_is_refused(tmp_path):
    tiny.llama_rm(vocab_size=700).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="700 tokens and the language model"):
        RewardGuided(config(tiny.llama_lm(), str(tmp_path)), CPU, False)


def test_a_budget_that_does_not_hold_one_request_is_refused(folders):
    with pytest.raises(ValueError, match=r"pass kv_gib>="):
        RewardGuided(config(tiny.llama_lm(), folders["llama"][0], kv_gib=1e-5), CPU, False)


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("genarm", "whole vocabulary.* pass k=64"),
        (
            {"name": "nash_md"},
            "k=10 and beta=0.1429, and have requests pass temperature=1.143",
        ),
    ],
)
def test_a_preset_that_no_request_could_follow_is_refused(folders, preset, said):
    own = {"k": 10} if preset != "genarm" else {}
    settings = config(tiny.llama_lm(), folders["policy"][0], preset=preset, **own)
    with pytest.raises(ValueError, match=said):
        RewardGuided(settings, CPU, False)


def test_a_reward_model_that_lacks_its_head_is_refused(folders):
    # transformers would draw a head at random.
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .*score.weight"):
        RewardGuided(config(tiny.llama_lm(), folders["policy"][0]), CPU, False)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no model at '/nowhere'"):
        RewardGuided(config(tiny.llama_lm(), "/nowhere"), CPU, False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: setattr(c, "speculative_config", object()), "--speculative-config"),
        (lambda c: setattr(c.model_config, "enable_prompt_embeds", True), "embeddings"),
    ],
)
def test_engines_whose_tokens_it_cannot_see_are_refused(folders, change, said):
    settings = config(tiny.llama_lm(), folders["llama"][0])
    change(settings)
    with pytest.raises(ValueError, match=said):
        RewardGuided(settings, CPU, False)


def test_placeholders_of_outputs_are_an_error(folders):
    runner = RunnerV1(tiny.llama_lm(), config(tiny.llama_lm(), folders["llama"][0]))
    job = Job([5, 6], 4, params(0.0))
    runner.step(coming=[job])
    job.outputs[-1] = -1
    with pytest.raises(RuntimeError, match="--logits-processors"):
        runner.processor.apply(torch.zeros(1, tiny.vocab_size()))


def test_logits_without_a_possible_token_are_an_error(folders):
    runner = RunnerV1(tiny.llama_lm(), config(tiny.llama_lm(), folders["llama"][0]))
    runner.step(coming=[Job([5, 6], 4, params(0.0))])
    for value in (torch.nan, -torch.inf):
        with pytest.raises(RuntimeError, match="no candidate of a guided request"):
            runner.processor.apply(torch.full((1, tiny.vocab_size()), value))


def test_several_rows_of_a_request_are_an_error(folders):
    states = SimpleNamespace(device=CPU, prompt_len=SimpleNamespace(np=[2]))
    own = RewardGuided(config(tiny.llama_lm(), folders["llama"][0]), states)
    own.add_request(0, params(0.0))
    ctx = SimpleNamespace(expanded_idx_mapping=torch.zeros(2), idx_mapping_np=[0])
    with pytest.raises(RuntimeError, match="speculative"):
        own.apply(torch.zeros(2, tiny.vocab_size()), ctx)
