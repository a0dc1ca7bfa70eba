"""The public edge, fuzzed: what cannot be right is a clear error before work starts; what is only
of another kind of number is taken."""

import copy
import inspect

import numpy as np
import pytest
import tiny
import torch
from test_errors import guided, refused
from transformers import BatchEncoding, GenerationConfig, StoppingCriteria

import rgtg_fast

NAN, INF, META = float("nan"), float("inf"), torch.device("meta")


@pytest.fixture(scope="module")
def lm():
    return tiny.llama_lm()


@pytest.fixture(scope="module")
def rm():
    return tiny.llama_rm()


COUNTS = [0, -1, 3.0, 2.5, True, "8", [4], 1j, np.float32(4)]
ABSURD = {
    "k": [-1, 0, 65, 2**63, True, 3.0, "10", None, 1j, [], [3], np.int64(65), np.float64(3)],
    "beta": [
        1e39,
        -1e39,
        10**400,
        1j,
        "2",
        [],
        [1.0],
        True,
        torch.tensor([1j, 1j]),
        torch.tensor([1.0, 1e39], dtype=torch.float64),
        torch.tensor([1.0, NAN]),
        torch.ones(2, device=META),
        torch.tensor(1.0, device=META),
        torch.ones(2).bool(),
    ],
    "temperature": [
        0,
        -1,
        1e-46,
        1e-40,
        INF,
        NAN,
        "1",
        1j,
        [1.0],
        True,
        torch.tensor([1.0, 0.0]),
        torch.tensor([]),
    ],
    "seed": [
        2**63,
        -(2**63) - 1,
        1.0,
        "1",
        True,
        [1],
        np.uint64(2**63 + 1),
        torch.tensor(1.5),
        torch.ones(2, 1).long(),
        torch.ones(2).int(),
    ],
    "sync_every": [0, -1, 1.0, True, "16", [], 2.5],
    "reward_range": [
        (1, 0),
        (0, 0),
        (NAN, 1),
        (0, INF),
        (0, 10**400),
        (0,),
        (0, 1, 2),
        "ab",
        1,
        (None, 1),
        (1j, 2),
        torch.ones(2, device=META),
        {},
        [],
    ],
    "prune": ["yes", 1, 0, [], torch.ones(2)],
    "cuda_graph": ["yes", 1, []],
    "compile": ["yes", 1, None, []],
    "compact": ["no", None, 1],
    "output_candidates": ["no", None, 1],
    "check_nan": ["yes", 1, []],
    "eos_reward": [None, 1, [], np.ones(2), "Hidden"],
    "reward_method": [None, 1, ["tree"], np.ones(2)],
    "backend": [None, 1, ["cpp"], np.ones(2)],
    "max_new_tokens": COUNTS,
    "num_return_sequences": COUNTS,
    "max_length": COUNTS,
    "min_new_tokens": [-1, 2.0, "2", True],
    "generation_config": ["greedy", {}, 3],
    "input_ids": [
        [[5, 6]],
        [],
        "text",
        np.ones((2, 3)),
        torch.ones(2, 9),
        torch.ones(2, 9).bool(),
        torch.ones(2, 9, device=META).long(),
        torch.ones(2, 9, 1).long(),
        torch.tensor(5),
    ],
    "attention_mask": [
        "mask",
        [[1]],
        torch.ones(9),
        torch.ones(2, 9, device=META),
        torch.ones(2, 9, 1).long(),
    ],
    "reward_input_ids": ["text", [[5]], torch.ones(2, 3, device=META).long(), torch.ones(3).long()],
    "reward_tokenizer": ["gpt2", 3],
    "reward_head": [3, "score", torch.ones(32)],
    "streamer": ["out", 3],
    "stop_strings": [5, [5], [""]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ABSURD.items() for value in values]
)
def test_an_absurd_value_is_refused_by_name_before_any_forward(name, value, lm, rm):
    options = {"do_sample": True, "tokenizer": tiny.tokenizer(), name: value}
    if name == "max_length":
        options["max_new_tokens"] = None
    with refused([name], lm, rm):
        guided(lm, rm, **options)


@pytest.mark.parametrize("name", ["max_new_tokens", "num_return_sequences"])
@pytest.mark.parametrize("value", [0, 3.0, "8"])
@pytest.mark.parametrize("through", ["generate", "custom_generate"])
def test_counts_of_a_configuration_are_checked_too(name, value, through, lm, rm):
    config = GenerationConfig(max_new_tokens=4)
    setattr(config, name, value)
    options = {**tiny.prompts(5, 9), "generation_config": config}
    if through == "generate":
        with refused([name], lm, rm):
            rgtg_fast.generate(lm, reward_model=rm, **options)
    else:  # Hugging Face looks first, and raises what it raises
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
            lm.generate(custom_generate=rgtg_fast.RewardGuided(rm), **options)


