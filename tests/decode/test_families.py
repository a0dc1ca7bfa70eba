"""A language model and a reward model of equal vocabulary size whose token ids mean other texts."""

import gc
import threading
import warnings
import weakref

import pytest
import tiny
import torch
import zoo
from transformers import GenerationConfig

import rgtg_fast
from rgtg_fast import vocabularies
from rgtg_fast.models.reward_model import as_reward_model

OTHER = {"bos_token_id": 7, "eos_token_id": 8}
DIFFERENT = "bos .* against .* and eos .* against .*pass tokenizer= and reward_tokenizer="


def answer(lm, rm, **options):
    ids = tiny.prompts(3)["input_ids"]
    return rgtg_fast.generate(lm, ids, reward_model=rm, max_new_tokens=2, k=2, **options)


def warned(call):
    """The messages about families that `call` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "special tokens" in str(w.message)]


def compared(lm, rm):
    return warned(lambda: vocabularies.check_families(lm, as_reward_model(rm), None))


@pytest.mark.parametrize("of_lm", [True, False])
def test_other_special_tokens_on_either_side_are_warned_of_once_a_pair(of_lm):
    lm = tiny.llama_lm(**OTHER if of_lm else {})
    rm = tiny.gpt2_rm(**{} if of_lm else OTHER)
    with pytest.warns(UserWarning, match=DIFFERENT) as seen:
        answer(lm, rm)
    ours, theirs = ("7", "1") if of_lm else ("1", "7")
    [message] = [str(w.message) for w in seen if "special tokens" in str(w.message)]
    assert f"bos [{ours}] against [{theirs}]" in message
    assert "(llama)" in message and "(gpt2)" in message
    assert not warned(lambda: answer(lm, rm))
    assert len(warned(lambda: answer(lm, tiny.gpt2_rm(bos_token_id=5, eos_token_id=6)))) == 1


def test_the_warning_names_where_the_models_come_from(tmp_path):
    for name, model in (("lm", tiny.llama_lm()), ("rm", tiny.llama_rm(**OTHER))):
        model.save_pretrained(tmp_path / name)
    lm = type(tiny.llama_lm()).from_pretrained(tmp_path / "lm")
    rm = type(tiny.llama_rm()).from_pretrained(tmp_path / "rm")
    [message] = warned(lambda: answer(lm, rm))
    assert str(tmp_path / "lm") in message and str(tmp_path / "rm") in message


def test_the_models_of_a_call_by_model_generate_are_compared():
    lm, guide = tiny.llama_lm(), rgtg_fast.RewardGuided(tiny.llama_rm(**OTHER), k=2)
    ids = tiny.prompts(3)["input_ids"]
    assert warned(lambda: lm.generate(ids, custom_generate=guide, max_new_tokens=2))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"bos_token_id": None, "eos_token_id": 2}, {"eos_token_id": 8}, True),
        ({"bos_token_id": None}, {"bos_token_id": 7, "eos_token_id": 2}, False),
        ({"bos_token_id": None, "eos_token_id": None}, OTHER, False),
        ({"eos_token_id": [2, 9]}, OTHER, True),
        ({"bos_token_id": None, "eos_token_id": [2, 8]}, OTHER, False),
        ({"bos_token_id": None}, {"bos_token_id": None, "eos_token_id": [8, 2]}, False),
        ({}, {"eos_token_id": 8}, False),  # as of a base model and a chat model of one family
        ({"pad_token_id": 0}, {"pad_token_id": 9}, False),
        ({}, {"bos_token_id": 50256, "eos_token_id": 50256}, False),  # a class's default
    ],
)
def test_what_counts_is_that_no_special_token_agrees(ours, theirs, expected):
    lm = tiny.llama_lm()
    for name, value in ours.items():
        setattr(lm.config, name, value)
        setattr(lm.generation_config, name, value)
    rm = tiny.llama_rm()
    for name, value in theirs.items():
        setattr(rm.config, name, value)
    assert bool(compared(lm, rm)) == expected


def test_the_generation_config_of_a_model_knows_more_ends():
    lm, rm = tiny.llama_lm(bos_token_id=None), tiny.llama_rm(**OTHER)
    lm.generation_config = GenerationConfig(eos_token_id=[3, 8])
    assert not compared(lm, rm)
    lm.generation_config = GenerationConfig(eos_token_id=[3, 4])
    [message] = compared(lm, tiny.llama_rm(**OTHER))
    assert "eos [2, 3, 4] against [8]" in message


def test_ends_asked_for_by_a_call_are_no_evidence():
    lm, rm = tiny.llama_lm(), tiny.llama_rm()
    assert not warned(lambda: answer(lm, rm, eos_token_id=8, bos_token_id=7))


def test_vocabularies_that_were_compared_are_not_warned_of():
    tokenizer = tiny.tokenizer()
    both = {"tokenizer": tokenizer, "reward_tokenizer": tokenizer}
    assert not warned(lambda: answer(tiny.llama_lm(), tiny.llama_rm(**OTHER), **both))


def test_rewards_on_the_language_model_itself_are_not_warned_of():
    lm = tiny.llama_lm()
    head = rgtg_fast.RewardHead(lm, tiny.llama_rm().score.weight[0])
    lm.generation_config.eos_token_id = 8
    assert not warned(lambda: answer(lm, head))
    assert not warned(lambda: answer(lm, tiny.CountingScorer(torch.zeros(tiny.vocab_size()))))


def test_threads_warn_once_of_a_pair():
    lm, rm = tiny.llama_lm(), as_reward_model(tiny.llama_rm(**OTHER))
    start = threading.Barrier(8)

    def look():
        start.wait()
        vocabularies.check_families(lm, rm, None)

    def all_look():
        threads = [threading.Thread(target=look) for _ in range(8)]
        for step in ("start", "join"):
            for thread in threads:
                getattr(thread, step)()

    assert len(warned(all_look)) == 1


def test_what_was_compared_keeps_no_model_alive():
    lm, rm = tiny.llama_lm(), tiny.llama_rm(**OTHER)
    assert compared(lm, rm)
    left = [weakref.ref(lm), weakref.ref(rm)]
    del lm, rm
    gc.collect()
    assert [ref() for ref in left] == [None, None]


@pytest.mark.parametrize("family", zoo.LMS)
def test_models_of_a_family_are_not_warned_of(family):
    lm = zoo.lm(family)
    assert not compared(lm, zoo.rm(family)) and not compared(lm, zoo.rm("bert"))
