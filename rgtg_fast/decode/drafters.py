"""Whoever guesses the language model's next tokens, for it to look at several in one forward.

A guess is right where the language model, with the noise of that position and without rewards,
would have chosen the token. So drafters draw with the same noise.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache

from ..scorers.causal import language_model
from .logits import CachedLogits
from .options import integer
from .ratio_policy import RatioPolicy
from .rows import Rows

_texts = itertools.count()


@runtime_checkable
class Drafter(Protocol):
    """A wrong guess costs time, and changes nothing."""

    def begin(self, prompts: Tensor, mask: Tensor) -> None:
        """The prompts int64 [B, P] of a call and their mask [B, P]."""

    def draft(
        self, rows: Rows, ahead: Tensor, counts: Tensor, n: int, policy: RatioPolicy
    ) -> Tensor:
        """At most `n` guesses for what follows in each row with the first `counts` [B] of the
        tokens `ahead` int64 [B, m] behind it, int64 [B, g]; -1 from where a row has none."""

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with rows `rows` int64 [n] alone."""

    def finish(self) -> None:
        """The call has ended."""


class SuffixDrafter:
    """Guesses what followed the last tokens before: in the prompts and answers of all the calls
    that one object is given to, as `assistant_model=`, in any threads.

    It knows what came after suffixes of up to `order` tokens (csrc/draft_index.h), at most 262,144
    of them, and keeps no text.
    """

    def __init__(self, order: int = 4) -> None:
        from .. import _C

        self.index = _C.DraftIndex(order=integer("order", order, 1, 64))
        self.texts: list[int] = []  # the index's numbers of the rows
        self.known: list[int] = []  # tokens of each answer that it has

    def for_call(self) -> SuffixDrafter:
        """A drafter for the rows of one call, on the same index."""
        own = copy.copy(self)
        own.texts, own.known = [], []
        return own

    def begin(self, prompts: Tensor, mask: Tensor) -> None:
        self.texts = [next(_texts) for _ in prompts]
        self.known = [0] * len(prompts)
        for text, ids, real in zip(self.texts, prompts.cpu(), mask.cpu(), strict=True):
            self.index.extend(text, ids[real.bool()].tolist())

    def draft(
        self, rows: Rows, ahead: Tensor, counts: Tensor, n: int, policy: RatioPolicy
    ) -> Tensor:
        positions, seeds = rows.position.tolist(), policy.seeds.tolist()
        behind = [row[:count] for row, count in zip(ahead.tolist(), counts.tolist(), strict=True)]
        answers = rows.ids[:, rows.prompt :].cpu()
        guesses = torch.full((len(positions), n), -1, dtype=torch.int64, device="cpu")
        for i, (text, position) in enumerate(zip(self.texts, positions, strict=True)):
            self.index.extend(text, answers[i, self.known[i] : position].tolist())
            self.known[i] = position
            at = position + len(behind[i])
            found = self.index.draft(text, n, at, seeds[i], policy.do_sample, behind[i])
            guesses[i, : len(found)] = torch.tensor(found, dtype=torch.int64, device="cpu")
        return guesses.to(rows.ids.device)

    def keep_rows(self, rows: Tensor) -> None:
        kept = rows.tolist()
        for i in set(range(len(self.texts))) - set(kept):
            self.index.leave(self.texts[i])
        self.texts = [self.texts[i] for i in kept]
        self.known = [self.known[i] for i in kept]

    def finish(self) -> None:
        for text in self.texts:
            self.index.leave(text)
        self.texts, self.known = [], []


