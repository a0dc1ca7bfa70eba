"""Beta over the answer, beta for a given KL, and steps without reward: against a plain loop."""

import functools
import math

import pytest
import tiny
import torch
import zoo
from oracle import lm_logits, public

import rgtg_fast
from rgtg_fast import WeightedRewards, ops
from rgtg_fast.decode.steering import entropy_of, kl_of, solve_beta

STEPS, K = 10, 5


@functools.cache
def models():
    return tiny.llama_lm(), tiny.llama_rm(seed=11), tiny.gpt2_rm(seed=12)


def ramp(position):
    return 0.25 * position if position < 6 else -0.5


def kl_by_hand(logp, rewards, beta, temperature):
    """Plain float64 arithmetic."""
    scores = [(lp + beta * r) / temperature for lp, r in zip(logp, rewards, strict=True)]
    log_z = math.log(sum(math.exp(s - max(scores)) for s in scores)) + max(scores)
    return sum(math.exp(s - log_z) * (s - log_z - lp) for s, lp in zip(scores, logp, strict=True))


def beta_by_hand(logp, rewards, most, temperature, budget):
    low, high = 0.0, most
    if kl_by_hand(logp, rewards, most, temperature) <= budget:
        return most
    if kl_by_hand(logp, rewards, 0.0, temperature) >= budget:
        return 0.0
    for _ in range(200):
        middle = (low + high) / 2
        if kl_by_hand(logp, rewards, middle, temperature) > budget:
            high = middle
        else:
            low = middle
    return low


@torch.no_grad()
def by_hand(prompt, seed, *, beta=1.0, schedule=None, budget=None, least=0.0, sampled=True):
    """Tokens, rewards, betas and KLs of one row, by full forwards."""
    lm, reward = models()[0], public(models()[1])
    ids, rows = prompt, []
    for step in range(STEPS):
        logits = lm_logits(lm, ids)
        cand = torch.argsort(logits, descending=True, stable=True)[:K]
        logp = torch.log_softmax(logits.double(), -1)[cand]
        p = logp.softmax(-1)
        rewards, now = torch.zeros(K), 0.0
        gated = float(-(p * p.log()).sum()) < least
        if not gated:
            rewards = reward(torch.cat([ids.expand(K, -1), cand[:, None]], dim=1))
            now = beta * (schedule(step) if schedule else 1.0)
            if budget:
                now = beta_by_hand(logp.tolist(), rewards.tolist(), now, 1.0, budget)
        if sampled:
            slot, _ = ops.ratio_sample(
                logp.float()[None], rewards[None], cand[None], now, 1.0, torch.tensor([seed]), step,
                True, backend="reference",
            )  # fmt: skip
            slot = int(slot)
        else:
            slot = int((logp + now * rewards).argmax())
        kl = kl_by_hand(logp.tolist(), rewards.tolist(), now, 1.0)
        rows.append((int(cand[slot]), math.nan if gated else float(rewards[slot]), now, kl))
        ids = torch.cat([ids, cand[slot, None]])
        if int(cand[slot]) == tiny.EOS:
            break
    return [list(column) for column in zip(*rows, strict=True)]


PROMPTS = [torch.arange(3, 3 + n) * 7 % 290 + 3 for n in (4, 9, 6)]
SEEDS = [5, 6, 7]


def guided(rm=None, **options):
    options = {"k": K, "max_new_tokens": STEPS, "return_dict_in_generate": True} | options
    options = {
        "seed": torch.tensor(SEEDS),
        "do_sample": True,
        "suppress_tokens": [0],
        "top_k": 0,
    } | options
    batch = zoo.left_pad(PROMPTS) | {"pad_token_id": 0}
    rm = models()[1] if rm is None else rm
    return rgtg_fast.generate(models()[0], **batch, reward_model=rm, **options)


