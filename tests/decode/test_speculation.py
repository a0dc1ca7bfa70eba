"""Several tokens for one forward of the reward model: the tokens of one by one."""

import gc
import threading
import weakref

import pytest
import tiny
import torch
import zoo
from lora_checkpoints import make_checkpoint
from transformers import TextIteratorStreamer

import rgtg_fast
from rgtg_fast.decode import ahead
from rgtg_fast.decode.ahead import Speculation
from rgtg_fast.decode.drafters import SuffixDrafter
from rgtg_fast.decode.logits import CachedLogits
from rgtg_fast.models.cache import SiblingCache

NEW = 24


@pytest.fixture(autouse=True)
def by_itself_on_tiny_models(monkeypatch):
    """`speculate="auto"` leaves them out: their forwards cost less than the host's work."""
    monkeypatch.setattr(ahead, "SMALL", 0)


@pytest.fixture(scope="module")
def models():
    return tiny.llama_lm(), tiny.gpt2_rm()


def answers(models, lengths, speculate, **options):
    return answers_to(tiny.prompts(*lengths), models, speculate, **options)


def answers_to(ids, models, speculate, **options):
    lm, rm = models
    options = {
        "beta": 0.3,
        "seed": 3,
        "max_new_tokens": NEW,
        "do_sample": True,
        "return_dict_in_generate": True,
        **options,
    }
    return rgtg_fast.generate(lm, **ids, reward_model=rm, speculate=speculate, **options)


def assert_same(got, want):
    assert torch.equal(got.sequences, want.sequences)
    for name in ("rewards", "kl"):
        one, other = getattr(got, name), getattr(want, name)
        assert torch.allclose(one, other, atol=2e-4, equal_nan=True), name


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


@pytest.mark.parametrize("lengths", [(6,), (5, 9, 3)], ids=["one row", "three rows"])
@pytest.mark.parametrize("own", [True, False], ids=["right", "mostly wrong"])
def test_an_assistant_changes_the_forwards_alone(models, own, lengths):
    assistant = models[0] if own else tiny.llama_lm(seed=9)
    want = answers(models, lengths, False, beta=0.05)
    got = answers(models, lengths, 4, beta=0.05, assistant_model=assistant)
    assert_same(got, want)
    if own and len(lengths) == 1:
        assert got.speculation["lm_forwards"] <= NEW // 2


def test_an_assistant_with_rows_that_end_and_leave(models):
    options = {"sequence_bias": {(tiny.EOS,): 6.0}, "return_dict_in_generate": False}
    lengths = (5, 9, 3, 7, 1, 6)
    want = answers(models, lengths, False, **options)
    got = answers(models, lengths, 5, assistant_model=tiny.llama_lm(seed=9), **options)
    assert torch.equal(got, want)


class Knows:
    """A drafter that knows the answers, and is wrong now and then; it has none behind `ends`."""

    def __init__(self, answers, share, ends=10**9):
        wrong = torch.rand(answers.shape, generator=torch.Generator().manual_seed(7)) >= share
        self.guesses, self.ends = torch.where(wrong, (answers + 1) % 200, answers), ends

    def begin(self, prompts, mask):
        self.rows = torch.arange(len(prompts))

    def draft(self, rows, ahead, counts, n, policy):
        at = (rows.position + counts)[:, None] + torch.arange(n)
        beyond = (at >= self.guesses.shape[1]) | (at >= self.ends)
        guesses = self.guesses[self.rows].gather(1, at.clamp(max=self.guesses.shape[1] - 1))
        return guesses.masked_fill(beyond, -1)

    def keep_rows(self, rows):
        self.rows = self.rows[rows]

    def finish(self):
        pass


