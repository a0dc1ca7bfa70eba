"""Presets of mixtures against their published formulas, transcribed: whole forwards in float64."""

import pytest
import tiny
import torch
from mixtures import STEPS, check, chi_square, decoded, logits, logp, models, nucleus

import rgtg_fast
from rgtg_fast import presets

SEEDS = torch.tensor([5, 6, 7])


def plausible(scores, pi, alpha):
    """Scores [V], -inf where π < α max π."""
    return scores.masked_fill(pi < alpha * pi.max(), -torch.inf)


def cut(scores, by):
    """Scores [V], -inf where those of another are."""
    return scores.masked_fill(by == -torch.inf, -torch.inf)


def best(scores, k):
    return scores.masked_fill(scores < scores.topk(k).values[-1], -torch.inf)


def cases():
    """Name -> the preset, and its formula of a text as published: scores [V], to be tempered."""
    m = models()
    a, b = m["a"], m["b"]
    z, lp = logits, logp
    return {
        "genarm": (presets.genarm(a, alpha=0.8), lambda x: lp("lm", x) + 0.8 * lp("a", x)),
        "farma": (presets.farma(a, beta=0.4), lambda x: lp("lm", x) + 0.4 * z("a", x)),
        "dpo_implicit": (
            presets.dpo_implicit(a, b, beta=0.6),
            lambda x: lp("lm", x) + 0.6 * (lp("a", x) - lp("b", x)),
        ),
        "dexperts": (
            presets.dexperts(a, b),
            lambda x: nucleus(z("lm", x), 0.9) + 2.0 * (z("a", x) - z("b", x)),
        ),
        "dexperts, uncut": (
            presets.dexperts(a, b, alpha=0.7, filter_p=1.0),
            lambda x: z("lm", x) + 0.7 * (z("a", x) - z("b", x)),
        ),
        "proxy_tuning": (
            presets.proxy_tuning(a, b),
            lambda x: z("lm", x) + (z("a", x) - z("b", x)),
        ),
        "contrastive": (
            presets.contrastive(a),
            lambda x: plausible(lp("lm", x) - lp("a", x), lp("lm", x).exp(), 0.1),
        ),
        "contrastive, a tempered amateur": (
            presets.contrastive(a, alpha=0.02, amateur_temperature=0.5),
            lambda x: plausible(
                lp("lm", x) - (z("a", x) / 0.5).log_softmax(-1), lp("lm", x).exp(), 0.02
            ),
        ),
        "pad": (
            presets.pad(a),  # π_ref = π, normalised over the candidates as in its code
            lambda x: (
                cut(0.8 * (z("a", x) - z("lm", x)), best(z("lm", x), 10)) + best(z("lm", x), 10)
            ),
        ),
        "pad, a reference": (
            presets.pad(a, b, weight=1.5, k=7),
            lambda x: best(lp("lm", x), 7) + 1.5 * (lp("a", x) - lp("b", x)),
        ),
        "nash_md": (
            presets.nash_md(a),
            lambda x: 0.875 * lp("lm", x) + 0.125 * lp("a", x),
        ),
        "aad": (
            presets.aad(a),
            lambda x: plausible(lp("lm", x) - lp("a", x), lp("lm", x).exp(), 0.1),
        ),
    }


def run(preset, inputs, **options):
    fixed = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "pad_token_id": 0}
    fixed["suppress_tokens"] = [tiny.PAD]
    return rgtg_fast.generate(models()["lm"], **inputs, **fixed | preset | options)


GREEDY = ("pad", "pad, a reference", "aad")
SAMPLED = [name for name in cases() if name not in GREEDY]


@pytest.mark.parametrize("name", cases())
def test_greedy_tokens_are_those_of_the_formula(name):
    preset, formula = cases()[name]
    inputs = tiny.prompts(3, 9, 6)
    check(run(preset, inputs), inputs, formula, kl=False)


@pytest.mark.parametrize("name", SAMPLED)
def test_drawn_tokens_are_those_of_the_formula(name):
    preset, formula = cases()[name]
    inputs = tiny.prompts(3, 9, 6)
    check(run(preset, inputs, do_sample=True, seed=SEEDS), inputs, formula, SEEDS, kl=False)


@pytest.mark.parametrize("name", SAMPLED)
def test_tokens_are_drawn_as_often_as_the_formula_says(name):
    preset, formula = cases()[name]
    inputs = tiny.prompts(3, 8)
    more = {"num_return_sequences": 2000, "max_new_tokens": 1, "do_sample": True, "seed": 1}
    tokens = run(preset, inputs, **more).sequences[2000:, -1]
    q = formula(inputs["input_ids"][1]).softmax(-1)
    assert chi_square(tokens, q)
    assert not chi_square(tokens, (1.6 * q.log()).softmax(-1)) or float(q.max()) > 0.95


@pytest.mark.parametrize("name", ["dexperts", "contrastive", "nash_md", "aad", "pad"])
def test_generate_many_takes_them(name):
    preset, formula = cases()[name]
    prompts = [torch.arange(3, 3 + n) for n in (4, 7, 5)]
    own = {} if name in GREEDY else {"do_sample": True, "seed": SEEDS}
    answers = rgtg_fast.generate_many(
        models()["lm"],
        prompts,
        batch_size=2,
        max_new_tokens=STEPS,
        suppress_tokens=[tiny.PAD],
        **preset | own,
    )
    for answer in answers:
        seed = int(SEEDS[answer.index]) if own else None
        assert answer.tokens == decoded(prompts[answer.index], formula, seed=seed)[0]


def test_the_presets_of_a_share_need_some_of_the_language_model():
    for made in (presets.nash_md, lambda a, x: presets.pad(a, weight=x)):
        for share in (1.0, -0.1, float("nan")):
            with pytest.raises(ValueError, match=r"other model's share beside π; pass 0 <= x < 1"):
                made(models()["a"], share)
