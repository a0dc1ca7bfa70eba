"""Backtracking with bad rewards and options, and what its draws must not depend on.

What all decoders of whole sequences have in common is attacked in test_sequence_attacks.py.
"""

import backspaces
import numpy as np
import pytest
import torch
import zoo
from backspaces import BACK
from sequence_rewards import Letters

import rgtg_fast
from rgtg_fast.scorers import RewriteScorer

PROMPTS = [[5, 6, 7], [9, 12, 13, 14, 15], [40, 41], [70, 71, 3, 4], [33, 34, 35]]
pytestmark = pytest.mark.filterwarnings("ignore:.*taken for the same with tokens added:UserWarning")


def begun(prompts=PROMPTS, **options):
    given = {"backspace_token_id": BACK, "reward_model": zoo.rm("gpt2"), "k": 5, "seed": 4}
    given |= {"max_new_tokens": 6, "eos_token_id": zoo.EOS, "pad_token_id": zoo.PAD}
    return rgtg_fast.backtracking(backspaces.lm(), prompts, **given | options)


def told(answers):
    """What is told of each prompt, but its cost."""
    found = {a.index: a.error or (a.tokens, a.steps, a.undone) for a in answers}
    return [found[index] for index in sorted(found)]


UNGUIDED = {"reward_model": None, "k": None}


@pytest.mark.parametrize("options", [{}, UNGUIDED], ids=["guided", "unguided"])
def test_answers_do_not_depend_on_the_batch_nor_on_the_order(options):
    """Rows back up at different steps, and prompts take the places of those that are done."""
    want = told(begun(batch_size=1, **options))
    assert len({undone for _, _, undone in want}) > 2 and len({steps for _, steps, _ in want}) > 2
    for batch_size in (2, 3, 64):
        assert told(begun(batch_size=batch_size, **options)) == want
    seeds = rgtg_fast.ops.split_seed(4, len(PROMPTS))
    assert told(begun(PROMPTS[::-1], seed=seeds.flip(0), **options)) == want[::-1]


@pytest.mark.parametrize("options", [{}, UNGUIDED], ids=["guided", "unguided"])
def test_rows_that_end_at_different_steps_with_every_option_on_are_those_alone(options):
    every = {"temperature": 0.8, "top_p": 0.95, "top_k": 30, "min_p": 0.001, "typical_p": 0.99}
    every |= {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 2}
    every |= {"bad_words_ids": [[8], [9, 10]], "suppress_tokens": [11], "max_new_tokens": 9}
    every |= {"eos_token_id": list(range(2, zoo.VOCAB, 5))}
    every |= {"tokenizer": Letters(), "max_steps": 20} | options
    want = told(begun(batch_size=1, **every))
    assert len({len(tokens) for tokens, *_ in want}) > 2 and any(undone for *_, undone in want)
    assert told(begun(batch_size=3, **every)) == want
    seeds = rgtg_fast.ops.split_seed(4, len(PROMPTS))
    assert told(begun(PROMPTS[::-1], seed=seeds.flip(0), batch_size=4, **every)) == want[::-1]


@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_without_a_backspace_an_answer_is_that_of_generate_many(beta):
    options = {"k": 5, "beta": beta, "seed": 4, "max_new_tokens": 6, "eos_token_id": zoo.EOS}
    options |= {"pad_token_id": zoo.PAD, "suppress_tokens": [BACK]}
    plain = rgtg_fast.generate_many(
        backspaces.lm(), PROMPTS, reward_model=zoo.rm("gpt2"), do_sample=True, top_k=0, **options
    )
    want = {answer.index: answer.tokens for answer in plain}
    got = {a.index: (a.tokens, a.undone, a.steps) for a in begun(**options)}
    assert got == {i: (tokens, 0, len(tokens)) for i, tokens in want.items()}


def test_temperature_makes_the_model_so_that_it_divides_beta_of_generate():
    plain = rgtg_fast.generate_many(
        backspaces.lm(), PROMPTS, reward_model=zoo.rm("gpt2"), do_sample=True, top_k=0, k=5,
        beta=1.5, temperature=0.7, seed=4, max_new_tokens=6, suppress_tokens=[BACK],
        pad_token_id=zoo.PAD, eos_token_id=zoo.EOS,
    )  # fmt: skip
    want = {answer.index: answer.tokens for answer in plain}
    got = begun(beta=1.5 / 0.7, temperature=0.7, suppress_tokens=[BACK])
    assert {answer.index: answer.tokens for answer in got} == want


