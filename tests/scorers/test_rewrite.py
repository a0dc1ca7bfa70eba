"""Sequence-to-sequence rewards, against forwards in float64 of prompt, draft, separator and answer,
without cache or padding."""

from __future__ import annotations

import copy
import functools
import gc
import random
import warnings
import weakref
from typing import Any

import pytest
import torch
import zoo
from schedules import Schedule

import rgtg_fast
from rgtg_fast import Reward, WeightedRewards
from rgtg_fast.scorers import RewriteScorer
from rgtg_fast.scorers.rewrite import greedy_answers

BETA, STEPS, SEPARATOR = 0.8, 7, 5
PROMPTS = zoo.prompts(11, (6, 2, 9))
DRAFTS = [[7, 8, 9, zoo.EOS], [], [10, 11]]  # EOS at the end is not of the draft
FIXED = {"max_new_tokens": STEPS, "pad_token_id": zoo.PAD, "eos_token_id": zoo.EOS, "beta": BETA}
FIXED |= {"return_dict_in_generate": True}


@functools.cache
def _double(family: str) -> Any:
    return copy.deepcopy(zoo.lm(family)).double()


@torch.no_grad()
def logp(family: str, ids: list[int]) -> torch.Tensor:
    """Of the next token, float64 [V]."""
    text = torch.tensor([ids])
    return _double(family)(text, use_cache=False).logits[0, -1].log_softmax(-1)


def greedy(family: str, prompt: list[int], steps: int = STEPS, ends: Any = (zoo.EOS,)) -> list[int]:
    answer: list[int] = []
    while len(answer) < steps:
        token = int(logp(family, prompt + answer).argmax())
        if token in ends:
            break
        answer.append(token)
    return answer


def by_hand(lm: str, rm: str, prompt: torch.Tensor, draft: list[int], separator: int) -> list[int]:
    """The greedy answer by log π + β log p_r(v | prompt, draft, separator, answer), with EOS."""
    start, answer = prompt.tolist(), []
    while len(answer) < STEPS:
        rewriting = logp(rm, start + draft + [separator] + answer)
        scores = logp(lm, start + answer) + BETA * rewriting
        scores[zoo.PAD] = -torch.inf  # suppressed by zoo's configuration, which drafts do not read
        answer.append(int(scores.argmax()))
        if answer[-1] == zoo.EOS:
            break
    return answer


def check(out: Any, want: list[list[int]]) -> None:
    width = max(map(len, PROMPTS))
    for row, tokens in enumerate(want):
        got = out.sequences[row, width:].tolist()
        assert got[: len(tokens)] == tokens and not any(got[len(tokens) :]), (row, got, tokens)


def guided(lm: str, reward: Any, **more: Any) -> Any:
    inputs = zoo.left_pad(PROMPTS)
    return rgtg_fast.generate(zoo.lm(lm), **inputs, reward_model=reward, **FIXED | more)


FAMILIES = [("llama", "llama"), ("llama", "gpt2"), ("bloom", "gemma3")]
MORE = [("llama", "bloom"), ("gpt2", "mistral"), ("gemma3", "gptj"), ("opt", "gpt_neox")]
EVERY = [{"k": None}, {"k": 5, "candidates": "sum"}]


@pytest.mark.parametrize("how", EVERY, ids=["all", "sum"])
@pytest.mark.parametrize(
    ("lm", "rm"), FAMILIES + [pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE]
)
def test_answers_are_those_of_whole_forwards_behind_the_drafts_given(lm, rm, how):
    drafts = [torch.tensor(DRAFTS[0]), *DRAFTS[1:]]
    out = guided(lm, RewriteScorer(zoo.lm(rm), drafts, separator=SEPARATOR), **how)
    drafts = [[i for i in draft if i != zoo.EOS] for draft in DRAFTS]
    pairs = zip(PROMPTS, drafts, strict=True)
    check(out, [by_hand(lm, rm, prompt, draft, SEPARATOR) for prompt, draft in pairs])


