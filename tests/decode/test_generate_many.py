"""`generate_many`: every answer is that of `generate` for its prompt alone, whatever comes and goes
beside it."""

import gc
import itertools
import sys
import threading
import warnings
import weakref

import pytest
import tiny
import torch
import zoo
from lora_checkpoints import make_checkpoint

import rgtg_fast
from rgtg_fast import ops
from rgtg_fast.decode import refill
from rgtg_fast.scorers import AttentionCreditScorer

slow = pytest.mark.slow
LENGTHS = (9, 2, 14, 5, 5, 1, 11, 3, 7, 13)
COMMON = {"k": 4, "max_new_tokens": 12, "eos_token_id": zoo.EOS, "pad_token_id": zoo.PAD}
COMMON |= {"sequence_bias": {(zoo.EOS,): 2.0}}  # answers of many lengths


def one_by_one(lm, prompts, seed=3, **options):
    """The answers of `generate`, each prompt in a call by itself."""
    options = COMMON | options
    rows = []
    for i, prompt in enumerate(prompts):
        own = {"seed": ops.split_seed(seed, i + 1)[i:]}
        for name in ("beta", "temperature", "max_new_tokens"):
            if isinstance(options.get(name), torch.Tensor):
                own[name] = options[name][i].item()
        out = rgtg_fast.generate(lm, prompt[None], return_dict_in_generate=True, **options | own)
        tokens = out.sequences[0, len(prompt) :].tolist()
        rows.append((tokens, out.rewards[0], out.kl[0]))
    return rows


def assert_same(lm, prompts, seed=3, batch_size=3, refills=True, **options):
    """Compares the two; the order in which the answers came."""
    want = one_by_one(lm, prompts, seed, **options)
    options = COMMON | options
    with warnings.catch_warnings():
        if refills:
            warnings.filterwarnings("error", "generate_many goes through")
        many = rgtg_fast.generate_many(lm, prompts, batch_size=batch_size, seed=seed, **options)
        got = list(many)
    assert sorted(answer.index for answer in got) == list(range(len(prompts)))
    for answer in got:
        tokens, rewards, kl = want[answer.index]
        assert answer.error is None
        assert answer.tokens == tokens, f"prompt {answer.index}"
        torch.testing.assert_close(torch.tensor(answer.rewards), rewards, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(
            torch.tensor(answer.kl), kl, atol=2e-4, rtol=1e-4, equal_nan=True
        )
    return [answer.index for answer in got]


def prompts(lengths=LENGTHS):
    return zoo.prompts(11, lengths)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    ("lm", "rm"),
    [
        ("llama", "gpt2"),
        *(pytest.param(*pair, marks=slow) for pair in (("gpt2", "gemma3"), ("gemma3", "bloom"))),
    ],
)
def test_answers_are_those_of_each_prompt_alone(lm, rm, do_sample):
    options = {"do_sample": do_sample, "beta": 2.0}
    order = assert_same(zoo.lm(lm), prompts(), reward_model=zoo.rm(rm), **options)
    assert order != sorted(order), "answers should end in another order than they began"


@pytest.mark.parametrize("kind", ["head", "adapter", "credit", "encoder", "masked"])
def test_every_way_to_score_refills(kind, tmp_path):
    lm = zoo.lm("llama")
    if kind == "adapter":
        _, lm = make_checkpoint(tmp_path)
        rm = rgtg_fast.RewardAdapter.from_pretrained(lm, tmp_path)
    elif kind == "head":
        rm = rgtg_fast.RewardHead(lm, torch.linspace(-1, 1, 32))
    elif kind == "credit":
        rm = AttentionCreditScorer(zoo.rm("gpt2"), share=0.3)
    else:
        rm = zoo.rm("bert" if kind == "encoder" else "gpt_oss")
    assert_same(lm, prompts(LENGTHS[:6]), reward_model=rm, do_sample=True, batch_size=2)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": torch.linspace(0, 3, 6), "temperature": torch.linspace(0.5, 2, 6)},
        {"max_new_tokens": torch.tensor([1, 9, 3, 12, 2, 7])},
        {"min_new_tokens": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"top_k": 6, "top_p": 0.9, "temperature": 1.5},
        {"reward_range": (-1.0, 1.0)},
        {"eos_reward": "previous"},
        {"max_new_tokens": None, "max_length": 16},
        {"eos_token_id": [zoo.EOS, 7, 9]},
        {"check_nan": False, "sync_every": 5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_are_each_rows_own(options):
    assert_same(
        zoo.lm("llama"),
        prompts(LENGTHS[:6]),
        reward_model=zoo.rm("llama"),
        do_sample=True,
        **options,
    )


@pytest.mark.parametrize(
    "batch_size", [1, pytest.param(2, marks=slow), pytest.param(64, marks=slow)]
)
def test_any_batch_size(batch_size):
    options = {"reward_model": zoo.rm("llama"), "batch_size": batch_size, "do_sample": True}
    order = assert_same(zoo.lm("gpt2"), prompts(), **options)
    assert batch_size > 1 or order == sorted(order)


def test_texts_are_encoded_and_decoded_and_stop_at_strings():
    lm, rm, tokenizer = tiny.llama_lm(), tiny.llama_rm(), tiny.tokenizer()
    texts = ["hello", "the parcel will arrive", "sorry for the delay!", "thank you"]
    options = {"reward_model": rm, "k": 4, "max_new_tokens": 9, "tokenizer": tokenizer}
    options["stop_strings"] = ["e", "o"]
    rows = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]
    got = list(rgtg_fast.generate_many(lm, iter(texts), batch_size=2, **options))
    for answer in got:
        (ids,) = rgtg_fast.generate(lm, rows[answer.index][None], **options)
        assert answer.tokens == ids[len(rows[answer.index]) :].tolist()
        assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)