def test_integers_of_numpy_are_integers(lm, rm):
    plain = {"k": 7, "seed": 3, "sync_every": 4, "max_new_tokens": 5, "do_sample": True}
    numpy = {n: v if n == "do_sample" else np.int64(v) for n, v in plain.items()}
    assert torch.equal(guided(lm, rm, **plain), guided(lm, rm, **numpy))


@pytest.mark.parametrize("mask", [torch.bool, torch.float32, torch.int32])
def test_masks_of_other_dtypes_are_masks(mask, lm, rm):
    inputs = tiny.prompts(5, 9)
    inputs["attention_mask"] = inputs["attention_mask"].to(mask)
    assert torch.equal(guided(lm, rm, **inputs), guided(lm, rm))


def test_seldom_is_as_seldom_as_one_likes(lm, rm):
    assert torch.equal(guided(lm, rm, sync_every=10**12), guided(lm, rm))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("bta", "beta"), ("reward_modle", "reward_model"), ("tempereture", "temperature")],
)
def test_a_misspelt_option_of_reward_guided_is_told_the_right_one(wrong, meant, rm):
    with refused([wrong, meant], rm):
        rgtg_fast.RewardGuided(
            **{"reward_model": rm, wrong: 1.0} if meant != "reward_model" else {wrong: rm}
        )


def test_a_misspelt_reward_model_is_told_the_right_name(lm, rm):
    with refused(["reward_modle", "reward_model"], lm, rm):
        rgtg_fast.generate(lm, **tiny.prompts(5), reward_modle=rm, max_new_tokens=4)


def test_reward_guided_still_shows_its_options():
    assert "beta" in inspect.signature(rgtg_fast.RewardGuided).parameters


class Returns(tiny.CountingScorer):
    def __init__(self, what):
        super().__init__(torch.zeros(tiny.vocab_size()))
        self.what = what

    def score(self, ids):
        return self.what(ids)


@pytest.mark.parametrize(
    "what", [lambda ids: None, lambda ids: ids.tolist(), lambda ids: np.zeros(ids.shape)]
)
def test_a_scorer_that_gives_no_tensor_is_named(what, lm):
    with pytest.raises(ValueError, match=r"Returns\.score gave .*tensor of rewards \[2, 10\]"):
        guided(lm, Returns(what))


class Ends(StoppingCriteria):
    def __init__(self, what):
        self.what = what

    def __call__(self, input_ids, scores, **kwargs):
        return self.what(torch.zeros(len(input_ids), dtype=torch.bool))


@pytest.mark.parametrize(
    "what", [lambda done: done[:, None], lambda done: None, lambda done: done.float()]
)
def test_a_criterion_of_another_shape_is_named(what, lm, rm):
    with pytest.raises(ValueError, match=r"stopping criterion Ends gave .*bool tensor \[2\]"):
        guided(lm, rm, stopping_criteria=[Ends(what)])


@pytest.mark.parametrize("what", [lambda done: True, lambda done: torch.tensor([True])])
def test_a_criterion_may_speak_for_all_rows(what, lm, rm):
    got = guided(lm, rm, stopping_criteria=[Ends(what)])
    assert torch.equal(got, guided(lm, rm, max_new_tokens=1))


def test_a_prompt_as_long_as_the_model_is_not_helped_by_fewer_tokens(rm):
    lm = tiny.gpt2_lm()
    with pytest.raises(ValueError, match=r"no room for an answer.*shorter prompts") as caught:
        guided(lm, rm, **tiny.prompts(64, 70))
    assert "max_new_tokens" not in str(caught.value)


def test_an_empty_prompt_is_called_one(lm, rm):
    mask = torch.tensor([[1] * 9, [0] * 9])
    with refused(["attention_mask", "row 1", "empty prompt"], lm, rm):
        guided(lm, rm, attention_mask=mask)


def test_a_language_model_as_reward_model_is_told_its_kinds(lm):
    with refused(['reward_kind="genarm"', 'reward_kind="farma"'], lm):
        guided(lm, tiny.llama_lm())


@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_an_encoding_is_to_be_passed_with_two_stars(name, lm, rm):
    with refused(["BatchEncoding", "enc"], lm, rm):
        encoding = {name: BatchEncoding(tiny.prompts(5, 9))}
        rgtg_fast.generate(lm, reward_model=rm, max_new_tokens=4, **encoding)


def test_a_reward_tokenizer_without_padding_is_told_how(lm, rm):
    other = copy.deepcopy(tiny.tokenizer())
    other.add_tokens(["qqqq"])
    other.get_vocab = lambda: {"elsewhere": 0}
    other.pad_token = None
    with refused(["reward_tokenizer", "reward_tokenizer.pad_token"], lm, rm):
        guided(lm, rm, reward_tokenizer=other, tokenizer=tiny.tokenizer())