@pytest.mark.parametrize(
    ("lm", "rm"), FAMILIES + [pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE]
)
def test_without_drafts_the_language_models_own_greedy_answers_are_rewritten(lm, rm):
    out = guided(lm, zoo.lm(rm), reward_kind="seq2seq", k=None)
    check(out, [by_hand(lm, rm, p, greedy(lm, p.tolist()), zoo.EOS) for p in PROMPTS])
    text = PROMPTS[0].tolist()
    want = logp(rm, [*text, *greedy(lm, text), zoo.EOS])[out.sequences[0, 9]]
    torch.testing.assert_close(out.rewards[0, 0].double(), want, rtol=1e-4, atol=1e-4)


def test_other_candidates_and_another_draft_give_another_answer():
    """What the tests above compare is not the same for every draft."""
    answers = {
        tuple(guided("llama", RewriteScorer(zoo.lm("gpt2"), [d] * 3), k=None).sequences[0].tolist())
        for d in ([7, 8, 9], [10, 11], [])
    }
    assert len(answers) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_greedy_answers_end_by_themselves(family):
    prompts = zoo.prompts(3, (4, 9, 1, 6))
    ends = frozenset(range(1, 16))  # so that rows end at many steps
    steps = [5, 12, 12, 1]
    got = greedy_answers(zoo.lm(family), prompts, steps, ends, zoo.VOCAB)
    want = [greedy(family, p.tolist(), n, ends) for p, n in zip(prompts, steps, strict=True)]
    assert [answer.tolist() for answer in got] == want
    assert len({len(answer) for answer in want}) > 1


@pytest.mark.parametrize("given", [False, True])
def test_each_prompt_of_many_has_its_own_draft(given):
    prompts = zoo.prompts(5, (4, 9, 1, 6, 3))
    chance = random.Random(0)
    drafts = [[chance.randrange(3, zoo.VOCAB) for _ in range(n)] for n in (3, 0, 8, 1, 5)]
    options = {**FIXED, "k": None, "do_sample": True, "top_k": 0, "sequence_bias": {(1,): 2.0}}
    del options["return_dict_in_generate"]
    lm, rm = zoo.lm("llama"), zoo.lm("gpt2")
    scorer = RewriteScorer(rm, drafts if given else None)
    seeds = rgtg_fast.ops.split_seed(3, len(prompts))
    many = rgtg_fast.generate_many(
        lm, prompts, reward_model=scorer, batch_size=2, seed=seeds, **options
    )
    got = {answer.index: answer for answer in many}
    for i, prompt in enumerate(prompts):
        alone = RewriteScorer(rm, [drafts[i]] if given else None)
        one = seeds[i : i + 1]
        out = rgtg_fast.generate(lm, prompt[None], reward_model=alone, seed=one, **options)
        assert got[i].error is None and got[i].tokens == out[0, len(prompt) :].tolist()


def test_a_prompt_without_a_draft_takes_no_other_with_it():
    scorer = RewriteScorer(zoo.lm("gpt2"), DRAFTS[:2])
    options = {"k": 4, "max_new_tokens": 3, "reward_model": scorer}
    got = list(rgtg_fast.generate_many(zoo.lm("llama"), PROMPTS, **options))
    errors = {answer.index: answer.error for answer in got}
    assert errors[0] is None and errors[1] is None
    assert "drafts has 2 drafts, and this is prompt 2" in errors[2]


