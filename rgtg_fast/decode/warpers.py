"""Hugging Face's warpers on the most likely tokens alone, where they are the last processors.

Top-k, top-p and their like look at the whole vocabulary (top-p sorts it) to keep a few dozen
tokens. The `REACH` most likely ones come with their log-probabilities under the whole vocabulary,
and mostly decide what is kept: what lies below the last of them is less likely still.

Top-k alone (`LastTopK`) needs no look at any number, so it is the same on a GPU and in a captured
step: it keeps every token that ties with the k-th, and those out of reach are counted in one pass.
Others (`Warpers`) only where the host may `look`: each row is either proved or done in Hugging
Face's way. Proved: every cut ends within reach, no number lies closer to a threshold than the
rounding of Hugging Face's sums could move it, and no tie lies across it. What a row gets depends on
that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import LogitsProcessorList

REACH = 64  # what `topk_logprobs` gives at most; 64 cost no more than 1.6 times what 10 do
ROUNDING = 2e-5  # relative, of fp32 softmax over up to `REACH` tokens and what is made of it
LARGE = 16384  # tokens; on a smaller vocabulary the whole row costs less than a proof (100 µs)

Topk = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# Called with scores [B, V], k and `topk_logprobs`, it gives what that gives for the warped scores.
Last = Callable[[Tensor, int, Topk], tuple[Tensor, Tensor]]


def take_temperature(processors: LogitsProcessorList) -> tuple[float, LogitsProcessorList]:
    """The temperature HF would put on the LM logits, and the processors without that warper."""
    kept, temperature = LogitsProcessorList(), 1.0
    for processor in processors:
        if isinstance(processor, tf.TemperatureLogitsWarper):
            temperature = float(processor.temperature)
        else:
            kept.append(processor)
    return temperature, kept


def trailing(
    processors: LogitsProcessorList, k: int, vocab_size: int, look: bool
) -> tuple[LogitsProcessorList, Last | None]:
    """The processors that need the whole row, and in one what those after them do."""
    first = len(processors)
    while first and _known(processors[first - 1]):
        first -= 1
    # Some need the entropy of all that is left, so something must have cut before them.
    while first < len(processors) and not _cuts(processors[first]):
        first += 1
    proofs_pay = look and vocab_size >= LARGE
    last = processors[-1] if processors else None
    top_k = last.top_k if type(last) is tf.TopKLogitsWarper and _known(last) else 0
    if k <= top_k <= REACH and (len(processors) - first <= 1 or not proofs_pay):
        return LogitsProcessorList(processors[:-1]), LastTopK(top_k)
    if first == len(processors) or not proofs_pay:
        return processors, None
    rest = LogitsProcessorList(processors[first:])
    return LogitsProcessorList(processors[:first]), Warpers(rest)


def _known(warper: Any) -> bool:
    """A warper of Hugging Face's as `generate` makes it."""
    return (
        type(warper) in CUTS
        and warper.filter_value == -math.inf
        and getattr(warper, "min_tokens_to_keep", 1) == 1
    )


def _cuts(warper: Any) -> bool:
    """Whether it can leave a few tokens of a whole row, and says which without the other tokens."""
    if type(warper) is tf.TopKLogitsWarper:
        return warper.top_k < REACH
    return type(warper) in (tf.TopPLogitsWarper, tf.MinPLogitsWarper, tf.EpsilonLogitsWarper)


class LastTopK:
    """Top-k, of k or more tokens."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def __call__(self, scores: Tensor, k: int, topk: Topk) -> tuple[Tensor, Tensor]:
        logprobs, ids = topk(scores, min(self.top_k, scores.shape[1]))
        scores = _as_seen(scores)
        border = scores.gather(1, ids[:, -1:])
        tied = scores.gather(1, ids) == border
        beyond = (scores == border).sum(1) - tied.sum(1)  # tokens tied with the last, out of reach
        p = logprobs.exp()
        mass = (p.sum(1) + p[:, -1] * beyond).clamp(min=1e-30)  # 0 where there is no token to keep
        return logprobs[:, :k] - mass.log()[:, None], ids[:, :k].contiguous()


class Warpers:
    """Any of `CUTS`, in their order."""

    def __init__(self, last: LogitsProcessorList) -> None:
        self.last = last

    def __call__(self, scores: Tensor, k: int, topk: Topk) -> tuple[Tensor, Tensor]:
        scores = _as_seen(scores)
        logprobs, ids = topk(scores, min(REACH, scores.shape[1]))
        reach = Reach(logprobs, scores.gather(1, ids).float(), scores.shape[1])
        for warper in self.last:
            reach.cut(CUTS[type(warper)], warper)
        logprobs, ids = reach.best(k, ids)
        doubtful = (~reach.proved).nonzero()[:, 0]
        if len(doubtful):
            whole = self.last(ids[doubtful], scores[doubtful].float())  # type: ignore[arg-type]
            logprobs[doubtful], ids[doubtful] = topk(whole, k)
        return logprobs, ids


def _as_seen(scores: Tensor) -> Tensor:
    """Hugging Face's processors get fp32, which a narrower type is widened to exactly."""
    return scores.float() if scores.dtype is torch.float64 else scores


