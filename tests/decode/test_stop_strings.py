"""Stop strings change nothing of the model while a call runs, and belong to their call alone."""

import copy
import threading

import pytest
import tiny
import torch
from transformers import GenerationConfig, LogitsProcessor

import rgtg_fast

NEW = 10


class Seen(LogitsProcessor):
    """What `look` gives at each step."""

    def __init__(self, look):
        self.look, self.values = look, []

    def __call__(self, input_ids, scores):
        self.values.append(self.look())
        return scores


@pytest.fixture
def lm():
    lm = tiny.llama_lm()
    lm.generation_config.stop_strings = ["never said"]
    return lm


def guided(lm, **options):
    # A scorer of the caller's and Hugging Face's cache: nothing else that threads could share.
    scorer = tiny.CountingScorer(torch.zeros(tiny.vocab_size()))
    options = {
        **tiny.prompts(6),
        "max_new_tokens": NEW,
        "cache_implementation": "dynamic",
    } | options
    return rgtg_fast.generate(lm, reward_model=scorer, tokenizer=tiny.tokenizer(), **options)


def pieces(lm):
    """The texts of the tokens of the free answer."""
    free = guided(lm, stop_strings=None)
    return tiny.tokenizer().batch_decode(free[0, 6:, None])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop_strings": ["nor this"]},
        {"generation_config": GenerationConfig(max_new_tokens=4)},
        {"generation_config": GenerationConfig(max_new_tokens=4, stop_strings=["nor this"])},
    ],
    ids=["of the model", "keyword", "model beside a configuration", "configuration"],
)
def test_the_models_configuration_is_as_it_was_while_the_call_runs(options, lm):
    given = copy.deepcopy(options.get("generation_config"))
    seen = Seen(lambda: lm.generation_config.stop_strings)
    guided(lm, logits_processor=[seen], **options)
    assert seen.values and all(value == ["never said"] for value in seen.values)
    assert str(options.get("generation_config")) == str(given)


def test_two_threads_stop_at_their_own_strings(lm):
    """One call has strings of its own; the other, begun while it runs, has the model's."""
    texts = [text for text in pieces(lm)[1:] if text.isascii() and text.strip()]
    own, models = next((a, b) for a in texts for b in texts if a not in b and b not in a)
    lm.generation_config.stop_strings = [models]
    want = guided(lm, stop_strings=own), guided(lm)
    assert want[0].shape != want[1].shape
    got = {}

    def run(i, **options):
        got[i] = guided(lm, **options)

    def begin_the_other():
        if not other.ident:
            other.start()
            other.join(60)

    other = threading.Thread(target=run, args=(1,))
    first = {"stop_strings": own, "logits_processor": [Seen(begin_the_other)]}
    one = threading.Thread(target=run, args=(0,), kwargs=first)
    one.start()
    one.join()
    assert all(torch.equal(got[i], want[i]) for i in range(2))


def test_an_explicit_none_switches_the_models_strings_off(lm):
    lm.generation_config.stop_strings = None
    whole = guided(lm)
    text = next(text for text in pieces(lm)[1:] if text.isascii() and text.strip())
    lm.generation_config.stop_strings = [text]
    assert guided(lm).shape[1] < whole.shape[1]
    assert torch.equal(guided(lm, stop_strings=None), whole)


@pytest.mark.parametrize("bad", [5, [5], [""], [["a"]], b"x", True])
def test_what_is_no_text_is_refused(bad, lm):
    with pytest.raises(ValueError, match=r"stop_strings=.*texts"):
        guided(lm, stop_strings=bad)
