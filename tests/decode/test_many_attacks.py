"""`generate_many` with what a caller may do to it between two answers, and before the first."""

import contextlib
import gc
import itertools
import threading

import pytest
import tiny
import torch
import zoo
from interrupts import leave_nothing

import rgtg_fast
from rgtg_fast.scorers import make_scorer, turns

LENGTHS = (9, 2, 14, 5, 5)


def begun(prompts=(), **options):
    given = {"k": 4, "max_new_tokens": 6, "eos_token_id": zoo.EOS, "pad_token_id": zoo.PAD}
    given |= {"reward_model": zoo.rm("gpt2"), "do_sample": True, "seed": 3, "batch_size": 2}
    prompts = zoo.prompts(11, LENGTHS) if isinstance(prompts, tuple) else prompts
    return rgtg_fast.generate_many(zoo.lm("llama"), prompts, **given | options)


def tokens_of(answers):
    got = {answer.index: answer.error or answer.tokens for answer in answers}
    return [got[index] for index in sorted(got)]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "half": lambda: default_dtype(torch.float16),
    "double": lambda: default_dtype(torch.float64),
}


@pytest.mark.parametrize("way", ["rows", "batches"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_modes_that_come_and_go_between_two_answers(mode, first, way):
    """In inference mode the cache was made of tensors that could not be written to outside of it;
    with autocast for a part of the answers, it had two dtypes."""
    options = {"temperature": torch.linspace(0.5, 1.7, 5)}
    if way == "batches":
        options["reward_model"] = tiny.CountingScorer(torch.linspace(-2, 2, zoo.VOCAB))
    with pytest.warns(UserWarning) if way == "batches" else contextlib.nullcontext():
        want = tokens_of(begun(**options))
        answers, got = begun(**options), []
        for i in itertools.count():
            with MODES[mode]() if (i % 2 == 0) is first else contextlib.nullcontext():
                answer = next(answers, None)
            if answer is None:
                break
            got.append(answer)
    assert tokens_of(got) == want


def test_autocast_of_the_beginning_stays():
    with torch.autocast("cpu", torch.bfloat16):
        want = tokens_of(begun())
        answers = begun()
    assert tokens_of(answers) == want


def test_prompts_run_under_the_modes_of_whoever_asks_for_answers():
    seen = []

    def prompts():
        for prompt in zoo.prompts(11, LENGTHS):
            seen.append(torch.is_grad_enabled())
            yield prompt

    tokens_of(begun(prompts()))
    with torch.no_grad():
        tokens_of(begun(prompts()))
    assert seen == [True] * 5 + [False] * 5


def test_lists_of_ids_under_another_default_device():
    want, prompts = tokens_of(begun()), [p.tolist() for p in zoo.prompts(11, LENGTHS)]
    with torch.device("meta"):
        assert tokens_of(begun(prompts)) == want


@pytest.mark.parametrize(
    "prompts",
    ["hello", b"hello", torch.tensor([5, 6]), torch.tensor(5), {"input_ids": [[5]]}, None, 5],
    ids=["text", "bytes", "ids", "an id", "an encoding", "none", "a number"],
)
def test_one_prompt_is_not_taken_for_several(prompts):
    """A text gave an answer for each letter, an encoding one for each of its names."""
    with pytest.raises(ValueError, match=r"prompts must be an iterable .* pass a list"):
        begun(prompts, tokenizer=tiny.tokenizer())


def test_a_matrix_is_a_prompt_in_each_row():
    rows = torch.stack([torch.arange(5, 9), torch.arange(9, 13)])
    assert tokens_of(begun(rows)) == tokens_of(begun(rows.tolist()))


@pytest.mark.parametrize("bad", ["meta", "sparse"])
def test_a_tensor_without_ids_takes_no_other_prompt_with_it(bad):
    good = torch.tensor([5, 6])
    odd = good.to("meta") if bad == "meta" else good.to_sparse()
    first, error, last = tokens_of(begun([good, odd, good]))
    assert "without ids" in error and len(first) and len(last)


@pytest.mark.parametrize("name", ["beta", "temperature", "seed"])
@pytest.mark.parametrize("count", [0, 3, 7])
def test_values_of_prompts_are_counted_before_the_first(name, count):
    values = torch.ones(count) if name != "seed" else torch.arange(count)
    with pytest.raises(ValueError, match=f"{name} has {count} values for 5 prompts"):
        begun(**{name: values})
    if count == 3:  # of prompts that cannot be counted only those without a value fail
        answers = tokens_of(begun(iter(zoo.prompts(11, LENGTHS)), **{name: values}))
        assert [isinstance(answer, str) for answer in answers] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "gpt2"}, "tokenizer must be"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
        ({"eos_token_id": [1.5]}, "eos_token_id="),
        ({"logits_processor": max}, r"logits_processor must be a list"),
        ({"stopping_criteria": max}, r"stopping_criteria must be a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_of_another_kind_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        begun(**options)


@pytest.mark.parametrize("model", [None, "gpt2", torch.nn.Linear(2, 2)])
def test_what_is_no_language_model_is_refused(model):
    with pytest.raises(ValueError, match="model must be a causal language model"):
        rgtg_fast.generate_many(model, [[5]], reward_model=zoo.rm("gpt2"))


def test_two_runs_in_turns():
    want = tokens_of(begun())
    pairs = list(itertools.zip_longest(begun(), begun()))
    assert [tokens_of(run) for run in zip(*pairs, strict=True)] == [want, want]


def test_a_scorer_serves_one_run_whichever_thread_reads_it():
    scorer = make_scorer(zoo.rm("gpt2"), k=4)
    want, answers = tokens_of(begun()), begun(reward_model=scorer)
    got = [next(answers)]
    with pytest.raises(ValueError, match="generate_many that this thread has begun"):
        next(begun(reward_model=scorer))

    def elsewhere():
        got.append(next(answers))
        try:
            next(begun(reward_model=scorer))  # would wait for itself
        except ValueError as error:
            refused.append(error)

    refused: list[ValueError] = []
    thread = threading.Thread(target=elsewhere, daemon=True)
    thread.start()
    thread.join(60)
    assert len(refused) == 1
    refused.clear()  # its traceback holds the refused call
    waiting = threading.Thread(target=lambda: got.append(tokens_of(begun(reward_model=scorer))))
    waiting.start()  # another thread than the reader's waits for its end
    got += answers
    waiting.join(60)
    gc.collect()
    assert not waiting.is_alive() and id(scorer) not in turns._in_use
    by_hand = [answer for answer in got if not isinstance(answer, list)]
    assert tokens_of(by_hand) == want and want in [x for x in got if isinstance(x, list)]


@pytest.mark.parametrize("positions", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_interrupt_anywhere_leaves_models_and_scorer_as_they_were(positions):
    scorer, prompts = make_scorer(zoo.rm("gpt2"), k=4), zoo.prompts(11, (4, 2, 3))
    models = zoo.lm("llama"), zoo.rm("gpt2")
    want = tokens_of(begun(prompts))

    def answers():
        tokens_of(begun(prompts, max_new_tokens=2, reward_model=scorer))

    leave_nothing(answers, models, scorer, positions)
    assert tokens_of(begun(prompts, reward_model=scorer)) == want