def check(options, of_oracle, sampled=True):
    """`generate` and `generate_many` against the plain loop: tokens, rewards, betas."""
    lm, rm, _ = models()
    rows = zip(PROMPTS, SEEDS, strict=True)
    want = [by_hand(prompt, seed, sampled=sampled, **of_oracle) for prompt, seed in rows]
    out = guided(do_sample=sampled, **options)
    width = out.sequences.shape[1] - out.rewards.shape[1]
    many = {"k": K, "max_new_tokens": STEPS, "batch_size": 2, "suppress_tokens": [0], "top_k": 0}
    answers = rgtg_fast.generate_many(
        lm, PROMPTS, reward_model=rm, seed=torch.tensor(SEEDS), do_sample=sampled, **many, **options
    )
    answers = sorted(answers, key=lambda answer: answer.index)
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3, equal_nan=True)
    for i, (tokens, rewards, betas, kls) in enumerate(want):
        n = len(tokens)
        assert out.sequences[i, width : width + n].tolist() == tokens == answers[i].tokens
        for got in (out.rewards[i, :n], torch.tensor(answers[i].rewards)):
            close(got, torch.tensor(rewards))
        close(torch.tensor(answers[i].beta), torch.tensor(betas))
        if out.beta is not None:
            close(out.beta[i, :n], torch.tensor(betas))
            assert out.beta[i, n:].isnan().all()
        if sampled:
            for got in (out.kl[i, :n], torch.tensor(answers[i].kl)):
                close(got, torch.tensor(kls))
    return out, want


@pytest.mark.parametrize("sampled", [True, False])
def test_beta_follows_the_position_of_each_row(sampled):
    options = {"beta_schedule": ramp, "beta": 2.0}
    check(options, {"schedule": ramp, "beta": 2.0}, sampled)


def test_a_schedule_goes_with_betas_of_rows_and_a_head_on_the_language_model():
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0)) / 32**0.5
    head = rgtg_fast.RewardHead(models()[0], weight)
    out = guided(head, beta=torch.tensor([1.0, 2.0, -1.0]), beta_schedule=ramp)
    for row, beta in enumerate((1.0, 2.0, -1.0)):
        want = torch.tensor([beta * ramp(t) for t in range(out.beta.shape[1])])
        torch.testing.assert_close(
            out.beta[row], want.where(~out.beta[row].isnan(), torch.nan), equal_nan=True
        )
    flat = guided(head, beta=torch.tensor([1.0, 2.0, -1.0]), beta_schedule=lambda t: 1.0)
    assert torch.equal(flat.sequences, guided(head, beta=torch.tensor([1.0, 2.0, -1.0])).sequences)


@pytest.mark.parametrize("budget", [0.3, 1.0, 2.5])
def test_the_kl_of_every_step_is_the_budget(budget):
    options = {"kl_budget": budget, "beta": 6.0}
    out, want = check(options, {"budget": budget, "beta": 6.0})
    solved = 0
    for row, (_, _, betas, _) in enumerate(want):
        for step, beta in enumerate(betas):
            kl = float(out.kl[row, step])
            if 0 < beta < 6.0:
                assert abs(kl - budget) <= 1e-4
                solved += 1
            else:  # out of reach: more without any reward, or less at the largest beta
                assert kl >= budget - 1e-4 if beta == 0 else kl <= budget + 1e-4
    assert solved >= 5


def test_a_kl_budget_goes_with_a_schedule_of_the_largest_beta_and_a_sum():
    _, a, b = models()
    out = guided(WeightedRewards([a, b], [0.7, 0.3]), kl_budget=0.8, beta=4.0, beta_schedule=ramp)
    most = torch.tensor([4 * ramp(t) for t in range(out.beta.shape[1])])
    there = ~out.beta.isnan()
    inside = (out.beta.abs() > 0) & (out.beta.abs() < most.abs() * (1 - 1e-6)) & there
    assert inside.sum() >= 3
    assert ((out.kl - 0.8).abs()[inside] <= 1e-4).all()
    assert ((out.beta * most >= 0) & (out.beta.abs() <= most.abs() + 1e-6))[there].all()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