@pytest.mark.parametrize("kind", ["classifier", "genarm", "text"])
def test_the_reward_model_never_sees_the_backspace(kind):
    """One that has a row for it."""
    seen, tokenizer = [], None
    if kind == "text":
        reward, tokenizer = (
            lambda texts: [float(seen.append(t) or len(t)) for t in texts],
            Letters(),
        )
    else:
        build = zoo.build_rm if kind == "classifier" else zoo.build_lm
        model = build("llama", vocab_size=zoo.VOCAB + 1)
        table = model.get_input_embeddings()

        class Watched(type(table)):
            def forward(self, ids):
                seen.append(ids.clone())
                return super().forward(ids)

        table.__class__ = Watched
        reward = model if kind == "classifier" else rgtg_fast.Reward(model, reward_kind="genarm")
    for k in (1, 5):
        answers = list(begun(reward_model=reward, tokenizer=tokenizer, k=k))
        assert sum(a.undone for a in answers) > 3 and not any(a.error for a in answers)
    assert len(seen) > 10
    if kind == "text":
        assert not any(chr(0x100 + BACK) in text for text in seen)
    else:
        assert not any((ids == BACK).any() for ids in seen)


@pytest.mark.parametrize("options", [{}, UNGUIDED], ids=["guided", "unguided"])
def test_what_shapes_the_logits_sees_the_text_as_it_stands(options):
    """Processors of scores alone run for all rows at once, others row by row, on what is left."""
    shapes = options | {"temperature": 1.3, "top_k": 12, "top_p": 0.95}
    both = [told(begun(**shapes, repetition_penalty=p)) for p in (1.0, 1.0 + 1e-9)]
    assert both[0] == both[1] and sum(undone for *_, undone in both[0]) > 3
    texts = []

    def noted(input_ids, scores):
        texts.append(input_ids[0].tolist())
        return scores

    answers = list(begun(PROMPTS[:1], logits_processor=[noted], **options))
    assert answers[0].undone > 0 and not any(BACK in text for text in texts)


def test_the_one_token_that_top_k_leaves_is_not_a_backspace_that_undoes_nothing():
    """Where π is cut to one token, that of the empty text is the best of the others."""
    for answer in begun(top_k=1, max_steps=3):
        assert answer.error is None and answer.steps == 3 and answer.undone <= 1


def test_an_answer_that_a_criterion_ended_is_not_taken_back():
    class AfterTwo:
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 3 + 2])

    for options in ({}, UNGUIDED):
        (answer,) = begun(PROMPTS[:1], stopping_criteria=[AfterTwo()], max_steps=99, **options)
        assert answer.error is None and len(answer.tokens) == 2


def test_steps_end_an_answer_as_it_stands():
    for most in (1, 2, 5):
        for answer in begun(max_steps=most):
            assert answer.steps <= most and answer.error is None
    for answer in begun(k=1):  # circles, of one candidate
        assert answer.steps <= 4 * 6
    of_prompts = torch.tensor([1, 2, 3, 4, 5])
    for answer in begun(k=1, max_new_tokens=of_prompts):
        assert answer.steps <= 4 * int(of_prompts[answer.index])


def test_a_reward_that_is_no_number_ends_its_prompt_alone():
    def of(value):
        return lambda texts: [value if text[0] == chr(0x100 + 9) else 1.0 for text in texts]

    good = told(begun(reward_model=of(1.0), tokenizer=Letters()))
    for value in (float("nan"), float("inf")):
        got = told(begun(reward_model=of(value), tokenizer=Letters()))
        assert "the reward of the prompt alone is" in got.pop(1)
        assert got == good[:1] + good[2:]
    ending = lambda texts: [float("nan") if len(t) > 6 else 1.0 for t in texts]  # noqa: E731
    got = told(begun(reward_model=ending, tokenizer=Letters(), suppress_tokens=[BACK, zoo.EOS]))
    assert all("the reward model gave" in told for told in got)


def test_a_candidate_whose_reward_is_minus_infinity_is_not_drawn():
    odd = lambda texts: [-float("inf") if ord(t[-1]) % 2 else 1.0 for t in texts]  # noqa: E731
    for answer in begun([[4, 6], [8, 12]], reward_model=odd, tokenizer=Letters(), k=20):
        assert answer.error is None and all(v % 2 == 0 for v in answer.tokens)
    none = lambda texts: [-float("inf") if len(t) > 2 else 1.0 for t in texts]  # noqa: E731
    for answer in begun([[4, 6], [8, 12]], reward_model=none, tokenizer=Letters()):
        assert "no candidate is possible" in answer.error


