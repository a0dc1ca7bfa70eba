"""k=None, candidates="sum" and guided_top_p, against all tokens' scores by whole forwards."""

import copy

import pytest
import tiny
import torch
from mixtures import STEPS, check, chi_square, decoded, logits, logp, models, nucleus

import rgtg_fast
from rgtg_fast import Reward, WeightedRewards
from rgtg_fast.scorers import AutoregressiveScorer

SEEDS = torch.tensor([5, 6, 7])
BETA = 0.7


def rewards():
    """Rewards that know every token: what `generate` takes, and r [V] of a text."""
    m = models()
    a, b = m["a"], m["b"]
    clamped = (2 * Reward(a, reward_kind="farma") - 1).clamp(-3, 3)
    both = WeightedRewards([clamped, Reward(b, reward_kind="genarm")], [1.0, 0.5])
    return {
        "genarm": ({"reward_model": a, "reward_kind": "genarm"}, lambda x: logp("a", x)),
        "farma": ({"reward_model": a, "reward_kind": "farma"}, lambda x: logits("a", x)),
        "a base without a static cache": (
            {"reward_model": b, "reward_kind": "farma"},
            lambda x: logits("b", x),
        ),
        "a head on the language model's own states": (
            {"reward_model": rgtg_fast.VocabHead(m["lm"], a.get_output_embeddings().weight)},
            of_own_states,
        ),
        "pair": ({"reward_model": (a, b)}, lambda x: logp("a", x) - logp("b", x)),
        "sum": (
            {"reward_model": both},
            lambda x: (2 * logits("a", x) - 1).clamp(-3, 3) + 0.5 * logp("b", x),
        ),
    }


def of_own_states(text):
    """The states of the language model, by the output layer of another."""
    own = copy.deepcopy(models()["lm"]).double().model(input_ids=text[None]).last_hidden_state
    return own[0, -1] @ models()["a"].get_output_embeddings().weight.double().T


def guided(options, inputs=None, sampled=False, **more):
    inputs = tiny.prompts(3, 9, 6) if inputs is None else inputs
    fixed = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "pad_token_id": 0}
    fixed |= {"suppress_tokens": [0], "beta": BETA}
    if sampled:
        fixed |= {"do_sample": True, "seed": SEEDS, "top_k": 0}
    return rgtg_fast.generate(models()["lm"], **inputs, **fixed | options | more)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", rewards())
def test_the_whole_vocabulary_is_drawn_from_and_its_kl_is_that_of_the_whole_policy(name, sampled):
    options, reward = rewards()[name]
    inputs = tiny.prompts(3, 9, 6)
    temperature = 1.3 if sampled else 1.0
    out = guided(options, inputs, sampled, k=None, temperature=temperature)
    seeds = SEEDS if sampled else None
    formula = lambda x: logp("lm", x) + BETA * reward(x)  # noqa: E731
    check(out, inputs, formula, seeds, temperature=temperature)
    text = inputs["input_ids"][1]
    token = out.sequences[1, 9]
    if "pair" not in name:  # whose reward is of the answer so far: the same at its first token
        want = reward(text)[token]
        torch.testing.assert_close(out.rewards[1, 0].double(), want, rtol=1e-4, atol=1e-4)
    assert set(out.candidates_scored[1].tolist()) <= {tiny.vocab_size(), 0}


@pytest.mark.parametrize("name", rewards())
def test_candidates_are_the_best_of_the_sum(name):
    options, reward = rewards()[name]
    inputs = tiny.prompts(3, 9, 6)
    out = guided(options, inputs, k=4, candidates="sum", output_candidates=True)
    formula = lambda x: logp("lm", x) + BETA * reward(x)  # noqa: E731
    check(out, inputs, formula)  # the best of the sum is the best of all
    for row, mask in enumerate(inputs["attention_mask"]):
        text = inputs["input_ids"][row][mask.bool()]
        best = formula(text).topk(4).indices
        assert out.candidate_ids[row, 0].tolist() == best.tolist()
        own = logp("lm", text)[best].float()
        torch.testing.assert_close(out.candidate_logprobs[row, 0], own, rtol=1e-4, atol=1e-4)