def test_beta_solved_is_that_of_plain_bisection(temperature, spread):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        logp = torch.randn(3, 7, generator=generator).mul(3).log_softmax(-1) - 0.05
        rewards = torch.randn(3, 7, generator=generator) * spread
        most, budget = torch.tensor([1.0, 10.0, -5.0]), 0.6
        beta = solve_beta(logp, rewards, most, torch.full((3,), temperature), budget)
        kl = kl_of(logp, rewards, beta, torch.full((3,), temperature))
        for i in range(3):
            want = beta_by_hand(
                logp[i].tolist(), rewards[i].tolist(), float(most[i]), temperature, budget
            )
            if want in (0.0, float(most[i])):
                assert float(beta[i]) == want
            else:
                assert abs(float(kl[i]) - budget) <= 1e-4
                if temperature == 1:  # where the KL grows with beta, there is one
                    assert math.isclose(float(beta[i]), want, rel_tol=1e-4, abs_tol=1e-6)


def test_impossible_candidates_have_no_part_in_the_kl():
    logp = torch.tensor([[-0.5, -1.5, -torch.inf, -2.0]])
    rewards = torch.tensor([[0.0, 1.0, 9.0, -torch.inf]])
    beta = solve_beta(logp, rewards, torch.tensor([50.0]), torch.ones(1), 0.5)
    want = beta_by_hand([-0.5, -1.5], [0.0, 1.0], 50.0, 1.0, 0.5)
    assert math.isclose(float(beta), want, rel_tol=1e-5)
    assert math.isclose(
        float(entropy_of(torch.tensor([[0.0, 0.0, -torch.inf]]))), math.log(2), rel_tol=1e-6
    )


@pytest.mark.parametrize("least", [0.4, 0.8, 1.1, 9.0])
def test_rows_go_without_reward_where_the_language_model_is_sure(least):
    """The tokens of scoring every step and leaving those rewards out."""
    out, want = check({"min_entropy": least, "beta": 2.0}, {"least": least, "beta": 2.0})
    gated = sum(math.isnan(r) for row in want for r in row[1])
    assert (
        out.gating["steps"] == gated == int(((out.candidates_scored == 0) & ~out.kl.isnan()).sum())
    )
    assert gated > 0


def test_what_was_left_out_is_read_later_in_one_forward(monkeypatch):
    """The reward model's tokens are those of the steps that were scored, and each token once."""
    seen = []
    out = guided(min_entropy=0.8, beta=2.0, compact=False)
    plain = rgtg_fast.scorers.TreeScorer.score

    def score(self, ids, keep=None, handles=None):
        seen.append(len(ids) * K)
        return plain(self, ids, keep, handles)

    extend = rgtg_fast.scorers.TreeScorer.extend

    def extended(self, handles, ids):
        seen.append(sum(map(len, ids)))
        return extend(self, handles, ids)

    monkeypatch.setattr(rgtg_fast.scorers.TreeScorer, "score", score)
    monkeypatch.setattr(rgtg_fast.scorers.TreeScorer, "extend", extended)
    again = guided(min_entropy=0.8, beta=2.0, compact=False)
    assert torch.equal(again.sequences, out.sequences)
    steps = int((~out.kl.isnan()).sum())
    assert sum(seen) == steps * K - out.gating["tokens_saved"] and out.gating["tokens_saved"] > 0