def test_prompts_in_padded_batches_keep_their_drafts():
    """A language model on Hugging Face's own cache."""
    lm, rm = zoo.lm("bloom"), zoo.lm("gpt2")
    drafts = [[7, 8, 9], [30], [10, 11]]
    options = {"k": 4, "max_new_tokens": STEPS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        reward = RewriteScorer(rm, drafts) + WeightedRewards([Reward(rm, reward_kind="genarm")])
        many = list(
            rgtg_fast.generate_many(lm, PROMPTS, reward_model=reward, batch_size=2, **options)
        )
    for answer in many:
        alone = RewriteScorer(rm, [drafts[answer.index]]) + Reward(rm, reward_kind="genarm")
        prompt = PROMPTS[answer.index]
        out = rgtg_fast.generate(lm, prompt[None], reward_model=alone, **options)
        assert answer.tokens == out[0, len(prompt) :].tolist()


def test_prompts_in_padded_batches_have_drafts_of_their_own_length():
    lm, rm = zoo.lm("bloom"), zoo.lm("gpt2")
    options = {"k": 4, "max_length": 13, "reward_model": rm, "reward_kind": "seq2seq"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        many = list(rgtg_fast.generate_many(lm, PROMPTS, batch_size=3, **options))
    for answer in many:
        prompt = PROMPTS[answer.index]
        out = rgtg_fast.generate(lm, prompt[None], **options)
        assert answer.tokens == out[0, len(prompt) :].tolist()


def test_a_sum_that_is_asked_lazily_has_the_drafts_too():
    reward = 0.5 * RewriteScorer(zoo.lm("gpt2"), DRAFTS) + 0.5 * Reward(
        zoo.lm("gpt2"), reward_kind="genarm"
    )
    eager = guided("llama", reward, k=5)
    lazy = guided("llama", reward, k=5, min_entropy=1e-9)
    assert torch.equal(eager.sequences, lazy.sequences)


def test_several_answers_to_a_prompt_share_its_draft():
    scorer = RewriteScorer(zoo.lm("gpt2"), DRAFTS)
    seeds = torch.arange(6)
    how = {"k": None, "do_sample": True, "top_k": 0}
    out = guided("llama", scorer, num_return_sequences=2, seed=seeds, **how)
    for copy_ in (0, 1):
        one = guided("llama", scorer, seed=seeds[copy_::2], **how)
        n = min(one.sequences.shape[1], out.sequences.shape[1])
        assert torch.equal(out.sequences[copy_::2, :n], one.sequences[:, :n])


class ByPrompt(RewriteScorer):
    """Whose draft is a function of the prompt."""

    def _with_drafts(self, prompts):
        return [torch.cat([p, *self.behind(p)]) for p in prompts]

    @staticmethod
    def behind(prompt):
        n = int(prompt[0]) % 4
        return prompt.flip(0)[:n], torch.tensor([SEPARATOR])


class WithinAnswers(Schedule):
    """Rows are not cut within their prompts."""

    def _crop(self, chance):
        handles = self._some(chance)
        lengths = [chance.randint(self.rows[h][1], self._length(h)) for h in handles]
        given = torch.tensor(lengths, dtype=torch.int64) if chance.random() < 0.5 else lengths
        self.scorer.crop(handles, given)
        for handle, length in zip(handles, lengths, strict=True):
            tokens, prompt = self.rows[handle]
            self.rows[handle] = (tokens[:length], prompt)
        return handles


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_rows_come_and_go(family):
    lm = zoo.lm(family)

    def full(ids, prompt):
        text = torch.cat([ids[0, :prompt], *ByPrompt.behind(ids[0, :prompt]), ids[0, prompt:-1]])
        return lm(text[None]).logits[0, -1].log_softmax(-1)[ids[:, -1]]

    chance = random.Random(1)
    operations = ("join", "leave", "extend", "crop", "score", "step", "step", "late")
    for prefilled in (0, 1, 3):
        for _ in range(4):
            schedule = [(chance.choice(operations), chance.randrange(2**20)) for _ in range(14)]
            scorer = ByPrompt(lm, separator=SEPARATOR)
            WithinAnswers(scorer, full).run(schedule, prefilled)


def test_a_row_is_not_cut_within_its_prompt():
    scorer = RewriteScorer(zoo.lm("llama"), DRAFTS)
    handles = scorer.join(PROMPTS)
    scorer.crop(handles, [6, 2, 9])
    with pytest.raises(ValueError, match=r"within their prompts, of \[9\] tokens"):
        scorer.crop(handles[2:], [8])
    with pytest.raises(ValueError, match=r"lengths=\[7\] for rows of \[6\] tokens"):
        scorer.crop(handles[:1], [7])


def test_texts_are_encoded_and_a_separator_may_be_named():
    class Letters:
        def get_vocab(self):
            return {chr(97 + i): i for i in range(zoo.VOCAB)}

        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [ord(c) - 97 for c in text]}

    scorer = RewriteScorer(zoo.lm("gpt2"), ["hij", ""], separator="f", tokenizer=Letters())
    assert [draft.tolist() for draft in scorer.drafts] == [[7, 8, 9], []]
    assert scorer.separator == 5
    with pytest.raises(ValueError, match="separator='zz' is no token of GPT2LMHeadModel"):
        RewriteScorer(zoo.lm("gpt2"), separator="zz", tokenizer=Letters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafts": ["no"]}, r"drafts\[0\] is a text; pass tokenizer="),
        ({"drafts": "no"}, "drafts is str; pass a list"),
        ({"drafts": torch.ones(2, 2)}, "drafts is Tensor; pass a list"),
        ({"drafts": 3}, "drafts is int; pass a list"),
        ({"drafts": [3]}, r"drafts\[0\]=3 is no draft"),
        ({"drafts": [[3], [0.5]]}, r"drafts\[1\]=\[0.5\] is no draft"),
        ({"drafts": [[2**80]]}, r"drafts\[0\]=\[\d+\] is no draft"),
        ({"drafts": [torch.ones(1, 1).long()]}, r"drafts\[0\]=tensor.* is no draft"),
        ({"drafts": [[3, 72]]}, r"drafts\[0\] has ids from 3 to 72, and the model has 72 tokens"),
        ({"drafts": [[-1]]}, r"drafts\[0\] has ids from -1"),
        ({"separator": 72}, "separator=72 is no token"),
        ({"separator": True}, "separator=True is no token"),
        ({"separator": "f"}, "separator='f' is no token.*without tokenizer="),
    ],
)
def test_what_is_no_draft_or_no_separator_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        RewriteScorer(zoo.lm("gpt2"), **options)


