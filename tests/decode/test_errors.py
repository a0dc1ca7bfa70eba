"""Bad input: a ValueError that names the argument and what came, before any model runs."""

import contextlib
import functools
import re

import pytest
import tiny
import torch
from calls import guided as call
from transformers import (
    GenerationConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)

import rgtg_fast
from rgtg_fast.scorers.registry import KINDS

V = tiny.vocab_size()
NAN, INF = float("nan"), float("inf")
guided = functools.partial(call, **tiny.prompts(5, 9), max_new_tokens=4)


@contextlib.contextmanager
def refused(words, *models):
    """A ValueError with all the words in it, and no forward pass of the models before it."""
    ran = []
    hooks = [
        m.get_input_embeddings().register_forward_pre_hook(lambda module, args: ran.append(module))
        for m in models
        if isinstance(m, torch.nn.Module)
    ]
    try:
        with pytest.raises(ValueError) as caught:
            yield
    finally:
        for hook in hooks:
            hook.remove()
    message = str(caught.value)
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?![\w])", message), f"{word!r}: {message}"
    assert not ran, f"a model ran before: {message}"


# name: (changed arguments, words the message must have)
MODES = {
    "beams": ({"num_beams": 3}, ["num_beams", "3"]),
    "beams in config": (
        {"generation_config": GenerationConfig(num_beams=3)},
        ["num_beams", "3"],
    ),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, ["prompt_lookup_num_tokens", "3"]),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, ["penalty_alpha", "0.6"]),
    "dola": ({"dola_layers": "high"}, ["dola_layers", "high"]),
    "constraints": ({"constraints": ["x"]}, ["constraints"]),
    "token healing": ({"token_healing": True}, ["token_healing", "True"]),
    "force words": ({"force_words_ids": [[5]]}, ["force_words_ids"]),
    "custom_generate": ({"custom_generate": lambda model, ids: ids}, ["custom_generate"]),
}

NUMBERS = {
    "k zero": ({"k": 0}, ["k", "0"]),
    "k negative": ({"k": -4}, ["k", "-4"]),
    "k above the kernels' limit": ({"k": 65}, ["k", "65", "64"]),
    "k float": ({"k": 2.5}, ["k", "2.5"]),
    "k string": ({"k": "10"}, ["k", "10"]),
    "beta nan": ({"beta": NAN}, ["beta", "nan"]),
    "beta inf": ({"beta": INF}, ["beta", "inf"]),
    "beta string": ({"beta": "2"}, ["beta", "2"]),
    "beta None": ({"beta": None}, ["beta", "None"]),
    "beta of 3 rows": ({"beta": torch.tensor([1.0, 2.0, 3.0])}, ["beta", "3", "2"]),
    "beta 2-D": ({"beta": torch.ones(2, 1)}, ["beta"]),
    "beta row nan": ({"beta": torch.tensor([1.0, NAN])}, ["beta", "nan"]),
    "temperature zero": ({"temperature": 0.0, "do_sample": True}, ["temperature", "0.0"]),
    "temperature negative": ({"temperature": -1.5, "do_sample": True}, ["temperature", "-1.5"]),
    "temperature nan": ({"temperature": NAN, "do_sample": True}, ["temperature", "nan"]),
    "temperature of 3 rows": (
        {"temperature": torch.ones(3), "do_sample": True},
        ["temperature", "3", "2"],
    ),
    "temperature row zero": (
        {"temperature": torch.tensor([1.0, 0.0]), "do_sample": True},
        ["temperature"],
    ),
    "top_p": ({"top_p": 1.5, "do_sample": True}, ["top_p", "1.5"]),
    "top_p negative": ({"top_p": -0.5, "do_sample": True}, ["top_p", "-0.5"]),
    "seed float": ({"seed": 1.5}, ["seed", "1.5"]),
    "seed string": ({"seed": "a"}, ["seed", "a"]),
    "seed of 3 rows": ({"seed": torch.arange(3)}, ["seed", "3", "2"]),
    "seed float tensor": ({"seed": torch.ones(2)}, ["seed", "float32"]),
    "generator": ({"generator": torch.Generator()}, ["generator", "seed"]),
    "no new tokens": ({"max_new_tokens": 0}, ["max_new_tokens", "0"]),
}

CHOICES = {
    "eos_reward": ({"eos_reward": "skip"}, ["eos_reward", "skip", "hidden", "previous"]),
    "reward_method": (
        {"reward_method": "fast"},
        ["reward_method", "fast", "tree", "expand", "reencode"],
    ),
    "backend": ({"backend": "cutlass"}, ["backend", "cutlass", "reference", "cpp"]),
    "misspelt beta": ({"bta": 1.0}, ["bta", "beta"]),
    "misspelt max_new_tokens": ({"max_new_token": 4}, ["max_new_token", "max_new_tokens"]),
    "misspelt reward_method": ({"reward_metod": "tree"}, ["reward_metod", "reward_method"]),
    "unknown keyword": ({"zzqx": 4}, ["zzqx"]),
}


