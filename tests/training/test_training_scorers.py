"""Scorers that give all candidates their rewards from one forward of the prefix."""

import functools

import pytest
import torch
import zoo
from tiny import gpt2_lm, gpt2_rm, llama_lm, prompts, vocab_size

import rgtg_fast
from rgtg_fast.models.cache import SiblingCache
from rgtg_fast.models.parts import find_base
from rgtg_fast.scorers import AutoregressiveScorer, VocabRewardScorer

K = 5


@torch.no_grad()
def naive(kind, model, ids, candidate):
    """The reward of `candidate` behind the unpadded `ids` [n], without cache."""
    if kind is AutoregressiveScorer:
        return model(ids[None]).logits[0, -1].log_softmax(-1)[candidate]
    hidden = find_base(model)(ids[None]).last_hidden_state[0, -1]
    return model.get_output_embeddings()(hidden)[candidate]


KINDS = pytest.mark.parametrize("kind", [VocabRewardScorer, AutoregressiveScorer])
# On a static cache where the probe finds it right, with windows too; else on Hugging Face's own.
STATIC = ("llama", "gpt2", "mistral", "gemma3", "llama4", "mixtral")
OWN = ("bloom", "falcon_alibi", "gpt_oss")


def hooked(model):
    """Something of the user's that a static cache would pass by: so it is Hugging Face's own."""
    model.register_forward_hook(lambda *_: None)
    return model


def walk(scorer, inputs, reward, steps=7, seed=0):
    """Random steps, another slot in every row; each score against full forwards."""
    rows = [i[m.bool()] for i, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    scorer.prefill(**inputs)
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(3, zoo.VOCAB, (len(rows), K), generator=gen)
        expected = torch.stack(
            [torch.stack([reward(r, c) for c in row]) for r, row in zip(rows, ids, strict=True)]
        )
        torch.testing.assert_close(scorer.score(ids), expected, rtol=1e-4, atol=1e-4)
        slot = torch.randint(0, K, (len(rows),), generator=gen)
        scorer.commit(slot)
        rows = [torch.cat([r, i[s, None]]) for r, i, s in zip(rows, ids, slot, strict=True)]


@KINDS
@pytest.mark.parametrize("name", [*STATIC, *OWN, "llama hooked"])
def test_rewards_equal_full_forwards_over_several_steps(kind, name):
    model = hooked(zoo.build_lm("llama")) if name == "llama hooked" else zoo.build_lm(name)
    scorer = kind(model)
    reward = functools.partial(naive, kind, model)
    walk(scorer, zoo.left_pad(zoo.prompts()), reward)
    assert (scorer.static is not None) == scorer.capturable == (name in STATIC)
    walk(scorer, zoo.left_pad(zoo.prompts(9, (4, 11))), reward, seed=1)  # begins anew


@KINDS
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prompts_with_holes(kind, name):
    """A window counts hidden slots too: the truth is that of Hugging Face's own cache."""
    inputs = zoo.left_pad(zoo.prompts())
    inputs["attention_mask"][0, -3] = 0
    model = zoo.build_lm(name)
    scorers = kind(model), kind(hooked(zoo.build_lm(name)))
    for scorer in scorers:
        scorer.prefill(**inputs)
    assert scorers[0].static is not None and scorers[1].static is None
    for step in range(6):
        ids = torch.arange(3, 3 + 3 * K).view(3, K) + step
        torch.testing.assert_close(*(s.score(ids) for s in scorers), rtol=1e-4, atol=1e-4)
        for scorer in scorers:
            scorer.commit(torch.tensor([1, 0, 2]))


@KINDS
@pytest.mark.parametrize("own", [False, True])
def test_rows_that_are_kept_go_on_alone(kind, own):
    model, inputs = llama_lm(seed=5), prompts(3, 6, 4)
    ids = torch.arange(3, 3 + 3 * K).view(3, K)
    full, kept = (kind(hooked(model) if own else model) for _ in range(2))
    for scorer in (full, kept):
        scorer.prefill(**inputs)
        scorer.score(ids)
        scorer.commit(torch.tensor([1, 0, 2]))
    rows = torch.tensor([0, 2])
    kept.keep_rows(rows)
    for _ in range(2):
        torch.testing.assert_close(kept.score(ids[rows]), full.score(ids)[rows])
        kept.commit(torch.tensor([1, 3]))
        full.commit(torch.tensor([1, 4, 3]))


@KINDS
@pytest.mark.parametrize("own", [False, True])
def test_one_forward_of_one_token_a_step(kind, own, monkeypatch):
    model, seen = gpt2_lm(seed=5), []
    forward = type(model.transformer).forward

    @functools.wraps(forward)
    def noted(self, input_ids=None, **kwargs):
        seen.append(input_ids.shape)
        return forward(self, input_ids, **kwargs)

    options = {"k": K, "max_new_tokens": 3, "min_new_tokens": 3}
    lm, scorer = llama_lm(), kind(hooked(model) if own else model)
    rgtg_fast.generate(lm, **prompts(4, 6), reward_model=scorer, **options)  # probed
    monkeypatch.setattr(type(model.transformer), "forward", noted)
    rgtg_fast.generate(lm, **prompts(4, 6), reward_model=scorer, **options)
    assert seen == [(2, 6), (2, 1), (2, 1)]


@KINDS
def test_the_cache_is_made_for_the_whole_answer(kind, monkeypatch):
    made, init = [], SiblingCache.__init__

    def noted(self, width, capacity, *rest):
        made.append((self, width, capacity))
        init(self, width, capacity, *rest)

    lm, model = llama_lm(), gpt2_lm()
    options = {"reward_model": kind(model), "k": K, "max_new_tokens": 9, "min_new_tokens": 9}
    rgtg_fast.generate(lm, **prompts(4, 6), **options)
    monkeypatch.setattr(SiblingCache, "__init__", noted)
    rgtg_fast.generate(lm, **prompts(4, 6), **options)
    assert [(cache.width, asked, cache.capacity) for cache, _, asked in made] == [(1, 15, 15)] * 2


def test_generate_with_the_language_model_as_its_own_guide_sharpens_it():
    lm, inputs = llama_lm(), prompts(5)
    out = rgtg_fast.generate(
        lm,
        **inputs,
        reward_model=AutoregressiveScorer(lm),
        k=K,
        beta=1.0,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_candidates=True,
    )
    torch.testing.assert_close(out.candidate_rewards, out.candidate_logprobs, rtol=1e-4, atol=1e-4)


def test_tokens_past_the_reward_models_vocabulary_get_minus_infinity():
    lm, inputs = gpt2_lm(), prompts(4)
    scorer = VocabRewardScorer(lm)
    scorer.prefill(**inputs)
    rewards = scorer.score(torch.tensor([[3, vocab_size()]]))
    known = lm(**inputs).logits[:, -1, 3]
    torch.testing.assert_close(rewards[:, 0], known, rtol=1e-4, atol=1e-4)
    assert rewards[0, 1] == -torch.inf


def test_a_classifier_is_refused():
    with pytest.raises(ValueError, match="output embeddings"):
        VocabRewardScorer(gpt2_rm())
