"""Models whose vocabularies differ in size: what is shared, what is refused."""

import functools

import pytest
import tiny
import torch
from calls import guided as call
from test_errors import refused

from rgtg_fast.scorers import AutoregressiveScorer

V = tiny.vocab_size()
guided = functools.partial(call, **tiny.prompts(5, 9), max_new_tokens=4)


def test_vocabularies_that_differ(lm):
    rm, wide = tiny.llama_rm(vocab_size=V + 129), tiny.llama_lm(vocab_size=V + 129)
    with refused([str(V), str(V + 129), "reward_tokenizer"], lm, rm):
        guided(lm, rm)
    with refused([str(V), str(V + 129), "reward_tokenizer"], wide, tiny.llama_rm()):
        guided(wide, tiny.llama_rm())


@pytest.mark.parametrize("special", ["bos_token_id", "eos_token_id"])
def test_added_rows_do_not_make_another_vocabulary_the_same(lm, special):
    """With no special token in common, more rows are other tokens."""
    rm = tiny.llama_rm(vocab_size=V + 1, bos_token_id=7, eos_token_id=8)
    with refused([str(V + 1), "reward_tokenizer"], lm, rm):
        guided(lm, rm)
    setattr(rm.config, special, getattr(lm.config, special))
    with pytest.warns(UserWarning, match=f"{V + 1} tokens and the language model {V}: taken for"):
        guided(lm, rm)


@pytest.mark.filterwarnings("ignore:reward_model has")
def test_a_reward_model_with_a_row_more_shares_ids(lm):
    """An added padding token, 32001 beside 32000: its rows before are the same."""
    rm, wide = tiny.llama_rm(), tiny.llama_rm(vocab_size=V + 1)
    weights = rm.state_dict()
    with torch.no_grad():
        wide.model.embed_tokens.weight[:V] = weights.pop("model.embed_tokens.weight")
        wide.load_state_dict(weights, strict=False)
    options = {"return_dict_in_generate": True, "max_new_tokens": 4}
    one, other = (guided(lm, r, **options) for r in (rm, wide))
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.rewards, other.rewards)


SOME = {"suppress_tokens": list(range(V - 6)), "do_sample": True, "beta": 0.0, "top_k": 0, "k": 6}


@pytest.mark.filterwarnings("ignore:reward_model has")
@pytest.mark.parametrize(
    "make", [tiny.llama_rm, lambda **size: AutoregressiveScorer(tiny.llama_lm(**size))]
)
def test_what_ends_an_answer_must_have_a_reward(lm, make):
    rm = make(vocab_size=V - 3)
    for eos in (V - 3, [V - 1, V - 2]):
        with pytest.raises(ValueError, match=rf"{V - 3} tokens.*eos_token_id.*no answer would end"):
            guided(lm, rm, eos_token_id=eos)
    got = guided(lm, rm, eos_token_id=[V - 1, 5], max_new_tokens=40, **SOME)
    assert set(got[:, 9:].unique().tolist()) == {V - 6, V - 5, V - 4}


def test_a_language_model_with_rows_more_never_takes_them(lm):
    """Qwen's sizes have 151,936 and 152,064 rows for the same tokens."""
    rm = tiny.llama_rm(vocab_size=V - 2)
    with pytest.warns(UserWarning, match=rf"those from {V - 2} on have no reward and are never"):
        got = guided(lm, rm, eos_token_id=5, max_new_tokens=40, **SOME)
    assert set(got[:, 9:].unique().tolist()) == {V - 6, V - 5, V - 4, V - 3}
