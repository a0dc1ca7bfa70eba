"""Sampling through `rgtg_fast.generate`: seeds, temperature, warpers, rows."""

import functools

import pytest
import tiny
import torch
from calls import guided as call
from scipy import stats

import rgtg_fast

guided = functools.partial(call, max_new_tokens=8, do_sample=True, beta=0.5)
DICT = {"return_dict_in_generate": True, "output_candidates": True}


def test_seed_reproduces_and_another_seed_differs(lm, rm):
    inputs = tiny.prompts(5, 9)
    first, again, other = (guided(lm, rm, **inputs, seed=s).tolist() for s in (3, 3, 4))
    assert first == again and first != other


def test_manual_seed_reproduces_a_run_without_seed(lm, rm):
    inputs = tiny.prompts(5, 9)
    runs = []
    for start in (11, 11, 12):
        torch.manual_seed(start)
        runs.append(guided(lm, rm, **inputs).tolist())
    assert runs[0] == runs[1] and runs[0] != runs[2]


def test_two_runs_without_seed_differ(lm, rm):
    torch.manual_seed(0)
    inputs = tiny.prompts(5, 9)
    assert guided(lm, rm, **inputs).tolist() != guided(lm, rm, **inputs).tolist()


def test_seed_leaves_the_global_generator_alone(lm, rm):
    before = torch.get_rng_state()
    guided(lm, rm, **tiny.prompts(5, 9), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [None, 1])
def test_greedy_leaves_the_global_generator_alone(seed, lm, rm):
    before = torch.get_rng_state()
    guided(lm, rm, **tiny.prompts(5, 9), do_sample=False, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_token_of_an_answer_has_its_own_noise(lm):
    """With all tokens alike, only the noise chooses."""
    scorer = tiny.CountingScorer(torch.zeros(tiny.vocab_size()))
    alike = [lambda ids, scores: torch.zeros_like(scores)]
    out = guided(lm, scorer, **tiny.prompts(5, 5), logits_processor=alike, top_k=0, seed=0)[:, 5:]
    assert all(len(set(row)) >= 3 for row in out.tolist()) and out[0].tolist() != out[1].tolist()


def test_int_seed_is_split_into_row_seeds(lm, rm):
    inputs = tiny.prompts(5, 9, 7)
    rows = rgtg_fast.ops.split_seed(21, 3)
    as_int = guided(lm, rm, **inputs, seed=21)
    assert as_int.tolist() == guided(lm, rm, **inputs, seed=rows).tolist()


def test_row_with_its_seed_is_the_same_alone_and_in_a_padded_batch(lm, rm):
    lengths = (5, 9, 7, 3, 8, 4, 6, 2)
    inputs = tiny.prompts(*lengths)
    seeds = torch.arange(100, 108)
    batch = guided(lm, rm, **inputs, seed=seeds)[:, 9:]
    for row, length in enumerate(lengths):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, 9 - length :]}
        out = guided(lm, rm, **alone, seed=seeds[row : row + 1])[0, length:]
        assert out.tolist() == batch[row, : len(out)].tolist()


def test_num_return_sequences_gives_independent_draws(lm, rm):
    inputs = tiny.prompts(5, 9)
    out = guided(lm, rm, **inputs, num_return_sequences=3, seed=0)
    assert out.shape[0] == 6
    for prompt in range(2):
        rows = out[3 * prompt : 3 * prompt + 3]
        assert (rows[:, :9] == inputs["input_ids"][prompt]).all()
        assert len({tuple(row) for row in rows.tolist()}) == 3


def test_num_return_sequences_seeds_every_expanded_row(lm, rm):
    inputs = tiny.prompts(5, 9)
    twice = {name: t.repeat_interleave(2, dim=0) for name, t in inputs.items()}
    expanded = guided(lm, rm, **inputs, num_return_sequences=2, seed=6)
    assert expanded.tolist() == guided(lm, rm, **twice, seed=6).tolist()


@pytest.mark.parametrize("beta, temperature", [(0.0, 1.0), (0.7, 1.0), (0.7, 0.5), (-0.4, 2.0)])
def test_first_token_follows_the_tempered_ratio_policy(beta, temperature, lm, rm):
    """4000 draws of one token against softmax((log pi + beta r) / T) by chi-square."""
    draws = 4000
    out = guided(
        lm,
        rm,
        **tiny.prompts(6),
        beta=beta,
        temperature=temperature,
        k=6,
        num_return_sequences=draws,
        max_new_tokens=1,
        seed=17,
        top_k=0,
        **DICT,
    )
    s = out.candidate_logprobs[0, 0] + beta * out.candidate_rewards[0, 0]
    expected = (s / temperature).softmax(-1).double() * draws
    chosen = out.sequences[:, -1]
    counts = (chosen[:, None] == out.candidate_ids[0, 0]).sum(0)
    assert counts.sum() == draws
    big = expected >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]]).double()
    wanted = torch.cat([expected[big], expected[~big].sum()[None]])
    kept = wanted > 0
    p = stats.chisquare(
        observed[kept].numpy(), (wanted[kept] * (draws / wanted.sum())).numpy()
    ).pvalue
    assert p > 1e-4


