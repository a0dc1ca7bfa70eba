"""Rewards of whole answers: a classifier's, or a function's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..scorers.factory import same_vocabulary
from .prompts import Prompt

Row = Mapping[str, Any]  # an answer: text, ids, end


class Classifier:
    """A one-label sequence classifier as a judge of whole answers, through its public forward.

    Where its vocabulary is that of the language model, it sees the answer's own token ids and EOS
    behind a finished one. Otherwise it gets the text (a conversation through its own chat
    template), with its own EOS behind a finished plain answer. A public forward reads the last
    token that is no padding: EOS changes nothing for a model whose padding is EOS.
    """

    def __init__(self, model: Any, tokenizer: Any, lm_tokenizer: Any, batch_size: int) -> None:
        self.model, self.tokenizer, self.lm_tokenizer = model, tokenizer, lm_tokenizer
        self.shared = same_vocabulary(lm_tokenizer, tokenizer)
        config = model.config.get_text_config()
        self.limit = getattr(config, "max_position_embeddings", None)
        # Without a padding token the public forward takes single rows only.
        pad = getattr(model.config, "pad_token_id", None)
        self.pad = tokenizer.pad_token_id if pad is None else pad
        self.batch_size = 1 if pad is None else batch_size

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], answers: Sequence[Row]) -> list[float]:
        """Rewards of answers (`text`, `ids`, `end`) to the prompts."""
        rows = [self._ids(p, a) for p, a in zip(prompts, answers, strict=True)]
        rewards = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for at in range(0, len(order), self.batch_size):
            chosen = order[at : at + self.batch_size]
            for i, reward in zip(chosen, self._forward([rows[i] for i in chosen]), strict=True):
                rewards[i] = reward
        _check_finite("the classifier", prompts, rewards)
        return rewards

    def _ids(self, prompt: Prompt, answer: Row) -> list[int]:
        tok, text, end = self.tokenizer, answer["text"], answer["end"]
        own_chat = not isinstance(prompt.source, str) and getattr(tok, "chat_template", None)
        if self.shared and own_chat in (None, False, self.lm_tokenizer.chat_template):
            row = prompt.ids + answer["ids"] + ([] if end is None else [end])
        elif own_chat:
            messages = [*prompt.source, {"role": "assistant", "content": text}]
            rendered = tok.apply_chat_template(messages, tokenize=False)
            row = tok(rendered, add_special_tokens=False)["input_ids"]
        else:
            row = tok(prompt.text + text)["input_ids"]
            if end is not None and tok.eos_token_id is not None and row[-1:] != [tok.eos_token_id]:
                row = [*row, tok.eos_token_id]
        if isinstance(self.limit, int) and 0 < self.limit < len(row):
            raise ValueError(
                f"an answer and its prompt have {len(row)} tokens for the judge, which has "
                f"{self.limit} positions; pass shorter prompts, a smaller max_new_tokens or "
                f"another judge (prompt: {prompt.text[:60]!r})"
            )
        return row

    def _forward(self, rows: list[list[int]]) -> list[float]:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = self.model.device
        out = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        return out.logits.float().reshape(-1).tolist()


class FunctionJudge:
    """A function (prompt, answer, finished) -> reward; the prompt is as the file has it."""

    def __init__(self, function: Callable[[Any, str, bool], float], name: str) -> None:
        self.function, self.name = function, name

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Row]) -> list[float]:
        """Rewards of answers (`text`, `ids`, `end`) to the prompts."""
        rewards = []
        for prompt, answer in zip(prompts, answers, strict=True):
            finished = answer["end"] is not None
            value = self.function(prompt.source, answer["text"], finished)
            try:
                rewards.append(float(value))
            except (TypeError, ValueError):
                raise ValueError(
                    f"judge: {self.name} gave {value!r}; it must give a finite number"
                ) from None
        _check_finite(self.name, prompts, rewards)
        return rewards


def _check_finite(judge: str, prompts: Sequence[Prompt], rewards: Sequence[float]) -> None:
    for prompt, reward in zip(prompts, rewards, strict=True):
        if not math.isfinite(reward):
            raise ValueError(
                f"judge: {judge} gave {reward} for an answer to the prompt {prompt.source!r}; it "
                "must give a finite number"
            )
