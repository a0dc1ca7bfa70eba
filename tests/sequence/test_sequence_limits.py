"""CARDS, twisted SMC and backtracking against enumeration of all texts of a tiny model."""

import functools
import itertools
import math
from collections import Counter

import pytest
import torch
import transformers as tf
from chi_square import chi_square_p
from tiny import full_reward

import rgtg_fast

VOCAB, EOS, STEPS, PROMPT = 6, 5, 3, [1, 2]
TINY = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
TINY |= {"eos_token_id": EOS, "bos_token_id": 1, "max_position_embeddings": 32}


@functools.cache
def models():
    torch.manual_seed(0)
    lm = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, initializer_range=0.3)).eval()
    rm = tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**TINY, initializer_range=0.4, num_labels=1)
    ).eval()
    return lm, rm


@functools.cache
@torch.no_grad()
def next_logprobs(tokens):
    return models()[0](torch.tensor([PROMPT + list(tokens)])).logits[0, -1].double().log_softmax(-1)


@functools.cache
@torch.no_grad()
def reward(tokens):
    # Not by the public forward, which passes over a last token that is the padding's.
    return float(full_reward(models()[1], torch.tensor([PROMPT + list(tokens)])))


def ended(tokens):
    return len(tokens) == STEPS or EOS in tokens[-1:]


@functools.cache
def texts():
    """Every text with log π of it."""
    every = {}
    for tokens in itertools.chain.from_iterable(
        itertools.product(range(VOCAB), repeat=n) for n in range(1, STEPS + 1)
    ):
        if ended(tokens) and EOS not in tokens[:-1]:
            every[tokens] = sum(float(next_logprobs(tokens[:i])[v]) for i, v in enumerate(tokens))
    assert math.isclose(sum(map(math.exp, every.values())), 1, abs_tol=1e-9)
    return every


def exact(beta):
    """log Z, and the mean reward of π exp(β r) / Z."""
    tilted = torch.tensor([logp + beta * reward(y) for y, logp in texts().items()])
    rewards = torch.tensor([reward(y) for y in texts()])
    return float(tilted.logsumexp(0)), float((tilted.softmax(0) * rewards).sum())


def smc(count, n, beta, **options):
    lm, rm = models()
    given = {"n": n, "k": VOCAB, "beta": beta, "max_new_tokens": STEPS} | options
    answers = list(rgtg_fast.twisted_smc(lm, [PROMPT] * count, reward_model=rm, seed=5, **given))
    assert all(answer.error is None for answer in answers)
    return answers


@pytest.mark.parametrize("ess_threshold", [0.0, 0.5, 1.0])
def test_the_estimate_of_z_is_unbiased(ess_threshold):
    """For any n: the mean of the estimates is Z."""
    log_z, _ = exact(0.8)
    answers = smc(100, 3, 0.8, ess_threshold=ess_threshold)
    ratios = torch.tensor([math.exp(a.log_z - log_z) for a in answers])
    error = float(ratios.std() / len(ratios) ** 0.5)
    assert abs(float(ratios.mean()) - 1) < 4 * error and error < 0.1


@pytest.mark.slow
def test_log_z_and_the_mean_reward_converge_to_the_exact_values():
    log_z, mean = exact(0.8)
    off = {}
    for n in (4, 16, 64):
        answers = smc(100, n, 0.8)
        of_z = torch.tensor([a.log_z for a in answers]) - log_z
        means = torch.tensor([sum(c.weight * c.reward for c in a.candidates) for a in answers])
        off[n] = [float(x.square().mean() ** 0.5) for x in (of_z, means - mean)]
    for few, many in itertools.pairwise(off):  # four times as many: half the error, about
        assert off[many][0] < 0.75 * off[few][0] and off[many][1] < 0.75 * off[few][1]
    drawn = torch.tensor([a.reward for a in answers])
    for rewards in (means, drawn):
        assert abs(float(rewards.mean()) - mean) < 4 * float(rewards.std() / len(rewards) ** 0.5)


def accepted(tokens, rule):
    """The chance that a segment which ends with these tokens of the answer is taken."""
    start = (1 - rule["alpha"]) * reward(()) + rule["alpha"] * rule["reward_target"]
    slope = (rule["reward_target"] - start) / STEPS
    tau = min(rule["reward_target"], start + slope * len(tokens))
    return min(1.0, math.exp((reward(tokens) - tau) / rule["beta"]))


