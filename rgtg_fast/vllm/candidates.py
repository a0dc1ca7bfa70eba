"""Requests, and their candidates of π as each of them cuts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops

REACH = 64  # of the likeliest tokens, in which top_k, top_p and min_p are looked for


@dataclass(eq=False)
class Request:
    """A guided request: what its tokens are drawn with, and where they are.

    `outputs` is vLLM's own list of its tokens (V1); None where they are read from the runner (V2).
    """

    prompt: int  # tokens
    outputs: list[int] | None
    text: Any  # rows.Text
    k: int
    beta: float
    temperature: float
    seed: int | None  # the row's; None: vLLM's sampler draws
    top_p: float
    top_k: int
    min_p: float
    number: int | None  # in the file of steps

    @property
    def draws(self) -> bool:
        """Whether the token is drawn here."""
        return self.seed is not None

    @property
    def cuts(self) -> bool:
        """Whether π is cut before the token is drawn here."""
        return self.draws and (self.top_p < 1 or self.min_p > 0 or self.top_k > 0)


def candidates(logits: Tensor, requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates of logits [n, V], the likeliest first: log-probs [n, k], -inf beyond a
    request's own k and where its `top_k`, `top_p` and `min_p` cut π; ids [n, k]; and whether
    log-probs are those of what is left of π, bool [n]: where it is more than is looked at here
    they are short by a constant, which no token depends on."""
    most, vocabulary = max(request.k for request in requests), logits.shape[1]
    cuts = [request for request in requests if request.cuts]
    # top_k at most; where there is none, top_p and min_p may keep any number.
    reach = max((min(r.top_k or REACH, REACH) for r in cuts), default=0)
    logprobs, ids = ops.topk_logprobs(logits, min(max(most, reach), vocabulary))
    known = torch.ones_like(logprobs[:, 0], dtype=torch.bool)
    if cuts:
        rows = [i for i, request in enumerate(requests) if request.cuts]
        at = torch.tensor(rows, dtype=torch.int64, device=logits.device)
        logprobs[at], known[at] = _cut(logprobs[at], logits[at], cuts)
    rank = torch.arange(logprobs.shape[1], device=logits.device)
    own = torch.tensor([request.k for request in requests], device=logits.device)
    logprobs = logprobs.masked_fill(rank >= own[:, None], -torch.inf)
    return logprobs[:, :most], ids[:, :most], known


def _cut(logprobs: Tensor, logits: Tensor, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """π, of its likeliest tokens [n, w], cut by each request's `top_k`, then `top_p` and `min_p` of
    what that leaves, as transformers has them; and whether no others are left, bool [n]."""

    def column(name: str, none: float) -> Tensor:
        values = [getattr(request, name) or none for request in requests]
        return torch.tensor(values, dtype=torch.float32, device=logprobs.device)[:, None]

    width = logprobs.shape[1]
    top_k, top_p, min_p = column("top_k", torch.inf), column("top_p", 1.0), column("min_p", 0.0)
    rank = torch.arange(width, device=logprobs.device)
    left = logprobs.masked_fill(rank >= top_k, -torch.inf)
    mass = left.logsumexp(1)
    for i, request in enumerate(requests):
        if not 0 < request.top_k < logits.shape[1]:
            mass[i] = 0.0  # of all tokens
        elif request.top_k > width:  # of more tokens than these
            whole = logits[i].float()
            mass[i] = whole.topk(request.top_k)[0].logsumexp(0) - whole.logsumexp(0)
    probs = (left - mass[:, None]).exp()
    before = probs.cumsum(1) - probs
    left.masked_fill_((before >= top_p) & (top_p < 1) & (rank > 0), -torch.inf)
    left.masked_fill_(probs < min_p * probs[:, :1], -torch.inf)
    known = (left[:, -1] == -torch.inf) | (top_k[:, 0].clamp(max=logits.shape[1]) <= width)
    mass = torch.where(known, left.logsumexp(1), mass)
    return left - mass[:, None], known
