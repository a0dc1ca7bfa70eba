"""The decoders of whole sequences with every kind of reward, against the rules transcribed."""

import naive_sequences as naive
import pytest
import torch
import zoo
from sequence_rewards import Letters, kinds

import rgtg_fast
from rgtg_fast.sequence import cost

STEPS, PROMPTS = 6, [[5, 6, 7, 8, 11], [9, 12]]
EOS = list(range(2, zoo.VOCAB, 5))


def world(lm, reward, prompt):
    return naive.World(lm, lambda ids: reward(ids, len(prompt)), prompt, STEPS, EOS)


@pytest.mark.filterwarnings("ignore:.*is scored by:UserWarning")
@pytest.mark.parametrize(
    "kind", ["expand", "reencode", "text", "head", "pair", "genarm", "farma", "sum"]
)
@torch.no_grad()
def test_every_kind_of_reward_judges_segments(kind):
    """The pair's and GenARM's rewards are sums over the answer, FaRMA's is of the last token."""
    lm, (given, reward) = zoo.lm("llama"), kinds()[kind]
    options = {"reward_model": given, "max_new_tokens": STEPS, "seed": 3, "eos_token_id": EOS}
    options |= {"pad_token_id": zoo.PAD, "tokenizer": Letters()}
    seeds = naive.seeds_of(3, len(PROMPTS))
    blocks = rgtg_fast.blockwise_best_of(lm, PROMPTS, n=3, block=2, **options)
    for answer, prompt, seed in zip(blocks, PROMPTS, seeds, strict=True):
        node, _ = naive.blockwise(world(lm, reward, prompt), seed, 3, 2)
        assert (answer.error, answer.tokens) == (None, node.tokens)
        assert answer.reward == pytest.approx(node.reward(), abs=1e-3)
        assert answer.text == Letters().decode(node.tokens, True)
    rule = {"alpha": 0.0 if kind in ("pair", "genarm") else 0.7, "beta": 2.0}
    got = rgtg_fast.cards(
        lm, PROMPTS, reward_target=1.0, entropy_threshold=2.0, min_segment=1, max_segment=3,
        max_rejections=2, **rule, **options,
    )  # fmt: skip
    for answer in got:
        own = world(lm, reward, PROMPTS[answer.index])
        if kind in ("pair", "genarm", "farma"):
            continue  # what they say of a prompt alone is another thing
        node, lengths, rejected = naive.cards(
            own, seeds[answer.index], target=1.0, threshold=2.0, least=1, most=3, rejections=2,
            **rule,
        )  # fmt: skip
        assert (answer.error, answer.tokens) == (None, node.tokens)
        assert (answer.segments, answer.rejected) == (lengths, rejected)
        assert answer.reward == pytest.approx(node.reward(), abs=1e-3)


@pytest.mark.parametrize("kind", ["expand", "pair", "genarm", "farma", "sum"])
@torch.no_grad()
def test_tokens_of_each_reward_are_counted(kind):
    """Of a cached reward the prompt once and each token once; a function has no tokens."""
    lm, (given, _) = zoo.lm("llama"), kinds()[kind]
    options = {"reward_model": given, "max_new_tokens": STEPS, "seed": 3, "pad_token_id": zoo.PAD}
    (answer,) = rgtg_fast.best_of(lm, PROMPTS[:1], n=3, tokenizer=Letters(), **options)
    once = len(PROMPTS[0]) + sum(len(c.tokens) for c in answer.candidates)
    assert answer.cost.reward_tokens == once * (2 if kind == "pair" else 1)


def test_a_sum_of_rewards_of_tokens_and_of_texts_is_an_error():
    mixed = rgtg_fast.Reward(zoo.lm("gpt2"), reward_kind="genarm") + rgtg_fast.Reward(
        zoo.rm("llama")
    )
    with pytest.raises(ValueError, match="sum of rewards of single tokens and of whole texts"):
        rgtg_fast.best_of(zoo.lm("llama"), PROMPTS, reward_model=mixed)


def test_what_has_no_cache_holds_no_bytes_and_runs_whole_texts():
    scorer = rgtg_fast.scorers.make_scorer(zoo.rm("bert"), k=1, method="reencode")
    scorer.join([torch.tensor([5, 6, 7])])
    assert cost.cache_bytes(scorer) == 0
    assert cost.tokens_joined(scorer, 3) == 0
    assert cost.tokens_read(scorer, length=3, new=2, scored=4) == 4 * 6
