"""NaN in logits or rewards: an error with row and step, and never a change in another row."""

import functools

import pytest
import tiny
import torch
from calls import guided as call
from transformers import LogitsProcessor

NAN, INF = float("nan"), float("inf")
guided = functools.partial(call, **tiny.prompts(5, 9), max_new_tokens=4)


class NanLogits(LogitsProcessor):
    """NaN log-probs of one row at one step, as a broken LM or processor would give."""

    def __init__(self, row, step, prompt):
        self.row, self.length = row, prompt + step

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            scores = scores.clone()
            scores[self.row] = NAN
        return scores


class NanReward(tiny.CountingScorer):
    def __init__(self, row, step):
        super().__init__(torch.linspace(-1, 1, tiny.vocab_size()))
        self.row, self.step = row, step

    def score(self, ids):
        rewards = super().score(ids)
        if self.steps == self.step + 1:
            rewards[self.row, 2] = NAN
        return rewards


def nan_run(kind, lm, rm, **options):
    if kind == "logits":
        return guided(lm, rm, logits_processor=[NanLogits(1, 2, 9)], **options)
    return guided(lm, NanReward(1, 2), **options)


@pytest.mark.parametrize("kind", ["logits", "reward"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("check_nan", [None, True])
def test_nan_is_named_by_row_and_step(kind, do_sample, check_nan, lm, rm):
    with pytest.raises(ValueError, match=r"(?s)(?=.*row\D{0,3}1\b)(?=.*step\D{0,3}2\b)") as caught:
        nan_run(kind, lm, rm, check_nan=check_nan, do_sample=do_sample)
    assert kind.rstrip("s") in str(caught.value)


@pytest.mark.parametrize("kind", ["logits", "reward"])
def test_nan_in_a_row_that_has_ended_is_no_error(kind, lm, rm):
    clean = guided(lm, rm if kind == "logits" else NanReward(1, 99))
    stop = int(clean[1, 10])
    assert stop not in clean[0, 9:]
    out = nan_run(kind, lm, rm, eos_token_id=stop, pad_token_id=tiny.PAD)
    assert out[0].tolist() == clean[0].tolist() and out[1, 11] == tiny.PAD


def test_nan_in_the_weights_of_the_language_model(rm):
    lm = tiny.llama_lm()
    with torch.no_grad():
        lm.lm_head.weight[17] = NAN
    with pytest.raises(ValueError, match=r"(?s)(?=.*row\D{0,3}0\b)(?=.*step\D{0,3}0\b)"):
        guided(lm, rm)


@pytest.mark.parametrize("kind", ["logits", "reward"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_nan_unchecked_leaves_other_rows_alone(kind, do_sample, lm, rm):
    options = {"do_sample": do_sample, "seed": 3, "max_new_tokens": 6}
    clean = guided(lm, rm if kind == "logits" else NanReward(1, 99), **options)
    out = nan_run(kind, lm, rm, check_nan=False, **options)
    assert out[0].tolist() == clean[0].tolist()


def test_no_candidate_left_is_named_by_row_and_step(lm, rm):
    class Nothing(NanLogits):
        def __call__(self, input_ids, scores):
            return torch.nan_to_num(super().__call__(input_ids, scores), nan=-INF)

    with pytest.raises(ValueError, match=r"(?s)(?=.*row\D{0,3}1\b)(?=.*step\D{0,3}2\b)"):
        guided(lm, rm, logits_processor=[Nothing(1, 2, 9)])
