"""A guided call, in the form in which the tests give it options."""

import rgtg_fast


def guided(lm, rm, *args, **options):
    """`rgtg_fast.generate`; test modules fix the options they share by `functools.partial`."""
    return rgtg_fast.generate(lm, *args, reward_model=rm, **options)


def unguided(lm, rm, *args, **options):
    """The same with the reward taken out."""
    return guided(lm, rm, *args, beta=0.0, **options)