CASES = {
    "expand": lambda: (zoo.rm("bloom"), {}),
    "reencode": lambda: (zoo.rm("bert"), {}),
    "genarm": lambda: (zoo.lm("mistral"), {"reward_kind": "genarm"}),
    "pair": lambda: ((zoo.lm("llama"), zoo.lm("gpt2")), {}),
    "sum": lambda: (WeightedRewards([zoo.rm("llama"), zoo.rm("bert")], [0.7, 0.3]), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*is scored by")
def test_every_scorer_catches_up(case):
    """Beside a scorer that is given every token: rewards where both have some are the same."""
    rm, options = CASES[case]()
    lm = zoo.lm("qwen2")
    options |= {"k": 4, "max_new_tokens": 12, "return_dict_in_generate": True, "beta": 0.5}
    batch = zoo.left_pad(zoo.prompts(2, (5, 8, 3)))
    call = functools.partial(rgtg_fast.generate, lm, **batch, reward_model=rm, **options)
    out = call(min_entropy=0.9)
    gated = (out.candidates_scored == 0) & ~out.kl.isnan()
    assert gated.any() and not gated.all()
    # The same tokens forced, one by one, with every reward.
    answers = out.sequences[:, batch["input_ids"].shape[1] :]

    def forced(ids, scores):
        step = ids.shape[1] - batch["input_ids"].shape[1]
        keep = torch.full_like(scores, -1e4)
        return scores.add(0) + keep.scatter(1, answers[:, step : step + 1], 0.0)

    every = call(logits_processor=[forced])
    both = ~gated & ~out.rewards.isnan() & ~every.rewards.isnan()
    assert torch.equal(every.sequences, out.sequences) and both.any()
    torch.testing.assert_close(out.rewards[both], every.rewards[both], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta_schedule": 2.0}, "beta_schedule=2.0; pass a function of the position"),
        ({"beta_schedule": lambda t: 1 / (t - 4 or math.nan)}, r"beta_schedule\(4\) gave nan"),
        ({"beta_schedule": lambda t: "1e999"}, r"beta_schedule\(0\) gave '1e999'"),
        ({"beta_schedule": lambda t: None}, r"beta_schedule\(0\) gave None; it must give a finite"),
        ({"kl_budget": 0}, "kl_budget=0; pass a positive number of nats"),
        ({"kl_budget": math.inf}, "kl_budget=inf is not finite"),
        ({"kl_budget": torch.tensor([1.0, 2.0])}, "pass a positive number of nats"),
        ({"kl_budget": 1.0, "do_sample": False}, "pass do_sample=True, or beta= alone"),
        ({"min_entropy": -1.0}, "min_entropy=-1.0; pass a positive number"),
        ({"min_entropy": "low"}, "min_entropy must be a float"),
    ],
)
def test_unclear_steering_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        guided(**options)


def test_gating_of_a_scorer_without_rows_is_refused():
    scorer = tiny.CountingScorer(torch.zeros(tiny.vocab_size()))
    with pytest.raises(ValueError, match="CountingScorer has no rows that come and go"):
        guided(scorer, min_entropy=0.5)


def test_speculation_says_that_it_takes_one_step_at_a_time():
    for options in ({"kl_budget": 0.5}, {"beta_schedule": ramp}, {"min_entropy": 0.5}):
        with pytest.warns(UserWarning, match="no speculation"):
            guided(speculate=4, **options)


def test_gated_rows_may_not_take_what_is_no_token_of_the_reward_model():
    """Its rewards say so where it is asked, with -inf."""
    lm, rm = tiny.llama_lm(), tiny.llama_rm()
    rm.resize_token_embeddings(tiny.vocab_size())
    scorer = rgtg_fast.scorers.make_scorer(rm, k=K, vocab_size=tiny.vocab_size())
    half = tiny.vocab_size() // 2
    scorer.rm.vocab_size, scorer.largest_id = half, tiny.vocab_size() - 1
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    options = {"k": K, "max_new_tokens": 8, "beta": 1e-6, "reward_model": scorer}
    gated = rgtg_fast.generate(lm, **inputs, min_entropy=9.0, **options)
    want = rgtg_fast.generate(lm, **inputs, **options)
    assert torch.equal(gated, want) and (gated[0, 3:] < half).all()