def test_a_draw_among_the_best_of_the_sum():
    options, reward = rewards()["genarm"]
    inputs = tiny.prompts(3, 9, 6)

    def formula(text):
        scores = logp("lm", text) + BETA * reward(text)
        return torch.full_like(scores, -torch.inf).index_copy(
            0, (best := scores.topk(5).indices), scores[best]
        )

    check(guided(options, inputs, True, k=5, candidates="sum"), inputs, formula, SEEDS)


@pytest.mark.parametrize("temperature, top_p", [(0.5, 0.6), (3.0, 0.4), (3.0, 0.95), (1.0, 1.0)])
def test_guided_top_p_cuts_the_whole_policy(temperature, top_p):
    """Within the 64 best tokens, and beyond them."""
    options, reward = rewards()["pair"]
    inputs = tiny.prompts(3, 9, 6)
    formula = lambda x: logp("lm", x) + BETA * reward(x)  # noqa: E731
    sizes = (nucleus(formula(inputs["input_ids"][1]) / temperature, top_p) > -torch.inf).sum()
    assert (sizes > 64) == (temperature * top_p > 2 or top_p == 1.0)
    how = {"temperature": temperature}
    out = guided(options, inputs, True, k=None, guided_top_p=top_p, **how)
    check(out, inputs, formula, SEEDS, top_p=top_p, **how)


@pytest.mark.parametrize("top_p", [None, 0.8])
@pytest.mark.parametrize("k", [None, 6])
def test_tokens_are_drawn_as_often_as_the_policy_says(k, top_p):
    options, reward = rewards()["genarm"]
    inputs = tiny.prompts(5)
    more = {"num_return_sequences": 3000, "max_new_tokens": 1, "seed": 3, "guided_top_p": top_p}
    more |= {"k": k} if k is None else {"k": k, "candidates": "sum"}
    tokens = guided(options, inputs, True, **more).sequences[:, -1]
    scores = logp("lm", inputs["input_ids"][0]) + BETA * reward(inputs["input_ids"][0])
    if k is not None:
        scores = scores.masked_fill(scores < scores.topk(k).values[-1], -torch.inf)
    if top_p is not None:
        scores = nucleus(scores, top_p)
    assert chi_square(tokens, scores.softmax(-1))
    assert not chi_square(tokens, (scores / 1.5).softmax(-1))


def test_guided_top_p_cuts_the_candidates_of_any_reward(lm, rm):
    inputs = tiny.prompts(5)
    options = {"reward_model": rm, "k": 6, "num_return_sequences": 2000, "max_new_tokens": 1}
    out = guided(options, inputs, True, seed=1, guided_top_p=0.7, output_candidates=True)
    s = out.candidate_logprobs[0, 0].double() + BETA * out.candidate_rewards[0, 0].double()
    kept = nucleus(s, 0.7)
    assert 1 < int((kept > -torch.inf).sum()) < 6
    q = torch.zeros(tiny.vocab_size(), dtype=torch.float64)
    q[out.candidate_ids[0, 0]] = kept.softmax(-1)
    tokens = out.sequences[:, -1]
    assert chi_square(tokens, q) and bool((q[tokens] > 0).all())
    logq = kept.log_softmax(-1)
    gap = logq.exp() * (logq - out.candidate_logprobs[0, 0])
    want = torch.where(logq.isfinite(), gap, 0.0).sum().float()
    torch.testing.assert_close(out.kl[0, 0], want, rtol=1e-4, atol=1e-5)


