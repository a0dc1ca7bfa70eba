"""The decoders of whole sequences with bad rewards, bad options, threads and interrupts."""

import gc
import threading
import weakref

import backspaces
import pytest
import tiny
import torch
import zoo
from interrupts import leave_nothing

import rgtg_fast
from rgtg_fast.scorers import make_scorer, turns
from rgtg_fast.sequence.texts import Texts

PROMPTS = [[5, 6, 7], [9], [40, 41, 43, 44]]
METHODS = {
    "best_of": {"n": 3},
    "blockwise_best_of": {"n": 2, "block": 2},
    "cards": {"reward_target": 1.0, "min_segment": 1, "entropy_threshold": 1.0, "batch_size": 2},
    "speculative_rejection": {"n": 4, "budget": 24},
    "treebon": {"n": 4, "children": 2, "layers": 2},
    "twisted_smc": {"n": 3, "k": 4},
}
OF_TEXTS = pytest.mark.parametrize("name", list(METHODS))
METHODS["backtracking"] = {"backspace_token_id": backspaces.BACK, "k": 4, "batch_size": 2}
EVERY = pytest.mark.parametrize("name", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:.*taken for the same with tokens added:UserWarning")


def model_of(name):
    return backspaces.lm() if name == "backtracking" else zoo.lm("llama")


def begun(name, prompts=PROMPTS, **options):
    given = {"reward_model": zoo.rm("gpt2"), "max_new_tokens": 5, "seed": 3}
    given |= {"eos_token_id": zoo.EOS, "pad_token_id": zoo.PAD}
    return getattr(rgtg_fast, name)(model_of(name), prompts, **given | METHODS[name] | options)


def tokens_of(answers):
    got = {answer.index: answer.error or answer.tokens for answer in answers}
    return [got[index] for index in sorted(got)]


class Letters:
    """A tokenizer of ids as letters."""

    def __call__(self, text):
        raise AssertionError

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(0x100 + int(i)) for i in ids)


def reward_that(name, value, where):
    """1 for each text, but `value` where `where(text)`."""
    alpha = {"alpha": 1.0} if name == "cards" else {}  # a prompt of one token has no reward
    return alpha | {
        "reward_model": lambda texts: [value if where(text) else 1.0 for text in texts],
        "tokenizer": Letters(),
        "seed": 3,
    }


@OF_TEXTS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_ends_its_prompt_alone(name, value):
    good = tokens_of(begun(name, **reward_that(name, 1.0, lambda text: False)))
    bad = chr(0x100 + 40)  # begins the last prompt
    got = tokens_of(begun(name, **reward_that(name, value, lambda text: text.startswith(bad))))
    assert got[:2] == good[:2]
    assert "reward model gave" in got[2]


@OF_TEXTS
def test_a_reward_of_minus_infinity_is_worse_than_any(name):
    """Where every text has it there is an answer still, but for particles without weight."""
    odd = reward_that(name, -float("inf"), lambda text: ord(text[-1]) % 2)
    rare = {"max_rejections": 500} if name == "cards" else {}
    more = {} if name in ("cards", "treebon") else {"n": 12}
    for answer in begun(name, max_new_tokens=2, **odd, **rare, **more):
        assert answer.error is None and answer.reward == 1.0 and answer.tokens[-1] % 2 == 0
    for answer in begun(
        name, max_new_tokens=2, **reward_that(name, -float("inf"), lambda text: True)
    ):
        if name == "twisted_smc":
            assert "no particle has a candidate" in answer.error
        else:
            assert answer.reward == -float("inf") and len(answer.tokens) > 0


def test_cards_asks_for_the_reward_of_the_prompt_where_its_schedule_begins_there():
    options = reward_that("cards", 1.0, lambda text: False) | {"alpha": 0.5}
    errors = [answer.error for answer in sorted(begun("cards", **options), key=lambda a: a.index)]
    assert errors[0] is errors[2] is None and "prompt of one token" in errors[1]


@EVERY
def test_prompts_that_cannot_be_answered_take_no_other_with_them(name):
    want = tokens_of(begun(name))
    too_long, unknown = list(range(5, 70)) * 3, [5, zoo.VOCAB + 3]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2], [], too_long, unknown, PROMPTS[0]]
    got = tokens_of(begun(name, prompts))
    assert got[:3] == want and isinstance(got[6], list)
    for error, message in zip(got[3:6], ("empty", "positions", "contains id"), strict=True):
        assert message in error


@EVERY
def test_an_answer_does_not_depend_on_the_prompts_around_it(name):
    seeds = rgtg_fast.ops.split_seed(3, 3)
    want = tokens_of(begun(name))
    alone = [tokens_of(begun(name, [p], seed=seeds[i : i + 1]))[0] for i, p in enumerate(PROMPTS)]
    assert alone == want


@EVERY
def test_what_shapes_the_logits_shapes_the_texts(name):
    """Processors of scores alone run for all rows at once, others row by row."""
    forbidden = [v for v in range(zoo.VOCAB) if v % 3 and v != zoo.EOS]
    options = {"suppress_tokens": forbidden, "temperature": 1.3, "top_k": 12, "top_p": 0.95}
    both = [tokens_of(begun(name, **options, repetition_penalty=p)) for p in (1.0, 1.0 + 1e-9)]
    assert both[0] == both[1]
    assert all(v % 3 == 0 or v == zoo.EOS for tokens in both[0] for v in tokens)


