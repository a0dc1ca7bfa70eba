"""Each decoder of whole sequences against its rule, transcribed without batches and caches."""

import math

import naive_sequences as naive
import pytest
import tiny
import torch
from oracle import public

import rgtg_fast

STEPS = 9
# A third of all tokens end a text, so that rows end at different steps, some in their first one.
ENDS = list(range(2, 290, 3))
PROMPTS = [[5, 6, 7, 8, 11], [9], [40, 41, 43], [77, 78]]


@pytest.fixture(scope="module")
def lm():
    return tiny.llama_lm()


@pytest.fixture(scope="module")
def rm():
    return tiny.gpt2_rm()


def options(rm, eos):
    return {"reward_model": rm, "max_new_tokens": STEPS, "eos_token_id": eos, "seed": 3}


def worlds(lm, rm, eos):
    """For each prompt its world and seed."""
    seeds = rgtg_fast.ops.split_seed(3, len(PROMPTS)).tolist()
    rewards = rm if callable(rm) and not isinstance(rm, torch.nn.Module) else public(rm)
    for prompt, seed in zip(PROMPTS, seeds, strict=True):
        yield naive.World(lm, rewards, prompt, STEPS, eos), seed


def check(answer, world, node):
    assert answer.error is None
    assert answer.tokens == node.tokens
    assert answer.reward == pytest.approx(node.reward(), abs=2e-4)
    assert answer.logprob == pytest.approx(node.logprob(), abs=2e-4)
    cost = answer.cost
    got = cost.lm_tokens, cost.reward_tokens, cost.rewards
    assert got == (world.lm_tokens, world.reward_tokens, world.rewards)
    assert cost.cache_bytes > 0


EOS = pytest.mark.parametrize("eos", [[2], ENDS], ids=["long", "short"])


@EOS
@pytest.mark.parametrize("n", [1, 5])
@torch.no_grad()
def test_best_of_is_the_best_of_n_texts_behind_one_prefilled_prompt(lm, rm, eos, n):
    got = list(rgtg_fast.best_of(lm, PROMPTS, n=n, **options(rm, eos)))
    assert [answer.index for answer in got] == list(range(len(PROMPTS)))
    for answer, (world, seed) in zip(got, worlds(lm, rm, eos), strict=True):
        node = naive.best_of(world, seed, n)
        check(answer, world, node)
        texts = [world.root.draw_until(s, STEPS).tokens for s in naive.seeds_of(seed, n)]
        assert [c.tokens for c in answer.candidates] == texts
        # The prompt once, and of each text all but the last token.
        assert answer.cost.lm_tokens == len(world.prompt) + sum(len(t) - 1 for t in texts)
        assert answer.cost.reward_tokens == len(world.prompt) + sum(map(len, texts))


@EOS
@pytest.mark.parametrize("n, block", [(1, 2), (4, 1), (3, 4), (5, STEPS)])
@torch.no_grad()
def test_blockwise_best_of_goes_on_with_the_best_block(lm, rm, eos, n, block):
    got = list(rgtg_fast.blockwise_best_of(lm, PROMPTS, n=n, block=block, **options(rm, eos)))
    for answer, (world, seed) in zip(got, worlds(lm, rm, eos), strict=True):
        node, lengths = naive.blockwise(world, seed, n, block)
        check(answer, world, node)
        assert answer.segments == lengths


def test_one_block_as_long_as_the_answer_is_best_of_n(lm, rm):
    one = list(rgtg_fast.best_of(lm, PROMPTS, n=6, **options(rm, ENDS)))
    other = list(rgtg_fast.blockwise_best_of(lm, PROMPTS, n=6, block=99, **options(rm, ENDS)))
    assert [a.tokens for a in one] == [a.tokens for a in other]
    assert [a.cost.lm_tokens for a in one] == [a.cost.lm_tokens for a in other]


@EOS
@pytest.mark.parametrize("alpha, budget", [(0.5, 40), (0.3, 80), (0.9, 1), (0.5, 10**6)])
@torch.no_grad()
def test_speculative_rejection_drops_the_lowest_at_checkpoints(lm, rm, eos, alpha, budget):
    given = {"n": 8, "alpha": alpha, "budget": budget} | options(rm, eos)
    for answer, (world, seed) in zip(
        rgtg_fast.speculative_rejection(lm, PROMPTS, **given), worlds(lm, rm, eos), strict=True
    ):
        check(answer, world, naive.speculative_rejection(world, seed, 8, alpha, budget))
        assert answer.rejected + len(answer.candidates) == 8


@EOS
@pytest.mark.parametrize("n, children, layers", [(6, 2, 3), (4, 4, 9), (4, 1, 2), (3, 3, 1)])
@torch.no_grad()
def test_treebon_branches_the_best_texts_of_each_layer(lm, rm, eos, n, children, layers):
    given = {"n": n, "children": children, "layers": layers} | options(rm, eos)
    for answer, (world, seed) in zip(
        rgtg_fast.treebon(lm, PROMPTS, **given), worlds(lm, rm, eos), strict=True
    ):
        check(answer, world, naive.treebon(world, seed, n, children, layers))


CARDS = {
    "patient": {"target": 3.0, "threshold": 2.0, "rejections": 8, "least": 1, "most": 6},
    "hasty": {"target": 5.0, "threshold": 1.0, "rejections": 2, "least": 1, "most": 3},
    "none": {"target": 5.0, "threshold": 3.0, "rejections": 0, "least": 2, "most": 4},
}


@EOS
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("rule", CARDS.values(), ids=CARDS)
@torch.no_grad()
def test_cards_accepts_segments_by_its_rule(lm, rm, eos, rule, batch_size):
    given = {
        "reward_target": rule["target"],
        "entropy_threshold": rule["threshold"],
        "max_rejections": rule["rejections"],
        "min_segment": rule["least"],
        "max_segment": rule["most"],
        "alpha": 0.3,
        "beta": 1.5,
        "batch_size": batch_size,
    }
    got = sorted(rgtg_fast.cards(lm, PROMPTS, **given, **options(rm, eos)), key=lambda a: a.index)
    for answer, (world, seed) in zip(got, worlds(lm, rm, eos), strict=True):
        node, lengths, rejected = naive.cards(world, seed, alpha=0.3, beta=1.5, **rule)
        check(answer, world, node)
        assert (answer.segments, answer.rejected) == (lengths, rejected)


@EOS
@pytest.mark.parametrize(
    "n, k, beta, share", [(1, 3, 1.0, 0.5), (5, 4, 0.7, 0.9), (4, 2, 2.0, 0.0)]
)
@torch.no_grad()
def test_twisted_smc_weighs_and_resamples_by_its_rule(lm, rm, eos, n, k, beta, share):
    given = {"n": n, "k": k, "beta": beta, "ess_threshold": share} | options(rm, eos)
    for answer, (world, seed) in zip(
        rgtg_fast.twisted_smc(lm, PROMPTS, **given), worlds(lm, rm, eos), strict=True
    ):
        nodes, shares, log_z, drawn = naive.smc(world, seed, n, k, beta, share)
        check(answer, world, nodes[drawn])
        assert [c.tokens for c in answer.candidates] == [node.tokens for node in nodes]
        assert [c.weight for c in answer.candidates] == pytest.approx(shares, abs=1e-4)
        assert math.isclose(answer.log_z, log_z, abs_tol=5e-4)