def test_another_number_of_drafts_than_prompts_is_refused():
    for drafts in (DRAFTS[:1], [*DRAFTS, [3]]):
        with pytest.raises(ValueError, match=rf"drafts has {len(drafts)} drafts for 3 prompts"):
            guided("llama", RewriteScorer(zoo.lm("gpt2"), drafts), k=None)


def test_no_draft_and_nobody_to_make_one_is_refused():
    scorer = RewriteScorer(zoo.lm("gpt2"))
    with pytest.raises(ValueError, match="drafts is None, and no language model decodes"):
        scorer.join(PROMPTS)
    own = zoo.left_pad(PROMPTS)["input_ids"]
    with pytest.raises(ValueError, match=r"pass RewriteScorer\(rm, drafts=...\)"):
        guided("llama", scorer, reward_input_ids=own, reward_attention_mask=(own != 0).long())
    model = copy.deepcopy(zoo.lm("gpt2"))
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"separator is to be the model's EOS.*has none"):
        RewriteScorer(model)


def test_a_draft_that_does_not_fit_is_refused_before_work_starts():
    scorer = RewriteScorer(zoo.lm("gpt2"), [[3], [4] * 120, [5]])
    with pytest.raises(
        ValueError, match=r"9 tokens, a draft of up to 120, .* 7 new tokens make 137"
    ):
        guided("llama", scorer)
    with pytest.raises(ValueError, match=r"a draft of up to 60, .* reward_model has 128 positions"):
        guided("llama", zoo.lm("gpt2"), reward_kind="seq2seq", max_new_tokens=60)


def test_nothing_of_a_call_stays_on_the_scorer():
    lm = copy.deepcopy(zoo.lm("llama"))
    scorer = RewriteScorer(zoo.lm("gpt2"))
    before = set(scorer.__dict__)
    inputs = zoo.left_pad(PROMPTS)
    first = rgtg_fast.generate(lm, **inputs, reward_model=scorer, **FIXED | {"k": None})
    assert set(scorer.__dict__) <= before | {"capacity", "reserved"}
    with pytest.raises(ValueError, match="beta"):
        rgtg_fast.generate(lm, **inputs, reward_model=scorer, **FIXED | {"beta": torch.ones(2)})
    again = rgtg_fast.generate(lm, **inputs, reward_model=scorer, **FIXED | {"k": None})
    assert torch.equal(first.sequences, again.sequences)
    gone = weakref.ref(lm)
    del lm
    gc.collect()
    assert gone() is None