def test_guided_top_p_leaves_greedy_decoding_and_a_range_alone(lm, rm):
    options = {"reward_model": rm, "k": 5}
    assert torch.equal(
        guided(options, guided_top_p=0.3).sequences, guided(options, sampled=False).sequences
    )
    # What a reward could be at most says nothing of who is in the nucleus: all are scored.
    pruned = {"reward_range": (-1.0, 1.0), "guided_top_p": 0.6}
    with_range = guided(options, sampled=True, **pruned)
    all_scored = guided(options, sampled=True, prune=False, **pruned)
    assert torch.equal(with_range.sequences, all_scored.sequences)
    assert torch.equal(with_range.kl, all_scored.kl)


@pytest.mark.parametrize("ids", [40, 250, 340])
@pytest.mark.parametrize("beta", [0.0, -0.5, 1.0])
@pytest.mark.parametrize("more", [{"k": None}, {"k": 60, "candidates": "sum"}])
def test_a_token_that_the_reward_does_not_know_is_never_drawn(ids, beta, more):
    """Nor one beyond the language model's vocabulary, whatever the sign of beta."""
    scorer = AutoregressiveScorer(tiny.llama_lm(seed=13, vocab_size=ids))
    inputs = {"input_ids": torch.arange(3, 8)[None]}
    options = {"num_return_sequences": 300, "max_new_tokens": 1, "temperature": 5.0, "seed": 1}
    out = guided({"reward_model": scorer, "beta": beta}, inputs, True, **options | more)
    tokens = out.sequences[:, -1]
    assert int(tokens.max()) < min(ids, tiny.vocab_size()) and len(tokens.unique()) > 20
    assert bool(out.rewards.isfinite().all())


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("more", [{"k": None}, {"k": 5, "candidates": "sum"}])
def test_what_cuts_the_language_model_cuts_the_sum(more, top_p):
    options, reward = rewards()["farma"]
    inputs = tiny.prompts(3, 9, 6)

    def formula(text):
        pi = logp("lm", text)
        cut = pi.masked_fill(pi < pi.topk(5).values[-1], -torch.inf)
        return nucleus(cut, top_p) + BETA * reward(text)

    out = guided(options, inputs, True, top_k=5, top_p=top_p, **more)
    check(out, inputs, formula, SEEDS, kl=False)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_clamped_pair_is_clamped_where_the_whole_answer_stands(sampled):
    a, b = models()["a"], models()["b"]
    inputs, bounds = tiny.prompts(7), (-4.0, 2.0)

    def formula(text):
        so_far = 0.0
        for at in range(7, len(text)):
            so_far += (logp("a", text[:at]) - logp("b", text[:at]))[text[at]]
        both = logp("a", text) - logp("b", text)
        return logp("lm", text) + BETA * (so_far + both).clamp(*bounds)

    options = {"reward_model": Reward((a, b)) / 4, "beta": 4 * BETA, "k": None}
    options["reward_model"] = (4 * options["reward_model"]).clamp(*bounds) / 4
    out = guided(options, inputs, sampled, **({"seed": SEEDS[:1]} if sampled else {}))
    check(out, inputs, formula, SEEDS if sampled else None)