def test_a_stopping_criterion_ends_a_text():
    class AfterTwo:
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 3 + 2])

    criteria = [AfterTwo()]
    for name in METHODS:
        (answer,) = begun(name, PROMPTS[:1], stopping_criteria=criteria)
        assert answer.error is None and len(answer.tokens) == 2


BAD = {
    "best_of": [
        ({"n": 10**9}, "an int from 1 to 4096"),
        ({"n": 0}, "n=0 is out of range"),
        ({"n": 2.5}, "n must be an int"),
    ],
    "blockwise_best_of": [({"block": 0}, "block=0"), ({"n": True}, "n must be an int")],
    "cards": [
        ({"beta": 0.0}, r"beta=0.0; pass a finite number > 0"),
        ({"reward_target": float("nan")}, "reward_target=nan"),
        ({"reward_target": "high"}, "reward_target='high'"),
        ({"alpha": 1.5}, r"alpha=1.5; pass a number from 0 to 1"),
        ({"max_segment": 2, "min_segment": 3}, "max_segment=2 is below min_segment=3"),
        ({"max_rejections": -1}, "max_rejections=-1"),
        ({"batch_size": 10**30 * -1}, "batch_size"),
    ],
    "speculative_rejection": [
        ({"alpha": 1.0}, "alpha=1.0; pass a finite number > 0 and < 1"),
        ({"alpha": 0}, "alpha=0"),
        ({"budget": 0}, "budget=0"),
    ],
    "treebon": [({"n": 6, "children": 4}, "n=6 texts are no multiple of children=4")],
    "twisted_smc": [
        ({"k": 65}, "k=65 is out of range; pass an int from 1 to 64"),
        ({"beta": float("inf")}, "beta=inf"),
        ({"ess_threshold": -0.1}, "ess_threshold=-0.1; pass a share from 0 to 1"),
    ],
}


@pytest.mark.parametrize(
    "name, options, message", [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_numbers_out_of_range_are_refused_before_work_starts(name, options, message):
    with pytest.raises(ValueError, match=message):
        begun(name, **options)


@OF_TEXTS
@pytest.mark.parametrize(
    "options, message",
    [
        ({"kl_budget": 1.0}, "kl_budget= is about guiding token by token"),
        ({"do_sample": False}, "texts are drawn from the language model"),
        ({"num_return_sequences": 2}, "num_return_sequences="),
        ({"max_new_token": 3}, "max_new_token= is not an argument .* max_new_tokens"),
        ({"temperature": torch.ones(3)}, "temperature must be a number"),
        ({"seed": torch.arange(2)}, "seed has 2 values for 3 prompts"),
        ({"reward_model": tiny.CountingScorer(torch.zeros(zoo.VOCAB))}, "has no rows that come"),
    ],
)
def test_options_of_another_kind_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        begun(name, **options)


def test_a_model_on_a_cache_of_its_own_is_refused():
    with pytest.raises(ValueError, match="runs on Hugging Face's own cache"):
        rgtg_fast.best_of(zoo.lm("bloom"), PROMPTS, reward_model=zoo.rm("llama"))


@EVERY
def test_nothing_of_a_call_outlives_it(name, monkeypatch):
    """Without the collector: a cycle around a cache would keep it until that runs."""
    caches, join = [], Texts.join

    def noted(self, entries):
        join(self, entries)
        caches.extend(weakref.ref(x.forward.cache) for x in (self.lm, self.scorer))

    monkeypatch.setattr(Texts, "join", noted)
    gc.collect()
    gc.disable()
    try:
        list(begun(name))
        assert caches and all(cache() is None for cache in caches)
        answers = begun(name)
        next(answers)
        answers.close()
        assert all(cache() is None for cache in caches)
    finally:
        gc.enable()


@EVERY
def test_calls_on_one_scorer_take_turns(name):
    scorer, want = make_scorer(zoo.rm("gpt2"), k=4), tokens_of(begun(name))
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(tokens_of(begun(name, reward_model=scorer))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    gc.collect()
    assert got == [want, want] and id(scorer) not in turns._in_use


@EVERY
def test_modes_that_come_and_go_between_two_answers(name):
    want, answers, got = tokens_of(begun(name)), begun(name), []
    for mode in (
        torch.inference_mode(),
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        with mode:
            got.append(next(answers))
    assert tokens_of(got) == want


@EVERY
def test_another_default_dtype_and_device_change_nothing(name):
    want, before = tokens_of(begun(name)), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert tokens_of(begun(name)) == want
    finally:
        torch.set_default_dtype(before)


@EVERY
@pytest.mark.parametrize("positions", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_an_interrupt_anywhere_leaves_models_and_scorer_as_they_were(name, positions):
    scorer, prompts = make_scorer(zoo.rm("gpt2"), k=4), PROMPTS[:2]
    models, want = (model_of(name), zoo.rm("gpt2")), tokens_of(begun(name, prompts))

    def answers():
        tokens_of(begun(name, prompts, max_new_tokens=2, reward_model=scorer))

    leave_nothing(answers, models, scorer, positions)
    assert tokens_of(begun(name, prompts, reward_model=scorer)) == want
