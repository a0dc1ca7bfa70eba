"""Decoding over the whole vocabulary as the formulas say: float64 models, whole texts, no cache."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import tiny
import torch

from rgtg_fast.ops.reference import gumbel_noise

STEPS = 6


@functools.cache
def models() -> dict[str, Any]:
    """A language model and others, of two families."""
    made = {"lm": tiny.llama_lm(), "a": tiny.llama_lm(seed=13), "b": tiny.gpt2_lm(seed=14)}
    return {name: model.requires_grad_(False) for name, model in made.items()}


@functools.cache
def _double(name: str) -> Any:
    return copy.deepcopy(models()[name]).double()


def logits(name: str, ids: torch.Tensor) -> torch.Tensor:
    """Of the next token, float64 [V], of a text [L]; of the language model without its padding."""
    z = _double(name)(input_ids=ids[None], use_cache=False).logits[0, -1].clone()
    if name == "lm":
        z[tiny.PAD] = -torch.inf
    return z


def logp(name: str, ids: torch.Tensor) -> torch.Tensor:
    return logits(name, ids).log_softmax(-1)


def nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores [V], -inf outside of the fewest tokens that have `top_p` together."""
    kept, mass = torch.full_like(scores, -torch.inf), 0.0
    for token in scores.argsort(descending=True, stable=True).tolist():
        if mass >= top_p:
            break
        kept[token], mass = scores[token], mass + float(scores.softmax(-1)[token])
    return kept


@torch.no_grad()
def decoded(
    prompt: torch.Tensor,
    formula: Callable[[torch.Tensor], torch.Tensor],
    *,
    temperature: float = 1.0,
    seed: int | None = None,
    top_p: float | None = None,
    steps: int = STEPS,
) -> tuple[list[int], list[float]]:
    """Tokens of the answer to `prompt` [P] by `formula`, which gives scores [V] of a text, and the
    KL of each step's policy from the language model. The best tokens, or with `seed` drawn ones."""
    ids, tokens, gaps = prompt, [], []
    for step in range(steps):
        scores = formula(ids) / temperature
        if top_p is not None:
            scores = nucleus(scores, top_p)
        value, own = scores, logp("lm", ids)
        if seed is not None:
            every = torch.arange(len(scores))
            value = scores + gumbel_noise(torch.tensor(seed), torch.tensor(step), every)
        token = int(value.argmax())
        q = scores.log_softmax(-1)
        gap = torch.where(q.isfinite(), q.exp() * (q - own), 0.0).sum()
        gaps.append(float(-own[token] if seed is None else gap))
        tokens.append(token)
        ids = torch.cat([ids, torch.tensor([token])])
        if token == tiny.EOS:
            break
    return tokens, gaps


def check(
    out: Any, inputs: dict[str, Any], formula: Any, seeds: Any = None, kl: bool = True, **how: Any
) -> None:
    """The output of `generate` is what the formula says, row for row."""
    width = inputs["input_ids"].shape[1]
    for row, mask in enumerate(inputs["attention_mask"]):
        prompt = inputs["input_ids"][row][mask.bool()]
        own = None if seeds is None else int(seeds[row])
        tokens, gaps = decoded(prompt, formula, seed=own, **how)
        got = out.sequences[row, width:].tolist()
        assert got[: len(tokens)] == tokens and not any(got[len(tokens) :]), (row, got, tokens)
        if kl:
            want = torch.tensor(gaps)
            torch.testing.assert_close(out.kl[row, : len(gaps)], want, rtol=1e-3, atol=1e-3)


def chi_square(tokens: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether tokens [n] are as draws from q [V] would be; those expected less than 5 times count
    as one."""
    counts = torch.bincount(tokens, minlength=len(q)).double()
    expected = q * len(tokens)
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    degrees = len(observed) - 1
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    return statistic < degrees + 5 * (2 * degrees) ** 0.5 + 5