def ids_with(value):
    ids = tiny.prompts(5, 9)["input_ids"]
    ids[1, 3] = value
    return ids


def right_padded():
    inputs = tiny.prompts(5, 9)
    return {name: t.flip(1) for name, t in inputs.items()}


PROMPTS = {
    "1-D": ({"input_ids": torch.arange(5, 9), "attention_mask": None}, ["input_ids", "4"]),
    "3-D": ({"input_ids": torch.ones(2, 3, 4).long(), "attention_mask": None}, ["input_ids"]),
    "list": ({"input_ids": [[5, 6], [7, 8]], "attention_mask": None}, ["input_ids", "list"]),
    "no tokens": (
        {"input_ids": torch.ones(2, 0).long(), "attention_mask": None},
        ["input_ids"],
    ),
    "no rows": ({"input_ids": torch.ones(0, 4).long(), "attention_mask": None}, ["input_ids"]),
    "float": ({"input_ids": torch.ones(2, 9)}, ["input_ids", "float32"]),
    "negative id": ({"input_ids": ids_with(-7)}, ["input_ids", "-7"]),
    "id past the vocabulary": ({"input_ids": ids_with(V)}, ["input_ids", str(V)]),
    "inputs named in the error": (
        {"inputs": ids_with(V + 3), "input_ids": None},
        [str(V + 3)],
    ),
    "none": ({"input_ids": None, "attention_mask": None}, ["input_ids"]),
    "right padding": (right_padded(), ["left"]),
    "right padding without mask": (right_padded() | {"attention_mask": None}, ["left"]),
    "mask of another length": ({"attention_mask": torch.ones(2, 8).long()}, ["attention_mask"]),
    "mask of another batch": ({"attention_mask": torch.ones(3, 9).long()}, ["attention_mask"]),
    "row of padding only": (
        {"attention_mask": torch.tensor([[0] * 9, [1] * 9])},
        ["attention_mask", "0"],
    ),
    "ids for the reward of another batch": (
        {"reward_input_ids": torch.ones(3, 4).long()},
        ["reward_input_ids", "3", "2"],
    ),
    "float ids for the reward": ({"reward_input_ids": torch.ones(2, 4)}, ["reward_input_ids"]),
    "ids for the reward past its vocabulary": (
        {"reward_input_ids": torch.full((2, 4), V)},
        ["reward_input_ids", str(V)],
    ),
    "right padding for the reward": (
        {
            "reward_input_ids": torch.ones(2, 3).long(),
            "reward_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        },
        ["reward_attention_mask", "left"],
    ),
    "mask for the reward of another length": (
        {
            "reward_input_ids": torch.ones(2, 3).long(),
            "reward_attention_mask": torch.ones(2, 4).long(),
        },
        ["reward_attention_mask"],
    ),
    "mask for the reward without its ids": (
        {"reward_attention_mask": torch.ones(2, 9).long()},
        ["reward_attention_mask", "reward_input_ids"],
    ),
    "both inputs and input_ids": ({"inputs": ids_with(5)}, ["input_ids"]),
}

CASES = MODES | NUMBERS | CHOICES | PROMPTS


@pytest.mark.parametrize("case", CASES)
def test_refused_before_any_forward(case, lm, rm):
    changes, words = CASES[case]
    with refused(words, lm, rm):
        guided(lm, rm, **changes)


@pytest.mark.parametrize(
    "own, options, words",
    [
        ({}, {"num_beams": 3}, ["num_beams", "3"]),
        ({"k": 0}, {}, ["k", "0"]),
        ({"beta": NAN}, {}, ["beta", "nan"]),
        ({"reward_method": "fast"}, {}, ["reward_method", "tree"]),
        ({}, {"prompt_lookup_num_tokens": 3}, ["prompt_lookup_num_tokens"]),
    ],
    ids=["beams", "k", "beta", "method", "lookup"],
)
def test_reward_guided_refuses_the_same(own, options, words, lm, rm):
    with refused(words, lm, rm):
        guide = rgtg_fast.RewardGuided(rm, **own)
        lm.generate(**tiny.prompts(5, 9), max_new_tokens=4, custom_generate=guide, **options)


def test_continuous_batching(rm, monkeypatch):
    """Hugging Face leaves for another loop before it looks at a custom one."""
    lm = tiny.llama_lm()
    # The real one takes nearly all memory for its cache.
    monkeypatch.setattr(lm, "generate_batch", lambda **kwargs: {})
    with refused(["cache_implementation", "paged"], lm, rm):
        guided(lm, rm, cache_implementation="paged")


def test_text_streamer_takes_one_row(lm, rm):
    with refused(["batch", "1"], lm, rm):
        guided(lm, rm, streamer=TextStreamer(tiny.tokenizer()))


def test_encoder_decoder_model(rm):
    config = T5Config(
        vocab_size=V,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    t5 = T5ForConditionalGeneration(config).eval()
    with refused(["model", "encoder-decoder"], t5, rm):
        guided(t5, rm)


@pytest.mark.parametrize(
    "model", ["gpt2", None, torch.nn.Linear(2, 2)], ids=["name", "None", "module"]
)
def test_model_that_cannot_generate(model, rm):
    with refused(["model"], rm):
        guided(model, rm)


@pytest.mark.parametrize(
    "reward_model",
    ["my/rm", None, 3.0, lambda texts: 1.0, torch.nn.Linear(2, 2)],
    ids=["name", "None", "number", "function", "module"],
)
def test_reward_model_that_is_none(reward_model, lm):
    with refused(["reward_model"], lm):
        guided(lm, reward_model)


def test_reward_model_with_two_labels(lm):
    rm = tiny.llama_rm(num_labels=2)
    with refused(["reward_model", "2"], lm, rm):
        guided(lm, rm)


def test_reward_model_without_a_head(lm):
    rm = LlamaModel(tiny.llama_rm().config).eval()
    with refused(["reward_head"], lm, rm):
        guided(lm, rm)


def test_reward_head_that_is_no_callable(lm, rm):
    with refused(["reward_head"], lm, rm):
        guided(lm, rm, reward_head="score")


def test_k_above_the_vocabulary():
    lm, rm = tiny.llama_lm(vocab_size=32), tiny.llama_rm(vocab_size=32)
    with refused(["k", "40", "32"], lm, rm):
        guided(lm, rm, k=40, input_ids=torch.ones(2, 9).long())


@pytest.mark.parametrize("given, missing", [("reward_tokenizer", "tokenizer")])
def test_one_tokenizer_without_the_other(given, missing, lm, rm):
    with refused([given, missing], lm, rm):
        guided(lm, rm, **{given: tiny.tokenizer()})


def test_past_the_positions_of_the_language_model(rm):
    lm = tiny.gpt2_lm()
    with refused(["64", "max_new_tokens"], lm, rm):
        guided(lm, rm, max_new_tokens=64 - 9 + 2)


def test_past_the_positions_of_the_reward_model(lm):
    rm = tiny.gpt2_rm()
    with refused(["64", "max_new_tokens"], lm, rm):
        guided(lm, rm, max_new_tokens=64 - 9 + 2)


def test_reward_prompt_past_the_positions_of_the_reward_model(lm):
    rm = tiny.gpt2_rm()
    with refused(["64", "reward_input_ids"], lm, rm):
        guided(lm, rm, reward_input_ids=torch.ones(2, 62).long())


def test_up_to_the_last_position_is_fine():
    got = guided(tiny.gpt2_lm(), tiny.gpt2_rm(), max_new_tokens=64 - 9)
    assert got.shape[1] == 64
    # With positions to spare the tokens are the same.
    fewer = guided(tiny.gpt2_lm(), tiny.gpt2_rm(), max_new_tokens=30)
    assert torch.equal(got[:, : 9 + 30], fewer)


def test_stop_strings_without_tokenizer(lm, rm):
    with refused(["stop_strings", "tokenizer"], lm, rm):
        guided(lm, rm, stop_strings=["x"])


def test_inputs_embeds_have_no_ids_for_the_reward(lm, rm):
    embeds = torch.randn(2, 5, 32)
    with refused(["inputs_embeds"], lm, rm):
        guided(lm, rm, inputs_embeds=embeds, input_ids=None, attention_mask=None)


def test_max_length_below_the_prompt(lm, rm):
    with refused(["max_length", "4"], lm, rm):
        guided(lm, rm, max_new_tokens=None, max_length=4)


def test_a_causal_lm_as_reward_model_is_told_the_lines_that_take_it(lm):
    rm = tiny.llama_lm(seed=5)
    with pytest.raises(ValueError, match="is a language model, which has no reward head") as said:
        rgtg_fast.generate(lm, **tiny.prompts(3), reward_model=rm, max_new_tokens=2)
    kinds = re.findall(r'reward_kind="(\w+)"', str(said.value))
    # One line for each scorer, whatever losses train a model for it.
    makers = {k.loss_types[0]: k.make for k in KINDS.values() if k.holds == "CausalLM"}
    assert sorted(kinds) == sorted(makers)
    options = {"max_new_tokens": 2, "return_dict_in_generate": True}
    for kind in kinds:
        of_kind, scorer = (
            {"reward_model": rm, "reward_kind": kind},
            {"reward_model": makers[kind](rm)},
        )
        one, other = (
            rgtg_fast.generate(lm, **tiny.prompts(3), **options, **given)
            for given in (of_kind, scorer)
        )
        assert torch.equal(one.rewards, other.rewards)