class AssistantDrafter:
    """Guesses by a smaller causal language model with the same tokens.

    `source` is a new `CachedLogits` of it for the call, and `vocab_size` the language model's. Its
    cache holds the text as far as its own guesses were right.
    """

    def __init__(self, source: CachedLogits, vocab_size: int) -> None:
        self.source, self.vocab_size = source, vocab_size
        self.fed: Tensor  # int64 [B, n], the answers that its cache holds, of `counts` [B] tokens
        self.counts: Tensor

    def begin(self, prompts: Tensor, mask: Tensor) -> None:
        self.source.prefill(self._own(prompts))
        self.fed = prompts[:, :0].long()
        self.counts = torch.zeros_like(prompts[:, 0], dtype=torch.int64)

    def draft(
        self, rows: Rows, ahead: Tensor, counts: Tensor, n: int, policy: RatioPolicy
    ) -> Tensor:
        position = rows.position + counts
        text = self._texts(rows, ahead, int(position.max()))
        agree = self._agreeing(text, position)
        self.source.crop(agree + 1)
        missing = position - agree  # at least the last token, whose logits are wanted
        slots = torch.arange(int(missing.max()), device=text.device)
        at = (agree[:, None] + slots).clamp(max=text.shape[1] - 1)
        logits = self.source.extend(self._own(text.gather(1, at)), missing)
        last = (missing - 1)[:, None, None].expand(-1, 1, logits.shape[2])
        logits = self._shared(logits.gather(1, last)[:, 0])
        guesses: list[Tensor] = []
        while True:
            logprobs, ids = policy.candidates(logits)
            none = torch.zeros_like(logprobs)
            slot, _ = policy.select(logprobs, none, ids, position + len(guesses))
            guesses.append(ids.gather(1, slot.clamp(min=0)[:, None]))
            if len(guesses) == n:
                break
            logits = self._shared(self.source.feed(self._own(guesses[-1])))
        drafted = torch.cat(guesses, dim=1)
        self._fed(text, position, drafted[:, :-1])
        return drafted

    @staticmethod
    def _texts(rows: Rows, ahead: Tensor, length: int) -> Tensor:
        """The answers with `ahead` behind them, [B, length]; behind a row's end, anything."""
        answers = rows.ids[:, rows.prompt :]
        text = answers.new_zeros((len(answers), max(length, answers.shape[1]) + ahead.shape[1]))
        text[:, : answers.shape[1]] = answers
        at = rows.position[:, None] + torch.arange(ahead.shape[1], device=ahead.device)
        return text.scatter_(1, at, ahead)[:, :length]

    def _own(self, ids: Tensor) -> Tensor:
        """Ids that the assistant has a row for. (Models of one tokenizer pad their vocabularies to
        different sizes.)"""
        return ids.clamp(max=self.source.view.vocab_size - 1)

    def _shared(self, logits: Tensor) -> Tensor:
        """Logits of the tokens that the language model has too."""
        return logits[:, : self.vocab_size]

    def _agreeing(self, text: Tensor, position: Tensor) -> Tensor:
        """How many tokens [B] of the answers are in the cache, but for the last."""
        width = min(text.shape[1], self.fed.shape[1])
        slots = torch.arange(width, device=text.device)
        most = torch.minimum(self.counts, position - 1)[:, None]
        same = (self.fed[:, :width] == text[:, :width]) & (slots < most)
        return same.long().cumprod(1).sum(1)

    def _fed(self, text: Tensor, position: Tensor, drafted: Tensor) -> None:
        self.counts = position + drafted.shape[1]
        self.fed = torch.cat([text, text.new_zeros(drafted.shape)], dim=1)
        at = position[:, None] + torch.arange(drafted.shape[1], device=text.device)
        self.fed.scatter_(1, at, drafted)

    def keep_rows(self, rows: Tensor) -> None:
        self.source.keep_rows(rows)
        self.fed, self.counts = self.fed[rows], self.counts[rows]

    def finish(self) -> None:
        del self.source


def drafter_of(
    assistant: Any, mask: Tensor, max_length: int, vocab_size: int, backend: Any
) -> Drafter | None:
    """The drafter of a call that is given `assistant`, a causal LM or a `Drafter`, for prompts with
    the `mask` [B, P]; `ValueError` where it is neither, or cannot be run."""
    if isinstance(assistant, SuffixDrafter):
        return assistant.for_call()
    if assistant is None or isinstance(assistant, Drafter):
        return assistant
    name = type(assistant).__name__
    if not hasattr(assistant, "get_output_embeddings"):
        raise ValueError(
            f"assistant_model is {name}; pass a causal LM (AutoModelForCausalLM), or an object "
            "with the methods of decode.drafters.Drafter"
        )
    found = language_model(assistant, max_length, backend)
    if found is None or found[1] != "fused":
        raise ValueError(
            f"assistant_model {name} does not run on the cache of this package (hooks, own "
            "attention, or no kernel for its device); leave it out, or pass another"
        )
    source = CachedLogits(found[0], mask, max_length, backend, DynamicCache())
    return AssistantDrafter(source, vocab_size)
