"""Scorers that give all candidates their rewards from one forward of the prefix."""

import pytest
import torch
from tiny import gpt2_lm, gpt2_rm, llama_lm, prompts, vocab_size

import rgtg_fast
from rgtg_fast.scorers import AutoregressiveScorer, VocabRewardScorer

K = 5


@torch.no_grad()
def naive(kind, model, ids, candidate):
    """The reward of `candidate` behind the unpadded `ids` [n], without cache."""
    if kind is AutoregressiveScorer:
        return model(ids[None]).logits[0, -1].log_softmax(-1)[candidate]
    base = getattr(model, model.base_model_prefix)
    hidden = base(ids[None]).last_hidden_state[0, -1]
    return model.get_output_embeddings()(hidden)[candidate]


@pytest.mark.parametrize("kind", [VocabRewardScorer, AutoregressiveScorer])
@pytest.mark.parametrize("make", [gpt2_lm, llama_lm])
def test_rewards_equal_full_forwards_over_several_steps(kind, make):
    model = make(seed=5)
    inputs = prompts(3, 7, 5)
    rows = [i[m.bool()] for i, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    scorer = kind(model)
    scorer.prefill(**inputs)
    gen = torch.Generator().manual_seed(0)
    for _ in range(4):
        ids = torch.randint(3, vocab_size(), (len(rows), K), generator=gen)
        expected = torch.stack(
            [
                torch.stack([naive(kind, model, r, c) for c in row])
                for r, row in zip(rows, ids, strict=True)
            ]
        )
        torch.testing.assert_close(scorer.score(ids), expected, rtol=1e-4, atol=1e-4)
        slot = torch.randint(0, K, (len(rows),), generator=gen)
        scorer.commit(slot)
        rows = [torch.cat([r, i[s, None]]) for r, i, s in zip(rows, ids, slot, strict=True)]


@pytest.mark.parametrize("kind", [VocabRewardScorer, AutoregressiveScorer])
def test_rows_that_are_kept_go_on_alone(kind):
    model, inputs = llama_lm(seed=5), prompts(3, 6, 4)
    ids = torch.arange(3, 3 + 3 * K).view(3, K)
    full, kept = kind(model), kind(model)
    for scorer in (full, kept):
        scorer.prefill(**inputs)
        scorer.score(ids)
        scorer.commit(torch.tensor([1, 0, 2]))
    rows = torch.tensor([0, 2])
    kept.keep_rows(rows)
    torch.testing.assert_close(kept.score(ids[rows]), full.score(ids)[rows])


@pytest.mark.parametrize("kind", [VocabRewardScorer, AutoregressiveScorer])
def test_one_forward_of_one_token_a_step(kind):
    model = gpt2_lm(seed=5)
    scorer, seen = kind(model), []
    model.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).shape),
        with_kwargs=True,
    )
    rgtg_fast.generate(
        llama_lm(), **prompts(4, 6), reward_model=scorer, k=K, max_new_tokens=3, min_new_tokens=3
    )
    assert seen == [(2, 6), (2, 1), (2, 1)]


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