def segments(tokens, rule, length=0):
    """Each candidate segment behind an answer, as the answer with it, and its probability."""
    logp = next_logprobs(tokens)
    if length:
        uncertain = float(-(logp.exp() * logp).sum()) >= rule["entropy_threshold"]
        if length == rule["max_segment"] or (length >= rule["min_segment"] and uncertain):
            return {tokens: 1.0}
    every = {}
    for v in range(VOCAB):
        longer, p = (*tokens, v), math.exp(logp[v])
        rest = {longer: 1.0} if ended(longer) else segments(longer, rule, length + 1)
        every |= {text: p * q for text, q in rest.items()}
    return every


def process(rule):
    """The probability of every answer, and the expected rejections."""
    answers, rejections, waiting = Counter(), 0.0, [((), 1.0)]
    while waiting:
        tokens, p = waiting.pop()
        taken = {y: q * accepted(y, rule) for y, q in segments(tokens, rule).items()}
        total = sum(taken.values())
        rejections += p * (1 - total) / total
        for text, q in taken.items():
            if ended(text):
                answers[text] += p * q / total
            else:
                waiting.append((text, p * q / total))
    return dict(answers), rejections


@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_cards_draws_texts_and_rejects_segments_as_its_rule_says(count):
    lm, rm = models()
    entropies = sorted(
        float(-(p.exp() * p).sum()) for p in map(next_logprobs, [(v,) for v in range(VOCAB)])
    )
    rule = {"reward_target": 0.8, "alpha": 0.4, "beta": 0.5, "min_segment": 1, "max_segment": 2}
    rule["entropy_threshold"] = (entropies[2] + entropies[3]) / 2  # some segments are cut by it
    probabilities, rejections = process(rule)
    assert math.isclose(sum(probabilities.values()), 1, abs_tol=1e-9) and rejections > 0.3
    got = list(
        rgtg_fast.cards(
            lm, [PROMPT] * count, reward_model=rm, seed=7, batch_size=50,
            max_new_tokens=STEPS, max_rejections=10**6, **rule,
        )
    )  # fmt: skip
    assert chi_square_p(Counter(tuple(a.tokens) for a in got), probabilities) > 1e-3
    counts = torch.tensor([float(a.rejected) for a in got])
    assert abs(float(counts.mean()) - rejections) < 4 * float(counts.std() / count**0.5)
    for answer in got:  # a reward for each segment and each rejection
        assert answer.cost.rewards == len(answer.segments) + answer.rejected
        assert sum(answer.segments) == len(answer.tokens)


BACK = 3


def ways_on(tokens, k, beta):
    """What one draw makes of a text, and the probabilities; beta None: without a reward."""
    logp = next_logprobs(tokens).clone()
    if not tokens:
        logp[BACK] = -math.inf
    logp, ids = logp.topk(k)
    texts = [tokens[:-1] if v == BACK else (*tokens, v) for v in ids.tolist()]
    rewards = torch.tensor([0.0 if beta is None else beta * reward(text) for text in texts])
    return zip(texts, (logp + rewards).softmax(0).tolist(), strict=True)


def walk(k, beta, most):
    """The probability of every text that `most` draws may end in, and the expected un-doings."""
    over, going, undone = Counter(), {(): 1.0}, 0.0
    for _ in range(most):
        later = Counter()
        for tokens, p in going.items():
            for text, q in ways_on(tokens, k, beta):
                undone += p * q * (len(text) < len(tokens))
                (over if ended(text) else later)[text] += p * q
        going = later
    return over + going, undone


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "k, beta", [(VOCAB, -0.5), (4, -0.5), (4, None), (None, None)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("most", [6, 40])
def test_backtracking_ends_in_texts_as_its_chain_on_prefixes_does(count, k, beta, most):
    """Also where it runs out of steps, at any text."""
    lm, rm = models()
    probabilities, undone = walk(k or VOCAB, beta, most)
    assert math.isclose(sum(probabilities.values()), 1, abs_tol=1e-9) and undone > 0.3
    guided = {} if beta is None else {"reward_model": rm, "beta": beta}
    got = list(
        rgtg_fast.backtracking(
            lm, [PROMPT] * count, backspace_token_id=BACK, k=k, max_steps=most, seed=11,
            max_new_tokens=STEPS, batch_size=50, **guided,
        )
    )  # fmt: skip
    assert chi_square_p(Counter(tuple(a.tokens) for a in got), probabilities) > 1e-3
    counts = torch.tensor([float(a.undone) for a in got])
    assert abs(float(counts.mean()) - undone) < 4 * float(counts.std() / count**0.5)
    assert all(a.steps == len(a.tokens) + 2 * a.undone <= most for a in got)