@pytest.mark.parametrize("lengths", [(6,), (5, 9, 3)], ids=["one row", "three rows"])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.0])
def test_guesses_take_each_row_as_far_as_they_are_right(models, lengths, share):
    want = answers(models, lengths, False, beta=0.02)
    known = want.sequences[:, max(lengths) :]
    for speculate in (8, "auto"):
        for ends in (10**9, 9):
            drafter = Knows(known, share, ends)
            got = answers(models, lengths, speculate, beta=0.02, assistant_model=drafter)
            assert_same(got, want)
            if speculate == 8 and share and ends > NEW:
                # Each row goes as far as its own guesses are right; a round takes 8 positions.
                most = {1.0: NEW // 3, 0.7: 3 * NEW // 4}[share]
                assert got.speculation["lm_forwards"] <= most
                assert got.speculation["acceptance"] > 0.6


class Gives(Knows):
    def __init__(self, guesses):
        self.guesses = guesses

    def draft(self, *args):
        return self.guesses


@pytest.mark.parametrize(
    ("guesses", "what"),
    [
        (torch.zeros(1, 2), "torch.float32; it must give ids int64"),
        ([[1, 2]], "gave list; it must give ids int64"),
        (torch.zeros(2, 2, dtype=torch.int64), "gave guesses .2, 2.; it must give .1, g., g <= 2"),
        (torch.zeros(1, 9, dtype=torch.int64), "gave guesses .1, 9.; it must give .1, g., g <= 2"),
        (torch.full((1, 1), 10**6), "guesses token 1000000; the language model has"),
    ],
)
def test_guesses_that_are_none_are_named(models, guesses, what):
    with pytest.raises(ValueError, match=what):
        answers(models, (6,), 4, assistant_model=Gives(guesses))


@pytest.mark.parametrize("guesses", [torch.full((1, 1), -1), torch.zeros(1, 0).long()])
def test_without_a_guess_the_language_model_goes_on_alone(models, guesses):
    want = answers(models, (6,), False)
    assert_same(answers(models, (6,), 4, assistant_model=Gives(guesses)), want)


def test_what_came_before_is_guessed(models, monkeypatch):
    """A text that repeats itself: verified in fewer forwards of the language model than tokens."""
    monkeypatch.setattr(Speculation, "guesses", lambda self, most: most)
    want = answers(models, (6,), False, do_sample=False, beta=0.01, max_new_tokens=50)
    got = answers(models, (6,), "auto", do_sample=False, beta=0.01, max_new_tokens=50)
    assert_same(got, want)


def test_rows_without_a_guess_do_not_disturb_the_warpers(models, monkeypatch):
    """Behind a row's guesses the language model's forward gives anything, NaN too."""
    extend = CachedLogits.extend

    def spoiled(self, tokens, counts):
        logits = extend(self, tokens, counts)
        behind = torch.arange(tokens.shape[1]) >= counts[:, None]
        return logits.masked_fill(behind[..., None], torch.nan)

    monkeypatch.setattr(CachedLogits, "extend", spoiled)
    monkeypatch.setattr(Speculation, "guesses", lambda self, most: most)
    options = {"do_sample": False, "beta": 0.01, "max_new_tokens": 50}
    warped = {"typical_p": 0.9, "eta_cutoff": 0.01, "top_k": 30, "do_sample": True, "seed": 5}
    for more in ({}, warped):
        want, got = (answers(models, (6, 4, 9), how, **options | more) for how in (False, "auto"))
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


def test_an_assistant_without_speculation_or_without_a_head_is_refused(models):
    with pytest.raises(ValueError, match="speculate=False; leave one of them out"):
        answers(models, (6,), False, assistant_model=models[0])
    with pytest.raises(ValueError, match="assistant_model is str"):
        answers(models, (6,), 4, assistant_model="gpt2")


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


def test_a_suffix_drafter_knows_the_texts_of_calls_before_in_any_threads(models):
    drafter = SuffixDrafter()
    options = {"do_sample": False, "beta": 0.01, "max_new_tokens": 50}
    want = answers(models, (6,), False, **options)
    first = answers(models, (6,), 8, assistant_model=drafter, **options)
    again = answers(models, (6,), 8, assistant_model=drafter, **options)
    for got in (first, again):
        assert_same(got, want)
    assert again.speculation["lm_forwards"] < first.speculation["lm_forwards"]
    got = [None] * 4

    def work(i):
        got[i] = answers(models, (6,), 8, assistant_model=drafter, **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(out.sequences, want.sequences) for out in got)
    assert drafter.texts == []
    with pytest.raises(ValueError, match="order=0"):
        SuffixDrafter(order=0)


def test_a_suffix_drafter_lets_go_of_texts_that_ended():
    drafter = SuffixDrafter()
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    drafter.begin(ids, torch.ones_like(ids))
    drafter.keep_rows(torch.tensor([1]))
    assert len(drafter.texts) == 1
    drafter.finish()
    assert drafter.texts == []