def test_prompts_are_read_when_there_is_room():
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield [5 + i % 50, 9]

    options = COMMON | {"reward_model": zoo.rm("llama")}
    answers = rgtg_fast.generate_many(zoo.lm("llama"), endless(), batch_size=4, **options)
    assert read == []
    first = [next(answers) for _ in range(6)]
    assert len(read) <= 6 + 4 + 1 and len({answer.index for answer in first}) == 6
    answers.close()


def test_a_prompt_that_cannot_be_answered_takes_no_other_with_it():
    lm, rm = tiny.gpt2_lm(), tiny.gpt2_rm()  # 64 positions
    good = [5, 6, 7]
    bad = [
        [],
        [5, 10**6],
        [-1, 3],
        [9] * 60,
        3.5,
        None,
        "text",
        torch.zeros(1, 2).long(),
        [1.5, 2.0],
    ]
    given = [good, *itertools.chain(*([prompt, good] for prompt in bad))]
    options = {"reward_model": rm, "k": 4, "max_new_tokens": 6}
    answers = list(rgtg_fast.generate_many(lm, given, batch_size=4, **options))
    by_index = {answer.index: answer for answer in answers}
    assert sorted(by_index) == list(range(len(given)))
    want = rgtg_fast.generate(lm, torch.tensor([good]), **options)[0, 3:].tolist()
    for i, prompt in enumerate(given):
        if prompt is good:
            assert by_index[i].tokens == want and by_index[i].error is None
        else:
            assert by_index[i].tokens == [] and by_index[i].error, prompt
    assert "empty" in by_index[1].error
    assert "1000000" in by_index[3].error
    assert "64 positions" in by_index[7].error
    assert "tokenizer=" in by_index[13].error


def test_a_row_with_nan_ends_alone():
    class Poisoned:
        def __init__(self):
            self.scorer = rgtg_fast.scorers.make_scorer(zoo.rm("llama"), k=4)

        def __getattr__(self, name):
            return getattr(self.scorer, name)

        def score(self, ids, keep=None, handles=None):
            rewards = self.scorer.score(ids)
            rewards[[handle == 2 for handle in self.scorer.handles]] = torch.nan
            return rewards

    options = COMMON | {"reward_model": Poisoned(), "max_new_tokens": 4}
    answers = list(rgtg_fast.generate_many(zoo.lm("gpt2"), prompts(), batch_size=4, **options))
    assert [a.index for a in answers if a.error] == [2]
    (bad,) = (a for a in answers if a.error)
    assert "step 0: the reward model gave [nan" in bad.error
    want = one_by_one(zoo.lm("gpt2"), prompts(), reward_model=zoo.rm("llama"), max_new_tokens=4)
    assert all(a.tokens == want[a.index][0] for a in answers if not a.error)


@pytest.mark.parametrize("end", ["close", "error", "interrupt", "prompts"])
def test_nothing_is_held_after_the_end(end, monkeypatch):
    def given():
        yield from prompts()
        if end == "prompts":
            raise RuntimeError("no more")

    rm = zoo.rm("llama")
    answers = rgtg_fast.generate_many(
        zoo.lm("llama"), given(), batch_size=3, reward_model=rm, **COMMON
    )
    caches = []
    advance = refill.Refill.advance

    def watched(self):
        caches.extend(weakref.ref(cache) for cache in self.call.caches() if len(caches) < 2)
        if len(caches) and end in ("error", "interrupt") and self.rows[0].entry.index > 2:
            raise KeyboardInterrupt if end == "interrupt" else RuntimeError("no more")
        return advance(self)

    monkeypatch.setattr(refill.Refill, "advance", watched)
    gc.disable()
    try:
        next(answers)
        if end == "close":
            answers.close()
        else:
            with pytest.raises(KeyboardInterrupt if end == "interrupt" else RuntimeError):
                list(answers)
        del answers
        assert len(caches) == 2
        assert [cache() for cache in caches] == [None, None]
    finally:
        gc.enable()


