"""Calls with speculation on tiny models, and what must be the same as without."""

import tiny
import torch

import rgtg_fast

NEW = 24


def answers(models, lengths, speculate, **options):
    return answers_to(tiny.prompts(*lengths), models, speculate, **options)


def answers_to(ids, models, speculate, **options):
    lm, rm = models
    options = {
        "beta": 0.3,
        "seed": 3,
        "max_new_tokens": NEW,
        "do_sample": True,
        "return_dict_in_generate": True,
        **options,
    }
    return rgtg_fast.generate(lm, **ids, reward_model=rm, speculate=speculate, **options)


def assert_same(got, want):
    assert torch.equal(got.sequences, want.sequences)
    for name in ("rewards", "kl"):
        one, other = getattr(got, name), getattr(want, name)
        assert torch.allclose(one, other, atol=2e-4, equal_nan=True), name