def test_temperature_does_not_touch_the_log_probs(lm, rm):
    inputs = tiny.prompts(5, 9)
    hot, cold = (
        guided(
            lm, rm, **inputs, temperature=t, max_new_tokens=1, seed=0, output_scores=True, **DICT
        )
        for t in (3.0, 0.3)
    )
    torch.testing.assert_close(hot.candidate_logprobs, cold.candidate_logprobs, rtol=0, atol=0)
    torch.testing.assert_close(hot.scores[0], cold.scores[0], rtol=0, atol=0)


def test_temperature_changes_the_draws(lm, rm):
    """Near zero temperature is the greedy answer."""
    inputs = tiny.prompts(5, 9)
    cold = guided(lm, rm, **inputs, temperature=1e-4, seed=0)
    assert cold.tolist() == guided(lm, rm, **inputs, do_sample=False).tolist()
    assert cold.tolist() != guided(lm, rm, **inputs, temperature=3.0, seed=0).tolist()


def test_temperature_of_the_generation_config_tempers_the_ratio_policy(rm):
    lm = tiny.llama_lm()
    inputs = tiny.prompts(5, 9)
    by_keyword = guided(lm, rm, **inputs, temperature=0.4, seed=5)
    lm.generation_config.temperature = 0.4
    assert guided(lm, rm, **inputs, seed=5).tolist() == by_keyword.tolist()


@pytest.mark.parametrize(
    "warper",
    [
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.05},
        {"top_p": 0.7, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=lambda w: "+".join(w),
)
def test_warper_scores_equal_hugging_face(warper, lm, rm):
    inputs = tiny.prompts(5, 9)
    common = {"do_sample": True, "max_new_tokens": 1, "output_scores": True} | {"top_k": 0} | warper
    expected = lm.generate(**inputs, return_dict_in_generate=True, **common)
    out = guided(lm, rm, **inputs, **common, **DICT)
    torch.testing.assert_close(out.scores[0], expected.scores[0])
    kept = torch.isfinite(expected.scores[0]).sum(-1).clamp(max=10)
    assert torch.isfinite(out.candidate_logprobs[:, 0]).sum(-1).tolist() == kept.tolist()


def test_warper_that_leaves_one_token_decides(lm, rm):
    inputs = tiny.prompts(5, 9)
    out = guided(lm, rm, **inputs, beta=40.0, top_p=1e-6, seed=0)
    expected = lm.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("name, values", [("beta", [0.0, 3.0]), ("temperature", [0.2, 4.0])])
def test_per_row_tensor_equals_rows_run_on_their_own(name, values, lm, rm):
    inputs = tiny.prompts(9, 9)
    seeds = torch.tensor([5, 6])
    both = guided(lm, rm, **inputs, seed=seeds, **{name: torch.tensor(values)})
    for row, value in enumerate(values):
        alone = {n: t[row : row + 1] for n, t in inputs.items()}
        out = guided(lm, rm, **alone, seed=seeds[row : row + 1], **{name: value})[0]
        assert out.tolist() == both[row, : len(out)].tolist()


@pytest.mark.parametrize("name, values", [("beta", [0.0, 3.0]), ("temperature", [0.2, 4.0])])
def test_per_row_tensor_is_repeated_for_return_sequences(name, values, lm, rm):
    inputs = tiny.prompts(9, 9)
    short, full = (
        guided(lm, rm, **inputs, seed=9, num_return_sequences=2, **{name: torch.tensor(v)})
        for v in (values, [v for v in values for _ in range(2)])
    )
    assert short.tolist() == full.tolist()


def test_beta_changes_the_answer_and_raises_the_reward(lm, rm):
    inputs = tiny.prompts(5, 9)
    none, some = (
        guided(lm, rm, **inputs, beta=b, do_sample=False, return_dict_in_generate=True)
        for b in (0.0, 5.0)
    )
    assert some.rewards.nanmean() > none.rewards.nanmean() + 0.5