def test_two_threads_on_the_same_models():
    lm, rm, got = zoo.lm("llama"), zoo.rm("gemma3"), {}

    def run(seed):
        options = COMMON | {"reward_model": rm, "do_sample": True, "seed": seed}
        many = rgtg_fast.generate_many(lm, prompts(LENGTHS[:6]), batch_size=2, **options)
        got[seed] = {answer.index: answer.tokens for answer in many}

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (3, 4):
        want = one_by_one(lm, prompts(LENGTHS[:6]), seed, reward_model=rm, do_sample=True)
        assert [got[seed][i] for i in range(6)] == [tokens for tokens, _, _ in want]


def test_longer_prompts_than_at_first_are_probed_for(monkeypatch):
    monkeypatch.setattr(sys.modules["rgtg_fast.generate_many"], "FIRST_BOUND", 20)
    calls = []
    real = rgtg_fast.guided.RewardGuided.make_scorer

    def counted(self, rm, as_text, bound, *rest):
        calls.append(bound)
        return real(self, rm, as_text, bound, *rest)

    monkeypatch.setattr(rgtg_fast.guided.RewardGuided, "make_scorer", counted)
    lengths = (5, 6, 20, 4, 40, 3)
    got = rgtg_fast.generate_many(
        zoo.lm("mistral"), prompts(lengths), batch_size=2, reward_model=zoo.rm("mistral"), **COMMON
    )
    tokens = {answer.index: answer.tokens for answer in got}
    assert calls == [20, 64]
    want = one_by_one(zoo.lm("mistral"), prompts(lengths), reward_model=zoo.rm("mistral"))
    assert [tokens[i] for i in range(6)] == [row[0] for row in want]


def test_a_prompt_whose_own_length_does_not_fit_takes_no_other_with_it():
    lm, rm = tiny.gpt2_lm(), tiny.gpt2_rm()  # 64 positions
    lengths = torch.tensor([3, 62, 1])
    many = rgtg_fast.generate_many(lm, [[5, 6, 7]] * 3, reward_model=rm, max_new_tokens=lengths)
    answers = sorted(many, key=lambda answer: answer.index)
    assert [len(answer.tokens) for answer in answers] == [3, 0, 1]
    assert "max_new_tokens<=61" in answers[1].error


@pytest.mark.parametrize("why", [pytest.param("cache", marks=slow), "scorer"])
def test_padded_batches_where_rows_cannot_come_and_go(why):
    lm = zoo.lm("bloom" if why == "cache" else "llama")
    rm = (
        zoo.rm("llama") if why == "cache" else tiny.CountingScorer(torch.linspace(-2, 2, zoo.VOCAB))
    )
    options = {"reward_model": rm, "do_sample": True, "min_new_tokens": 2}
    with pytest.warns(UserWarning, match="padded batches of 3") as caught:
        order = assert_same(lm, prompts(), refills=False, **options)
    assert len([w for w in caught if "padded batches" in str(w.message)]) == 1
    assert order == sorted(order)
    del options["min_new_tokens"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(lm, prompts(), refills=False, **options)
        options["max_new_tokens"] = torch.arange(1, 11)
        assert_same(lm, prompts(), refills=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 2}, "several times"),
        ({"attention_mask": torch.ones(1, 2)}, "without padding"),
        ({"streamer": object()}, "in the order they end"),
        ({"speculate": 4}, "one token at a time"),
        ({"cuda_graph": True}, "come and go"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"k": 1000}, "k=1000"),
        ({"temperature": -1.0}, "temperature"),
        ({"num_beams": 3}, "num_beams"),
        ({"betta": 1.0}, "did you mean beta"),
        ({"top_p": 1.5, "do_sample": True}, "top_p"),
        ({"max_new_tokens": 500}, "128 positions"),
        ({"max_new_tokens": torch.tensor([3, 0])}, "at least 1 for each"),
        ({"max_new_tokens": torch.tensor([2.5])}, "an int64 tensor"),
        ({"reward_model": zoo.lm("gpt2")}, "language model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_are_refused_before_a_prompt_is_read(options, message):
    def never():
        raise AssertionError("read")
        yield

    options = COMMON | {"reward_model": zoo.rm("llama")} | options
    with pytest.raises(ValueError, match=message):
        rgtg_fast.generate_many(zoo.lm("llama"), never(), **options)