def test_beta_may_differ_from_row_to_row_and_from_step_to_step():
    options, reward = rewards()["genarm"]
    inputs = tiny.prompts(3, 9, 6)
    betas = torch.tensor([0.5, 1.0, 2.0])
    out = guided(options, inputs, True, k=None, beta=betas, beta_schedule=lambda t: t / 4)
    for row, mask in enumerate(inputs["attention_mask"]):
        prompt = inputs["input_ids"][row][mask.bool()]
        formula = lambda x: (  # noqa: E731
            logp("lm", x) + float(betas[row]) * (len(x) - len(prompt)) / 4 * reward(x)  # noqa: B023
        )
        tokens, _ = decoded(prompt, formula, seed=int(SEEDS[row]))
        assert out.sequences[row, 9:].tolist()[: len(tokens)] == tokens
        steps = torch.arange(len(tokens)) / 4
        torch.testing.assert_close(out.beta[row, : len(tokens)], betas[row] * steps)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_backends_draw_the_same_tokens(backend):
    options, _ = rewards()["pair"]
    for more in ({"k": None}, {"k": 5, "candidates": "sum"}, {"k": None, "guided_top_p": 0.8}):
        got = guided(options, sampled=True, backend=backend, **more)
        want = guided(options, sampled=True, **more)
        assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize(
    "more",
    [
        {"k": None},
        {"k": 5, "candidates": "sum"},
        {"k": None, "guided_top_p": 0.7},
        {"k": 8, "guided_top_p": 0.5},
        {"k": None, "top_k": 3},
    ],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_generate_many_gives_what_generate_does(more, sampled):
    options, _ = rewards()["pair"]
    prompts = [torch.arange(3, 3 + n) for n in (4, 7, 3, 5, 6)]
    fixed = {"max_new_tokens": STEPS, "suppress_tokens": [0], "beta": BETA}
    seeds = torch.arange(20, 25)
    if sampled:
        fixed |= {"do_sample": True, "seed": seeds, "top_k": 0, "temperature": 1.2}
    fixed |= more
    answers = rgtg_fast.generate_many(models()["lm"], prompts, batch_size=2, **options, **fixed)
    for answer in answers:
        assert answer.error is None
        i = answer.index
        own = {"seed": seeds[i : i + 1]} if sampled else {}
        alone = guided(options, {"input_ids": prompts[i][None]}, **fixed | own)
        assert answer.tokens == alone.sequences[0, len(prompts[i]) :].tolist()
        for name in ("rewards", "kl"):
            want = getattr(alone, name)[0]
            torch.testing.assert_close(
                torch.tensor(getattr(answer, name)), want, rtol=1e-3, atol=1e-3
            )
        text = torch.cat([prompts[i], torch.tensor(answer.tokens[:-1], dtype=torch.int64)])
        if "top_k" not in more:
            pi = float(logp("lm", text)[answer.tokens[-1]])
            assert abs(answer.logprobs[-1] - pi) < 1e-3


def test_generate_many_cuts_the_candidates_of_a_reward_model(rm):
    prompts = [torch.arange(3, 3 + n) for n in (4, 7, 3, 5, 6)]
    options = {"reward_model": rm, "k": 8, "guided_top_p": 0.4, "do_sample": True}
    fixed = {"max_new_tokens": STEPS, "suppress_tokens": [0], "beta": BETA, "top_k": 0}
    seeds = torch.arange(20, 25)
    many = rgtg_fast.generate_many(
        models()["lm"], prompts, batch_size=2, seed=seeds, **fixed, **options
    )
    for answer in many:
        alone = guided(
            options, {"input_ids": prompts[answer.index][None]}, True, seed=seeds[[answer.index]]
        )
        assert answer.tokens == alone.sequences[0, len(prompts[answer.index]) :].tolist()
        torch.testing.assert_close(torch.tensor(answer.kl), alone.kl[0], rtol=1e-3, atol=1e-3)


def test_a_row_that_ends_leaves_and_the_others_go_on():
    options, reward = rewards()["farma"]
    inputs = tiny.prompts(3, 9, 6)
    formula = lambda x: logp("lm", x) + BETA * reward(x)  # noqa: E731
    plain = guided(options, inputs, k=None, return_dict_in_generate=False, max_new_tokens=12)
    ended = plain[0, 10].item()
    out = guided(
        options,
        inputs,
        k=None,
        eos_token_id=ended,
        return_dict_in_generate=False,
        max_new_tokens=12,
    )
    for row, mask in enumerate(inputs["attention_mask"]):
        tokens, _ = decoded(inputs["input_ids"][row][mask.bool()], formula, steps=12)
        tokens = tokens[: tokens.index(ended) + 1] if ended in tokens else tokens
        assert out[row, 9:].tolist()[: len(tokens)] == tokens
