"""Backtracking against its rule, transcribed without batches and caches."""

import functools

import backspaces
import naive_sequences as naive
import pytest
import torch
import zoo
from backspaces import BACK
from oracle import public
from sequence_rewards import Letters, kinds

import rgtg_fast

STEPS = 7
EOS = list(range(2, zoo.VOCAB, 9))  # rows end at different steps
PROMPTS = [[5, 6, 7, 8, 11], [9, 12], [40, 41, 43], [70, 3]]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(is scored by|taken for the same with tokens added):UserWarning"
)


def answers(lm, prompts=PROMPTS, **options):
    given = {"backspace_token_id": BACK, "max_new_tokens": STEPS, "seed": 3}
    given |= {"eos_token_id": EOS, "pad_token_id": zoo.PAD, "tokenizer": Letters()}
    got = list(rgtg_fast.backtracking(lm, prompts, **given | options))
    assert [answer.error for answer in got] == [None] * len(prompts)
    return sorted(got, key=lambda answer: answer.index)


def rules(lm, oracle, prompts=PROMPTS, most=4 * STEPS, **rule):
    """For each prompt its world and what the transcription makes of it."""
    for prompt, seed in zip(prompts, naive.seeds_of(3, len(prompts)), strict=True):
        of_ids = functools.partial(oracle, first=len(prompt))
        world = naive.World(lm, of_ids, prompt, STEPS, EOS)
        yield world, *naive.backtrack(world, seed, BACK, most=most, **rule)


def check(answer, node, steps, undone):
    assert answer.tokens == node.tokens and answer.text == Letters().decode(node.tokens, True)
    assert (answer.steps, answer.undone) == (steps, undone)
    assert answer.steps == len(answer.tokens) + 2 * answer.undone
    assert answer.logprob == pytest.approx(node.logprob(), abs=1e-3)


def of_tree(ids, first):
    return public(zoo.rm("gpt2"))(ids)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("k, beta", [(1, 1.0), (2, 1.0), (8, 0.4), (20, 2.0)])
@torch.no_grad()
def test_a_guided_answer_is_that_of_the_rule(name, k, beta):
    """Sliding windows (Mistral's) among them; the caches' work is counted too."""
    lm, undone = backspaces.lm(name), 0
    got = answers(lm, reward_model=zoo.rm("gpt2"), k=k, beta=beta)
    for answer, (world, *want) in zip(got, rules(lm, of_tree, k=k, beta=beta), strict=True):
        check(answer, *want)
        assert answer.reward == pytest.approx(world.reward_of(answer.tokens), abs=1e-3)
        cost = answer.cost
        found = cost.lm_tokens, cost.reward_tokens, cost.rewards
        assert found == (world.lm_tokens, world.reward_tokens, world.rewards)
        undone += answer.undone
    assert undone > 3


@pytest.mark.parametrize("k", [1, 5, None])
@torch.no_grad()
def test_an_answer_without_a_reward_is_that_of_the_rule(k):
    lm, undone = backspaces.lm(), 0
    want = rules(lm, of_tree, k=k or zoo.VOCAB + 1, beta=0.0, reward="none")
    for answer, (world, *rule) in zip(answers(lm, k=k), want, strict=True):
        check(answer, *rule)
        assert answer.reward is None and answer.candidates[0].reward is None
        assert (answer.cost.lm_tokens, answer.cost.reward_tokens) == (world.lm_tokens, 0)
        undone += answer.undone
    assert undone > 3


def every_kind():
    """Those of whole sequences, and rewards whose caches are cropped in other ways."""
    previous = {"reward_model": zoo.rm("llama"), "eos_reward": "previous"}

    def of_previous(ids, first):
        return public(zoo.rm("llama"))(ids[:, :-1] if int(ids[0, -1]) in EOS else ids)

    more = {
        "tree": ({"reward_model": zoo.rm("gpt2")}, of_tree),
        "windows": (
            {"reward_model": zoo.rm("mistral")},
            lambda ids, first: public(zoo.rm("mistral"))(ids),
        ),
        "masked": (
            {"reward_model": zoo.rm("gemma2_eager")},
            lambda ids, first: public(zoo.rm("gemma2_eager"))(ids),
        ),
        "previous": (previous, of_previous),
    }
    return more | {name: ({"reward_model": x}, reward) for name, (x, reward) in kinds().items()}


@pytest.mark.parametrize("kind", list(every_kind()))
@torch.no_grad()
def test_every_kind_of_reward_is_that_of_where_a_backspace_leads(kind):
    lm, (options, reward) = backspaces.lm(), every_kind()[kind]
    rule = {"k": 6, "beta": 0.3 if kind == "pair" else 1.5}
    naively = rule | {"reward": "tokens" if kind == "genarm" else "text"}
    undone = 0
    for answer, (world, *want) in zip(
        answers(lm, **options, **rule), rules(lm, reward, **naively), strict=True
    ):
        check(answer, *want)
        assert answer.reward == pytest.approx(world.reward_of(answer.tokens), abs=1e-3)
        undone += answer.undone
    assert undone > 0


@pytest.mark.parametrize("k", [6, None])
@torch.no_grad()
def test_greedy_answers_go_in_circles_until_their_steps_are_over(k):
    lm = backspaces.lm()
    reward = {} if k is None else {"reward_model": zoo.rm("gpt2")}
    got = answers(lm, **reward, k=k, do_sample=False, max_steps=13)
    rule = {"k": k or zoo.VOCAB + 1, "beta": 1.0, "reward": "text" if reward else "none"}
    want = rules(lm, of_tree, most=13, do_sample=False, **rule)
    for answer, (_, *own) in zip(got, want, strict=True):
        check(answer, *own)
    assert any(answer.steps == 13 for answer in got)
