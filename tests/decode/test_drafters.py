"""Whoever guesses the language model's next tokens changes forwards alone."""

import threading

import pytest
import tiny
import torch
from speculated import NEW, answers, assert_same

from rgtg_fast.decode import ahead
from rgtg_fast.decode.ahead import Speculation
from rgtg_fast.decode.drafters import SuffixDrafter
from rgtg_fast.decode.logits import CachedLogits


@pytest.fixture(autouse=True)
def by_itself_on_tiny_models(monkeypatch):
    """`speculate="auto"` leaves them out: their forwards cost less than the host's work."""
    monkeypatch.setattr(ahead, "SMALL", 0)


@pytest.fixture(scope="module")
def models():
    return tiny.llama_lm(), tiny.gpt2_rm()


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


def test_an_assistant_without_speculation_or_without_a_head_is_refused(models):
    with pytest.raises(ValueError, match="speculate=False; leave one of them out"):
        answers(models, (6,), False, assistant_model=models[0])
    with pytest.raises(ValueError, match="assistant_model is str"):
        answers(models, (6,), 4, assistant_model="gpt2")


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
