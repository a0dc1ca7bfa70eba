"""Requests for vLLM, and what `rgtg_fast.generate` gives to them."""

import random

import tiny
import torch

import rgtg_fast

K, BETA, MAX_LEN = 4, 2.0, 256


class Request:
    """A prompt and how its answer is drawn, for vLLM and for `rgtg_fast.generate`."""

    def __init__(self, length, steps, at, seed=None, guided=True, **own):
        self.prompt = tiny.prompts(length, seed=at)["input_ids"][0].tolist()
        self.steps, self.seed, self.guided = steps, seed, guided
        self.own = {"k": K, "beta": BETA} | own

    def params(self, own_seed=False):
        """`own_seed`: by `rgtg_seed`. vLLM on a CPU fails on a `seed` in chunked prefill."""
        from vllm import SamplingParams

        extra = {f"rgtg_{name}": value for name, value in self.own.items()}
        if own_seed and self.seed is not None:
            extra["rgtg_seed"] = self.seed
        return SamplingParams(
            temperature=0.0 if self.seed is None else 1.0,
            seed=None if own_seed else self.seed,
            max_tokens=self.steps,
            extra_args=extra if self.guided else {"rgtg": False},
        )

    def want(self, lm, rm, **options):
        ids = torch.tensor([self.prompt])
        same = {"max_new_tokens": self.steps, "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS}
        same |= {"do_sample": self.seed is not None}
        if not self.guided:
            out = lm.generate(ids, **same)
        else:
            own = self.own | options
            out = rgtg_fast.generate(lm, ids, reward_model=rm, seed=self.seed, **own, **same)
        return out[0, len(self.prompt) :].tolist()


def twelve(guided=True):
    """Prompts of 3 to 128 tokens, 20 to 110 new ones; every other is guided, or all are."""
    lengths = (3, 128, 17, 64, 5, 90, 33, 8, 47, 120, 12, 71)
    steps = (110, 20, 60, 40, 35, 50, 90, 70, 25, 30, 80, 45)
    betas = (0.5, 4.0, 1.0, 2.0)
    return [
        Request(
            length,
            count,
            at,
            seed=None if at % 3 == 0 else 100 + at,
            guided=guided or at % 2 == 0 or at % 3 != 0,
            beta=betas[at % 4],
            k=(4, 10)[at % 2],
        )
        for at, (length, count) in enumerate(zip(lengths, steps, strict=True))
    ]


def two_hundred():
    """Random ones, a third of them unguided."""
    draw = random.Random(4)
    requests = [
        Request(
            draw.randint(1, 128),
            draw.randint(1, 24),
            at,
            seed=draw.choice([None, draw.randrange(2**40)]),
            beta=draw.choice([0.0, 0.5, 1.0, 4.0]),
            k=draw.randint(1, 12),
        )
        for at in range(200)
    ]
    for request in requests[::3]:
        request.guided, request.seed = False, None
    return requests
