"""Sequence-to-sequence rewards: log-probs of a language model that rewrites a draft."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.padding import left_padded
from .autoregressive import AutoregressiveScorer
from .lazy import LazyScorer
from .rewards import Reward, WeightedRewards
from .rewards import leaves_of as rewards_of
from .weighted import leaves_of

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class RewriteScorer(AutoregressiveScorer):
    """Rewards log p_r(v | x, draft, separator, y_<t) of a model p_r that rewrites drafts into
    better answers (arXiv 2409.00162): of every token, by one forward of one token a step.

    The paper rewards the tokens of a finished answer, for reinforcement learning, by p_r's
    log-probs behind that answer as the draft; here p_r has the draft, and guides the answer.

    Args:
        model: a causal LM as `PrefixRewardTrainer(loss_type="seq2seq")` trains it.
        drafts: a draft for each prompt of the call (of `generate_many`, in the prompts' order):
            token ids (a list, or int64 [n]), or a text, which `tokenizer` encodes. EOS at its end
            is left out. None: the greedy answer of the language model that decodes, without
            processors, in as many tokens as the answer may have.
        separator: the token between draft and answer, its id or, with `tokenizer`, its text; None
            is what the model's configuration says that training took, or else its EOS.
        tokenizer: of texts.

    Raises:
        ValueError: for drafts that are none, or have ids that the model has not; a separator that
            is no token; and in a call, another number of drafts than of prompts.

    Example: `generate(lm, **inputs, reward_model=RewriteScorer(rm), k=None, top_k=0, beta=1.0)`.
    """

    method = "rewrite"
    language_model: Any = None  # a weak reference to it
    ends: frozenset[int] = frozenset()  # the ids that end a draft of its
    expected: Sequence[tuple[int, int]] = ()  # of rows to come: prompt, tokens of an answer
    beside: Tensor  # int64 [B], tokens of the rows that are of no prompt and no answer
    begun: Tensor  # int64 [B], tokens of the rows before the answer

    def __init__(
        self,
        model: nn.Module,
        drafts: Sequence[Any] | None = None,
        separator: int | str | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(model)
        configs = getattr(model, "generation_config", None), self.rm.text_config
        found = [getattr(config, "eos_token_id", None) for config in configs]
        eos = found[1] if found[0] is None else found[0]
        self.eos = [eos] if isinstance(eos, int) else list(eos or ())
        self.separator = self._separator(separator, tokenizer)
        self.drafts = None if drafts is None else self._encoded(drafts, tokenizer)

    def longest_draft(self, answer: int) -> int:
        """How many tokens a draft may have where an answer may have `answer`."""
        return answer if self.drafts is None else max(map(len, self.drafts), default=0)

    def reserve(self, tokens: int) -> None:
        """Make room for rows of up to `tokens`, prompt and answer, and the drafts beside them."""
        super().reserve(tokens + self.longest_draft(tokens) + 1)

    def draft_by(self, language_model: Any, eos_ids: Tensor | None) -> None:
        """The language model makes the drafts that are not given; `eos_ids` end one."""
        # Weakly: a call that fails before it begins must not leave the model here.
        self.language_model = weakref.ref(language_model)
        self.ends = frozenset(self.eos if eos_ids is None else eos_ids.tolist())

    def check_drafts(self, prompts: int) -> None:
        """`ValueError` where drafts are given for another number of prompts."""
        if self.drafts is not None and len(self.drafts) != prompts:
            raise ValueError(
                f"drafts has {len(self.drafts)} drafts for {prompts} prompts; pass one for each"
            )

    def expect(self, prompts: Sequence[int], steps: Sequence[int]) -> None:
        """The rows that come in next are of these prompts, of those that drafts are given for, and
        their answers have up to `steps` tokens."""
        self.expected = list(zip(prompts, steps, strict=True))

    def at(self, prompts: Sequence[int]) -> RewriteScorer:
        """The same scorer for a call of these prompts alone."""
        made = copy.copy(self)
        if self.drafts is not None:
            made.drafts = [self.draft_of(prompt) for prompt in prompts]
        return made

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        pairs = zip(input_ids.to(self.device), attention_mask.to(self.device), strict=True)
        prompts = [ids[mask.bool()] for ids, mask in pairs]
        self.begin(0)
        rows = self._with_drafts(prompts)
        super().prefill(*left_padded(rows))
        self._set(torch.zeros(0, dtype=torch.int64, device=self.device), prompts, rows)

    def finish(self) -> None:
        for name in ("language_model", "ends", "expected", "beside", "begun"):
            self.__dict__.pop(name, None)
        super().finish()

    def _join(self, prompts: list[Tensor]) -> None:
        rows = self._with_drafts(prompts)
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        before = self.__dict__.get("begun", none)
        super()._join(rows)
        self._set(before, prompts, rows)

    def _crop(self, lengths: Tensor, rows: Tensor | None) -> None:
        own = slice(None) if rows is None else rows
        lengths = lengths + self.beside[own]
        if lengths.device.type == "cpu" and (lengths < self.begun[own]).any():
            least = (self.begun - self.beside)[own].tolist()
            raise ValueError(
                f"lengths cut rows within their prompts, of {least} tokens, behind which the "
                "drafts stand; pass at least as many"
            )
        super()._crop(lengths, rows)

    def _keep_rows(self, rows: Tensor) -> None:
        super()._keep_rows(rows)
        self.beside, self.begun = self.beside[rows], self.begun[rows]

    def _tokens(self) -> Tensor:
        return super()._tokens() - self.beside

    def _set(self, before: Tensor, prompts: list[Tensor], rows: list[Tensor]) -> None:
        """Rows have come in behind those of which `before` [B] is known."""
        begun = torch.tensor([len(row) for row in rows], device=self.device)
        beside = begun - torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.begun = torch.cat([before, begun])
        self.beside = torch.cat([self.beside, beside]) if len(before) else beside

    def _with_drafts(self, prompts: list[Tensor]) -> list[Tensor]:
        """Prompts int64 [P] each with draft and separator behind them."""
        expected = self.expected
        if not expected:
            expected = [(self._given + i, 0) for i in range(len(prompts))]
        if self.drafts is None:
            drafts = self._of_language_model(prompts, [steps for _, steps in expected])
        else:
            drafts = [self.draft_of(prompt) for prompt, _ in expected]
        between = prompts[0].new_tensor([self.separator])
        pairs = zip(prompts, drafts, strict=True)
        return [torch.cat([prompt, draft.to(prompt), between]) for prompt, draft in pairs]

    def draft_of(self, prompt: int) -> Tensor:
        """The draft given for a prompt, by its number; `ValueError` where there is none."""
        assert self.drafts is not None
        if prompt >= len(self.drafts):
            raise ValueError(
                f"drafts has {len(self.drafts)} drafts, and this is prompt {prompt}, counted from "
                "0; pass one for each prompt"
            )
        return self.drafts[prompt]

    def _of_language_model(self, prompts: list[Tensor], steps: list[int]) -> list[Tensor]:
        model = self.language_model and self.language_model()
        if model is None:
            raise ValueError(
                "drafts is None, and no language model decodes that could make them; pass drafts=, "
                "or give the scorer to rgtg_fast.generate"
            )
        keys = [(tuple(prompt.tolist()), n) for prompt, n in zip(prompts, steps, strict=True)]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}  # one draft for one prompt
        own = [prompts[i] for i in first.values()], [steps[i] for i in first.values()]
        answers = greedy_answers(model, *own, self.ends, self.vocabulary or 0)
        drafts = dict(zip(first, answers, strict=True))
        return [drafts[key] for key in keys]

    def _separator(self, separator: Any, tokenizer: Any) -> int:
        if separator is None:
            separator = getattr(self.model.config, "draft_separator_id", None)
        if separator is None:
            if not self.eos:
                raise ValueError(
                    "separator is to be the model's EOS, and its configuration has none; pass "
                    "separator="
                )
            return self.eos[0]
        found = separator
        if isinstance(separator, str):
            found = None if tokenizer is None else tokenizer.get_vocab().get(separator)
        whole = isinstance(found, int) and not isinstance(found, bool)
        if not whole or not 0 <= found < (self.vocabulary or 0):
            what = "without tokenizer=" if isinstance(separator, str) and not tokenizer else ""
            raise ValueError(
                f"separator={separator!r} is no token of {type(self.model).__name__} {what}; pass "
                f"an id below {self.vocabulary}, the text of one token with tokenizer=, or None"
            )
        return found

    def _encoded(self, drafts: Any, tokenizer: Any) -> list[Tensor]:
        if isinstance(drafts, (str, Tensor)) or not isinstance(drafts, Sequence):
            raise ValueError(
                f"drafts is {type(drafts).__name__}; pass a list, with token ids or a text for "
                "each prompt"
            )
        return [self._one(i, draft, tokenizer) for i, draft in enumerate(drafts)]

    def _one(self, i: int, draft: Any, tokenizer: Any) -> Tensor:
        if isinstance(draft, str):
            if tokenizer is None:
                raise ValueError(f"drafts[{i}] is a text; pass tokenizer=, or token ids")
            draft = tokenizer(draft, add_special_tokens=False)["input_ids"]
        try:
            ids = draft if isinstance(draft, Tensor) else torch.tensor(list(draft), device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            ids = torch.tensor(0.5, device="cpu")
        ids = ids if ids.numel() else ids.long()
        if ids.dim() != 1 or ids.dtype not in _INTEGERS:
            raise ValueError(
                f"drafts[{i}]={draft!r:.60} is no draft; pass token ids (a list, or int64 [n]) or "
                "a text"
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < (self.vocabulary or 0):
            raise ValueError(
                f"drafts[{i}] has ids from {int(ids.min())} to {int(ids.max())}, and the model has "
                f"{self.vocabulary} tokens; use its tokenizer"
            )
        return ids[:-1].long() if len(ids) and int(ids[-1]) in self.eos else ids.long()


@torch.no_grad()
def greedy_answers(
    model: Any, prompts: list[Tensor], steps: list[int], ends: frozenset[int], vocabulary: int
) -> list[Tensor]:
    """The answers int64 [n <= steps] of a causal language model to prompts int64 [P] each, always
    its most likely token, of the first `vocabulary`; without the one of `ends` that ends it."""
    decoder = AutoregressiveScorer(model)
    decoder.reserve(max(map(len, prompts)) + max(steps))
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    try:
        decoder.prefill(*left_padded([prompt.to(decoder.device) for prompt in prompts]))
        while True:
            best = decoder.score_all()[:, :vocabulary].argmax(-1)
            going = []
            for place, (row, token) in enumerate(zip(rows, best.tolist(), strict=True)):
                if token not in ends and len(answers[row]) < steps[row]:
                    answers[row].append(token)
                    going.append(place)
            if not going:
                break
            if len(going) < len(rows):
                kept = torch.tensor(going, device=best.device)
                decoder.keep_rows(kept)
                best, rows = best[kept], [rows[place] for place in going]
            decoder.score(best[:, None])
            decoder.commit(torch.zeros_like(best))
    finally:
        decoder.finish()
    return [torch.tensor(answer, dtype=torch.int64, device="cpu") for answer in answers]


def rewriters_of(scorer: Any) -> list[RewriteScorer]:
    """Those that a scorer is made of."""
    inner = scorer.scorer if isinstance(scorer, LazyScorer) else scorer
    return [leaf for leaf in leaves_of(inner) if isinstance(leaf, RewriteScorer)]


def makes_drafts(reward: Any) -> bool:
    """Whether the language model makes drafts for a part of the reward."""
    parts = [leaf.model for leaf in rewards_of(reward)]
    return any(isinstance(part, RewriteScorer) and part.drafts is None for part in parts)


def check_draft(reward: Any, prompt: int) -> None:
    """`ValueError` where a part of the reward was given drafts, and none for this prompt."""
    for part in rewards_of(reward):
        if isinstance(part.model, RewriteScorer) and part.model.drafts is not None:
            part.model.draft_of(prompt)


def drafts_at(reward: Any, prompts: Sequence[int]) -> Any:
    """The reward for a call of these prompts alone, of those that drafts are given for."""
    if isinstance(reward, WeightedRewards):
        parts = [drafts_at(part, prompts) for part in reward.parts]
        return reward.of(parts, reward.combination)
    if isinstance(reward, Reward):
        return replace(reward, model=drafts_at(reward.model, prompts))
    return reward.at(prompts) if isinstance(reward, RewriteScorer) else reward