class Reach:
    """The most likely tokens of each row [B, K], most likely first: which of them are `kept`.

    `values` fp32 are their logits and `logprobs` those under the whole vocabulary; `kept` bool.
    `proved` [B]: that Hugging Face keeps these, and nothing out of reach.
    """

    def __init__(self, logprobs: Tensor, values: Tensor, vocab_size: int) -> None:
        self.values, self.logprobs, self.vocab_size = values, logprobs.double(), vocab_size
        self.kept = logprobs > -torch.inf
        self.proved = self.kept[:, 0].clone()  # NaN and rows without a token are not for here
        # Adding up n fp32 numbers one by one is off by n 2^-24 at most, relatively, and torch does
        # it in four lanes or more. The constant covers exp, log and the kernel's rounding.
        self.slack = ROUNDING + vocab_size * 2**-26

    def cut(self, rule: Callable[[Reach, Any], Tensor], warper: Any) -> None:
        """Keep what `rule` keeps; only a row of which nothing out of reach is left stays proved."""
        self.kept = rule(self, warper)
        if self.kept.shape[1] < self.vocab_size:
            self.proved &= ~self.kept[:, -1]
            self.slack = ROUNDING  # from here on all but these are −inf, and add nothing to a sum
        # Under what is left. (Meaningless in a row with doubts, which is done again.)
        left = self.logprobs.masked_fill(~self.kept, -torch.inf)
        self.logprobs = left - left.logsumexp(1, keepdim=True)

    def doubt(self, numbers: Tensor, threshold: Any, of: Tensor) -> None:
        """No proof for rows with a number [B, K], of those in `of`, that close to a threshold."""
        self.proved &= ~(((numbers - threshold).abs() < self.slack) & of).any(1)

    def entropy(self) -> Tensor:
        """In nats [B, 1]."""
        p = self.logprobs.exp()
        return -(p * self.logprobs).where(self.kept, 0.0).sum(1, keepdim=True)

    def likely(self, log_threshold: Any, beyond: Tensor | None = None) -> Tensor:
        """What is kept of tokens at least so likely; the most likely one always is."""
        numbers = self.logprobs if beyond is None else self.logprobs - beyond
        top = self.values == self.masked().amax(1, keepdim=True)
        self.doubt(numbers, log_threshold, self.kept & ~top)
        return self.kept & ((numbers >= log_threshold) | top)

    def masked(self) -> Tensor:
        """The logits as the next warper sees them."""
        return self.values.masked_fill(~self.kept, -torch.inf)

    def best(self, k: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities fp32 and ids [B, k] of the first k kept; then, as in the whole row, the
        lowest ids of those at -inf."""
        order = (~self.kept).byte().argsort(dim=1, stable=True)[:, :k]
        kept, ids = self.kept.gather(1, order), ids.gather(1, order)
        logprobs = self.logprobs.gather(1, order).float()
        if kept.all():
            return logprobs, ids
        # At most k of the 2k lowest are taken.
        lowest = torch.arange(min(2 * k, self.vocab_size), device=ids.device)[None, :, None]
        taken = (lowest == ids.masked_fill(~kept, -1)[:, None]).any(2)
        free = taken.byte().argsort(dim=1, stable=True)
        place = (~kept).cumsum(1) - 1
        return logprobs, torch.where(kept, ids, free.gather(1, place.clamp(min=0)))


def _top_k(reach: Reach, warper: Any) -> Tensor:
    return reach.kept & (warper(None, reach.masked()) > -torch.inf)  # compares, without rounding


def _top_p(reach: Reach, warper: Any) -> Tensor:
    p = reach.logprobs.exp().where(reach.kept, 0.0)
    before = p.cumsum(1) - p  # what the more likely tokens have; of the first it is 0
    first = before <= 0
    reach.doubt(before, warper.top_p, reach.kept & ~first)
    kept = reach.kept & ((before < warper.top_p) | first)
    # Of tied tokens on both sides of the cut Hugging Face keeps those that its sort puts last.
    lowest = reach.values.masked_fill(~kept, torch.inf).amin(1)
    highest_cut = reach.masked().masked_fill(kept, -torch.inf).amax(1)
    reach.proved &= lowest > highest_cut
    return kept


def _min_p(reach: Reach, warper: Any) -> Tensor:
    most = reach.logprobs.masked_fill(~reach.kept, -torch.inf).amax(1, keepdim=True)
    return reach.likely(math.log(warper.min_p) if warper.min_p else -math.inf, most)


def _epsilon(reach: Reach, warper: Any) -> Tensor:
    return reach.likely(math.log(warper.epsilon))


def _eta(reach: Reach, warper: Any) -> Tensor:
    log_epsilon = math.log(float(warper.epsilon))
    return reach.likely((log_epsilon / 2 - reach.entropy()).clamp(max=log_epsilon))


def _typical(reach: Reach, warper: Any) -> Tensor:
    distance = (-reach.logprobs - reach.entropy()).abs().masked_fill(~reach.kept, torch.inf)
    distance, order = distance.sort(dim=1)
    kept = reach.kept.gather(1, order)
    mass = reach.logprobs.exp().gather(1, order).where(kept, 0.0).cumsum(1)
    last = (mass < warper.mass).sum(1, keepdim=True).clamp(max=kept.shape[1] - 1)
    farthest = distance.gather(1, last)
    reach.doubt(mass, warper.mass, kept)
    others = torch.ones_like(kept).scatter(1, last, False)
    reach.doubt(distance, farthest, kept & others)
    return torch.zeros_like(kept).scatter(1, order, kept & (distance <= farthest))


CUTS: dict[type, Callable[[Reach, Any], Tensor]] = {
    tf.TopKLogitsWarper: _top_k,
    tf.TopPLogitsWarper: _top_p,
    tf.MinPLogitsWarper: _min_p,
    tf.EpsilonLogitsWarper: _epsilon,
    tf.EtaLogitsWarper: _eta,
    tf.TypicalLogitsWarper: _typical,
}
