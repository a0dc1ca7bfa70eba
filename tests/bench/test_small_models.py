"""What the embedded models and the study's are made of: pairs, language models, reward models."""

import importlib
import itertools
import math
import random
from pathlib import Path

import pytest
import torch


@pytest.fixture
def small(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench" / "quality"))
    return importlib.import_module("small_models")


@pytest.fixture
def tokenizer(small):
    return small.word_tokenizer(["ask red blue green grey"])


GOLD = {"red": 0.0, "blue": math.log(3), "green": math.log(3), "": 9.0}


def pairs(small, tokenizer, replies, count, noisy):
    """Pairs of the prompt "ask", the replies drawn by turns from `replies`."""
    turn = itertools.cycle(replies)
    made = small.make_pairs(
        tokenizer,
        itertools.repeat("ask"),
        lambda prompt, rng: next(turn),
        lambda prompt, reply, finished: GOLD[reply],
        random.Random(0),
        noisy=noisy,
    )
    return list(itertools.islice(made, count))


def test_a_pair_is_the_prompt_and_two_replies_with_eos_the_better_one_first(small, tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    for replies in (["red", "blue"], ["blue", "red"]):
        (pair,) = pairs(small, tokenizer, replies, 1, noisy=False)
        assert pair == {
            "prompt_ids": [ids("ask")],
            "chosen_ids": [ids("blue"), tokenizer.eos_token_id],
            "rejected_ids": [ids("red"), tokenizer.eos_token_id],
        }


def test_ties_equal_and_empty_replies_make_no_pair(small, tokenizer):
    replies = ["blue", "green", "red", "red", "", "blue", "red", "green"]
    (pair,) = pairs(small, tokenizer, replies, 1, noisy=False)
    assert pair["chosen_ids"][0] == tokenizer.convert_tokens_to_ids("green")


@pytest.mark.parametrize("replies", [["red", "blue"], ["blue", "red"]])
def test_noisy_winners_are_drawn_by_bradley_terry(small, tokenizer, replies):
    blue = tokenizer.convert_tokens_to_ids("blue")
    made = pairs(small, tokenizer, replies, 2000, noisy=True)
    share = sum(pair["chosen_ids"][0] == blue for pair in made) / len(made)
    assert share == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 2000))


def test_a_language_model_learns_replies_and_their_end_and_not_prompts(small, tokenizer):
    torch.manual_seed(0)
    lm = small.small_lm(tokenizer, width=16, inner=32, layers=1, longest=8)
    small.train_lm(lm, tokenizer, ["ask red"] * 9600, lambda *_: "blue", 1, random.Random(0))
    ids = tokenizer("ask red blue", return_tensors="pt")["input_ids"]
    follows = lm(ids).logits[0].softmax(-1)
    assert follows[1, ids[0, 2]] > 0.8
    assert follows[2, tokenizer.eos_token_id] > 0.8
    assert follows[0, ids[0, 1]] < 0.3
    assert lm.config.use_cache


def test_a_reward_model_begins_on_the_language_models_body_with_a_head_of_zeros(small, tokenizer):
    lm = small.small_lm(tokenizer, width=16, inner=32, layers=1, longest=8)
    rm = small.reward_model_on(lm)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(rm.model(ids)[0], lm.model(ids)[0])
    assert rm(ids).logits.tolist() == [[0.0]]
