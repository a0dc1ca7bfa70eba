"""Several tokens for one forward of the reward model: the tokens of one by one."""

import gc
import threading
import weakref

import pytest
import tiny
import torch
import zoo
from lora_checkpoints import make_checkpoint
from speculated import NEW, answers, answers_to, assert_same
from transformers import TextIteratorStreamer

import rgtg_fast
from rgtg_fast.decode import ahead
from rgtg_fast.models.cache import SiblingCache


@pytest.fixture(autouse=True)
def by_itself_on_tiny_models(monkeypatch):
    """`speculate="auto"` leaves them out: their forwards cost less than the host's work."""
    monkeypatch.setattr(ahead, "SMALL", 0)


@pytest.fixture(scope="module")
def models():
    return tiny.llama_lm(), tiny.gpt2_rm()


OPTIONS = {
    "sampled": {},
    "greedy": {"do_sample": False},
    "hardly guided": {"beta": 0.02},
    "much guided": {"beta": 3.0},
    "beta and temperature of each row": {
        "beta": torch.tensor([0.1, 2.0, 0.4]),
        "temperature": torch.tensor([0.5, 1.0, 2.0]),
    },
    "rows that end": {"sequence_bias": {(tiny.EOS,): 6.0}},
    "the reward of EOS is that before it": {
        "sequence_bias": {(tiny.EOS,): 6.0},
        "eos_reward": "previous",
    },
    "processors that read the text": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "a least length": {"sequence_bias": {(tiny.EOS,): 9.0}, "min_new_tokens": 5},
    "candidates at -inf": {"top_p": 0.7},
    "clamped rewards": {"reward_range": (-0.5, 0.5)},
    "one candidate": {"k": 1},
}


@pytest.mark.parametrize("lengths", [(7,), (5, 9, 3)], ids=["one row", "three rows"])
@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_rewards_and_kl_are_those_of_one_by_one(models, name, lengths):
    options = {
        n: v[: len(lengths)] if isinstance(v, torch.Tensor) else v for n, v in OPTIONS[name].items()
    }
    all_scored = {"prune": False} if "reward_range" in options else {}
    want = answers(models, lengths, False, **all_scored, **options)
    for speculate in (2, 5):
        got = answers(models, lengths, speculate, **options)
        assert_same(got, want)
        tokens = int((~got.rewards.isnan()).sum())
        assert got.speculation["tokens"] == tokens
        assert got.speculation["reward_forwards"] < NEW


def on_the_lm(kind, tmp_path):
    lm = zoo.lm("qwen2")
    if kind == "adapter":
        _, lm = make_checkpoint(tmp_path, "qwen2")
        return lm, rgtg_fast.RewardAdapter.from_pretrained(lm, tmp_path)
    width = lm.config.hidden_size
    weight = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return lm, rgtg_fast.RewardHead(lm, weight / width**0.5, 1 if kind == "inner layer" else -1)


@pytest.mark.parametrize("lengths", [(7,), (5, 9, 3)], ids=["one row", "three rows"])
@pytest.mark.parametrize("kind", ["head", "inner layer", "adapter"])
def test_rewards_on_the_language_models_own_forward(kind, lengths, tmp_path):
    models = on_the_lm(kind, tmp_path)
    options = {"beta": 0.2, "eos_reward": "previous", "sequence_bias": {(zoo.EOS,): 2.0}}
    options |= {"eos_token_id": zoo.EOS, "pad_token_id": zoo.PAD}
    ids = zoo.left_pad(zoo.prompts(lengths=lengths))
    for more in ({}, {"do_sample": False}, {"assistant_model": zoo.lm("qwen2")}):
        drafted = {n: v for n, v in more.items() if n == "assistant_model"}
        more = {n: v for n, v in more.items() if n not in drafted}
        want = answers_to(ids, models, False, **options, **more)
        for speculate in (2, 5, "auto"):
            got = answers_to(ids, models, speculate, **options, **more, **drafted)
            assert_same(got, want)
            by_itself = speculate == "auto" and not drafted
            assert (got.speculation is None) == by_itself


def test_by_itself_it_takes_several_tokens_where_that_pays_and_says_so(models):
    want, got = (answers(models, (6,), how, beta=0.02) for how in (False, "auto"))
    assert_same(got, want)
    assert want.speculation is None
    assert got.speculation["reward_forwards"] < NEW and got.speculation["acceptance"] > 0.5


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "llama4", "qwen3"])
def test_windows_chunks_and_caps(family):
    lm, rm = zoo.build_lm(family), zoo.build_rm(family)
    ids = zoo.left_pad(zoo.prompts(lengths=(9, 2, 14)))
    options = {"beta": 0.2, "seed": 1, "max_new_tokens": NEW, "do_sample": True}
    want, got = (
        rgtg_fast.generate(
            lm, **ids, reward_model=rm, speculate=how, return_dict_in_generate=True, **options
        )
        for how in (False, 5)
    )
    assert_same(got, want)
    assert got.speculation["reward_forwards"] < NEW


