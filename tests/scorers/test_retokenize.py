"""A causal reward model behind other tokens: the rewards of re-encoding, for a few tokens each."""

import functools

import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast

import rgtg_fast
from rgtg_fast.models.siblings import SiblingForward
from rgtg_fast.scorers import ReencodeScorer
from rgtg_fast.scorers.retokenize import common


@functools.cache
def other_tokens() -> PreTrainedTokenizerFast:
    """A byte-level BPE of other merges, so that a text's last tokens depend on what follows."""
    texts = ["the order of the parcel, thank you and hello there", "may the parcel arrive today?"]
    return tiny.tokenizer().train_new_from_iterator(texts * 3, 290)


def guided(**options):
    options = {"k": 5, "max_new_tokens": 10, "return_dict_in_generate": True} | options
    texts = {"tokenizer": tiny.tokenizer(), "reward_tokenizer": other_tokens()}
    rm = tiny.llama_rm(vocab_size=290, max_position_embeddings=2048)
    lm = tiny.llama_lm(max_position_embeddings=2048)
    return rgtg_fast.generate(lm, reward_model=rm, **texts, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "seed": 3, "num_return_sequences": 2},
        {"do_sample": True, "seed": 4, "top_p": 0.6},
        {"eos_reward": "previous", "eos_token_id": [2, 40, 41, 60, 61]},
        {"min_entropy": 1.2},
    ],
)
def test_tokens_and_rewards_are_those_of_re_encoding(options):
    inputs = tiny.prompts(4, 11, 7)
    got, want = (guided(**inputs, reward_method=m, **options) for m in ("auto", "reencode"))
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.rewards, want.rewards, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_step_runs_a_few_tokens_of_each_candidate(monkeypatch):
    run, encoded = [], []
    extend, forward = SiblingForward.extend, ReencodeScorer._forward

    def extended(self, ids, counts, rows=None):
        run.append(ids.numel())
        return extend(self, ids, counts, rows)

    def forwarded(self, ids, mask):
        encoded.append(ids.numel())
        return forward(self, ids, mask)

    monkeypatch.setattr(SiblingForward, "extend", extended)
    monkeypatch.setattr(ReencodeScorer, "_forward", forwarded)
    inputs = tiny.prompts(256)
    guided(**inputs, speculate=False)
    assert not encoded
    steps, per_step = len(run), sum(run) / 5 / len(run)
    guided(**inputs, speculate=False, reward_method="reencode")
    assert steps == len(encoded) == 10 and per_step < 8
    assert sum(encoded) > 30 * sum(run)


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [
        ([], [1], 0),
        ([1, 2], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 9, 3], [1, 2, 3], 1),
        ([1], [], 0),
    ],
)
def test_what_two_texts_have_in_common(one, other, length):
    assert common(one, other) == length


def test_a_text_beyond_the_positions_of_the_reward_model_is_an_error():
    rm = tiny.llama_rm(vocab_size=290, max_position_embeddings=12)
    texts = {"tokenizer": tiny.tokenizer(), "reward_tokenizer": other_tokens()}
    with pytest.raises(ValueError, match=r"a text of \d+ reward-model tokens was reached"):
        rgtg_fast.generate(tiny.llama_lm(), **tiny.prompts(9), reward_model=rm, **texts)