def test_a_prompt_whose_reward_is_not_known_is_told_so_and_takes_no_other_with_it():
    of_length = {"reward_model": lambda texts: [float(len(t)) for t in texts]}
    options = of_length | {"tokenizer": Letters()}
    want = told(begun(PROMPTS[:2], **options))
    seeds = torch.cat([rgtg_fast.ops.split_seed(4, 2), torch.tensor([1])])
    got = told(begun([*PROMPTS[:2], [9]], seed=seeds, **options))
    assert got[:2] == want and "pass a prompt of two tokens or more" in got[2]
    (answer,) = begun([[9]])  # known of a classifier
    assert answer.error is None
    (answer,) = begun([[9]], **UNGUIDED)
    assert answer.error is None and answer.reward is None


def test_a_prompt_with_a_backspace_in_it_is_refused():
    for options in ({}, UNGUIDED):
        got = told(begun([PROMPTS[0], [5, BACK, 6]], **options))
        assert f"prompt holds the backspace token {BACK}" in got[1] and len(got[0]) == 3


def test_a_token_that_the_tokenizer_takes_names_for_that_it_lacks_is_no_backspace():
    tokenizer = Letters()
    tokenizer.unk_token_id = BACK
    with pytest.raises(ValueError, match=f"backspace_token_id={BACK} is unk_token_id"):
        begun(tokenizer=tokenizer)


def test_another_token_than_the_one_a_model_was_trained_with_is_refused(monkeypatch):
    monkeypatch.setattr(backspaces.lm().config, "backspace_token_id", BACK, raising=False)
    with pytest.raises(
        ValueError, match=f"backspace_token_id=7, but model was trained with {BACK}"
    ):
        begun(backspace_token_id=7)
    assert told(begun())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backspace_token_id": "<backspace>"}, "backspace_token_id must be an int"),
        ({"backspace_token_id": None}, "backspace_token_id must be an int"),
        ({"backspace_token_id": True}, "backspace_token_id must be an int"),
        ({"backspace_token_id": -1}, "backspace_token_id=-1 is out of range"),
        ({"backspace_token_id": BACK + 1}, f"backspace_token_id={BACK + 1}, but model has 73"),
        ({"backspace_token_id": 10**30}, "but model has 73 tokens"),
        ({"backspace_token_id": zoo.EOS}, f"backspace_token_id={zoo.EOS} is eos_token_id"),
        ({"backspace_token_id": 7, "eos_token_id": [3, 7]}, "is eos_token_id"),
        ({"backspace_token_id": zoo.PAD}, "is pad_token_id"),
        ({"k": 0}, "k=0"),
        ({"k": 65}, "k=65"),
        ({"k": 10**30}, "k=1"),
        ({"k": None}, "k=None draws from the whole vocabulary, and reward_model"),
        ({"k": 2.0}, "k must be an int"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_steps": -(10**30)}, "max_steps=-1"),
        ({"max_steps": 2.5}, "max_steps must be an int"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"kl_budget": 1.0}, "kl_budget= is about guiding token by token"),
        ({"temperature": torch.ones(5)}, "temperature must be a number"),
        ({"num_return_sequences": 2}, "num_return_sequences="),
        ({"seed": torch.arange(2)}, "seed has 2 values for 5 prompts"),
        ({"max_step": 3}, "max_step= is not an argument"),
        ({"reward_model": RewriteScorer(zoo.lm("gpt2"))}, "its backspaces would be tokens"),
    ],
)
def test_options_out_of_range_are_refused_before_work_starts(options, message):
    with pytest.raises(ValueError, match=message):
        begun(**options)


def test_numpys_integers_are_integers():
    want = told(begun())
    assert told(begun(backspace_token_id=np.int64(BACK), k=np.int32(5))) == want


def test_steps_of_any_size_are_counted():
    assert told(begun(max_steps=10**30, batch_size=10**30, k=5, beta=0.2))


def test_logits_that_are_no_numbers_end_their_prompt_alone():
    def broken(input_ids, scores):
        return scores * float("nan") if input_ids[0, 0] == 9 else scores

    for options in ({}, UNGUIDED):
        want = told(begun(**options))
        got = told(begun(logits_processor=[broken], **options))
        assert "logits contain NaN" in got.pop(1) and got == want[:1] + want[2:]