def test_rows_leave_when_half_have_ended(models):
    options = {"sequence_bias": {(tiny.EOS,): 6.0}, "return_dict_in_generate": False}
    want, got = (answers(models, (5, 9, 3, 7, 1, 6), how, **options) for how in (False, 4))
    assert torch.equal(got, want)


def test_stop_strings_end_each_row_at_its_token(models):
    options = {"tokenizer": tiny.tokenizer(), "stop_strings": ["a", "e"]}
    want, got = (answers(models, (5, 9, 3), how, **options) for how in (False, 4))
    assert_same(got, want)


def test_a_streamer_gets_the_tokens_in_order(models):
    texts = []
    for speculate in (False, 4):
        streamer = TextIteratorStreamer(tiny.tokenizer(), skip_prompt=True)
        answers(models, (6,), speculate, streamer=streamer)
        texts.append("".join(streamer))
    assert texts[0] == texts[1]


def test_the_cache_given_back_goes_on_as_hugging_faces(models):
    want, got = (answers(models, (6,), how) for how in (False, 4))
    for one, other in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-4)
        assert torch.allclose(one.values, other.values, atol=1e-4)


def test_positions_do_not_pass_the_models_last_one():
    lm, rm = tiny.gpt2_lm(n_positions=12 + NEW), tiny.gpt2_rm(n_positions=12 + NEW)
    options = {"sequence_bias": {(tiny.EOS,): 5.0}}
    want, got = (answers((lm, rm), (12, 12, 4), how, **options) for how in (False, 7))
    assert_same(got, want)


def test_calls_in_threads(models):
    want = [answers(models, (n,), False, seed=n).sequences for n in range(3, 7)]
    got = [None] * 4

    def work(i):
        got[i] = answers(models, (i + 3,), 4, seed=i + 3).sequences

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_nothing_of_a_call_outlives_it(models, monkeypatch):
    caches, init = [], SiblingCache.__init__

    def noted(self, *args, **kwargs):
        caches.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(SiblingCache, "__init__", noted)
    gc.disable()
    try:
        out = answers(models, (6, 4), 4, assistant_model=tiny.llama_lm(seed=9))
        del out
        assert caches and all(cache() is None for cache in caches)
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:reward_model has")
def test_what_is_learnt_is_of_the_models_as_they_are():
    """A vocabulary of another size, another dtype, another model at the same address."""
    rm = tiny.gpt2_rm()
    for seed, width in ((1, 32), (2, 64), (3, 32)):
        lm = tiny.llama_lm(seed=seed, hidden_size=width)
        for rows in (280, 300):
            lm.resize_token_embeddings(rows)
            with torch.no_grad():  # the last ones are likely too
                lm.get_output_embeddings().weight[-40:] *= 3.0
            ids = {n: t.clamp(max=99) for n, t in tiny.prompts(6, 4).items()}
            want, got = (answers_to(ids, (lm, rm), how) for how in (False, 4))
            assert_same(got, want)
        del lm
    gc.collect()
    assert not len(ahead._learnt[rm])


def test_a_nan_is_named_by_row_and_step(models):
    lm, rm = tiny.llama_lm(), tiny.gpt2_rm()
    with torch.no_grad():
        rm.score.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="row 0, step 0: the reward model gave"):
        answers((lm, rm), (6, 4), 4)


@pytest.mark.parametrize("wrong", [1, 0, 33, True, "yes", 2.5])
def test_options_out_of_range(models, wrong):
    with pytest.raises(ValueError, match="speculate"):
        answers(models, (6,), wrong)


def test_small_models_are_left_out_but_with_a_drafter(models, monkeypatch):
    monkeypatch.setattr(ahead, "SMALL", 1 << 30)
    assert answers(models, (6,), "auto").speculation is None
    assert answers(models, (6,), 2).speculation is not None
    assert answers(models, (6,), "auto", assistant_model=models[0]).speculation is not None


def test_asked_for_where_it_is_not_possible_it_says_why(models):
    with pytest.warns(UserWarning, match="no speculation: output_scores and output_logits"):
        answers(models, (6,), 4, output_scores=True)
    with pytest.warns(UserWarning, match="no speculation: rewards by 'expand'"):
        answers(models, (6,), 4, reward_method="expand")
