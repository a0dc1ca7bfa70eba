"""No cache: the whole text of every candidate through the reward model, batched over rows x k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.reward_model import RewardModel
from .base import RewardModelScorer, put

# Rows x tokens of one forward: bounds the activations, not the result.
_TOKENS_PER_FORWARD = 1 << 16


class ReencodeScorer(RewardModelScorer):
    """Encoder reward models, recurrent ones, and reward models with another tokenizer.

    Rows are re-packed with padding on the right, as encoders count positions by slot. With
    `tokenizer` and `reward_tokenizer` the row is decoded (special tokens skipped), and the text is
    encoded again; a candidate EOS then adds nothing to the text, so r(prefix + EOS) = r(prefix).
    """

    method = "reencode"
    can_skip = True
    state = (*RewardModelScorer.state, "prompts", "answers", "prompt_texts", "candidates")

    def __init__(
        self,
        rm: RewardModel,
        k: int,
        *,
        pooled: bool = False,
        tokenizer: Any = None,
        reward_tokenizer: Any = None,
        prompt_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(rm, k, **kwargs)
        self.pooled, self.keeps_text = pooled, False  # it can always be encoded anew
        self.tokenizer, self.reward_tokenizer = tokenizer, reward_tokenizer
        if reward_tokenizer is not None:
            self.vocabulary = None  # the ids are the language model's
        self.prompt_tokenizer = prompt_tokenizer or tokenizer
        pad = getattr(rm.text_config, "pad_token_id", None)
        self.pad = pad if pad is not None and 0 <= pad < rm.vocab_size else 0

    @property
    def commits_unscored(self) -> str | None:
        """Nothing but the ids is kept of a step; with EOS "previous", the prefix's reward too."""
        return "row" if self.eos_ids is None else None

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.prompts: list[Tensor] = []
        self.answers: list[Tensor] = []  # of each row, int64 [t]
        self.prompt_texts: list[str] = []
        rows = zip(input_ids, attention_mask, strict=True)
        return self._begun([row[keep.bool()] for row, keep in rows])

    def _join_alike(self, prompts: list[Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        if "prompts" not in self.__dict__:
            self.prompts, self.answers, self.prompt_texts = [], [], []
        return self._begun(prompts)

    def _begun(self, prompts: list[Tensor]) -> Tensor:
        first = len(self.prompts)
        self.prompts += prompts
        self.answers += [prompt[:0] for prompt in prompts]
        if self.reward_tokenizer is not None:
            decode = self.prompt_tokenizer.decode
            self.prompt_texts += [decode(p, skip_special_tokens=True) for p in prompts]
        return self._prefix_rewards(range(first, len(self.prompts)))

    def _prefix_rewards(self, rows: Sequence[int]) -> Tensor:
        """Rewards fp32 [n] of rows as they stand, where anything is done about EOS."""
        if self.eos_ids is None:
            return torch.zeros((len(rows),), dtype=torch.float32, device=self.device)
        one = torch.ones((len(rows), 1), dtype=torch.bool, device=self.device)
        return self._encode([self.answers[row][None] for row in rows], one, rows)[:, 0]

    def _score(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        return self._score_kept(ids, torch.ones_like(ids, dtype=torch.bool), rows)

    def _score_kept(self, ids: Tensor, keep: Tensor, rows: Tensor | None) -> Tensor:
        self.candidates = ids
        numbers = self._numbers(rows)
        answers = [
            torch.cat([self.answers[row].expand(ids.shape[1], -1), ids[i][:, None]], dim=1)
            for i, row in enumerate(numbers)
        ]
        return self._encode(answers, keep, numbers)

    def _commit(self, slot: Tensor, rows: Tensor | None, at: Tensor | None) -> None:
        ids = self.candidates if at is None else self.candidates[at]
        chosen = ids.gather(1, slot[:, None])
        for row, token in zip(self._numbers(rows), chosen, strict=True):
            self.answers[row] = torch.cat([self.answers[row], token])

    def _feed(self, ids: Tensor, counts: Tensor, rows: Tensor | None) -> Tensor:
        numbers = self._numbers(rows)
        for row, tokens, count in zip(numbers, ids, counts.tolist(), strict=True):
            self.answers[row] = torch.cat([self.answers[row], tokens[:count]])
        return self._prefix_rewards(numbers)

    def _cut(self, lengths: Tensor, rows: Tensor | None) -> None:
        for row, length in zip(self._numbers(rows), lengths.tolist(), strict=True):
            self.answers[row] = self.answers[row][: max(0, length - len(self.prompts[row]))]
            if length < len(self.prompts[row]):
                self.prompts[row] = self.prompts[row][:length]
                if self.reward_tokenizer is not None:
                    text = self.prompt_tokenizer.decode(self.prompts[row], skip_special_tokens=True)
                    self.prompt_texts[row] = text

    def _crop(self, lengths: Tensor, rows: Tensor | None) -> None:
        self._cut(lengths, rows)
        put(self.last_reward, self._prefix_rewards(self._numbers(rows)), rows)

    def _keep(self, rows: Tensor) -> None:
        kept = rows.tolist()
        for held in (self.prompts, self.answers, self.prompt_texts):
            held[:] = [held[row] for row in kept] if held else []

    def _tokens(self) -> Tensor:
        rows = zip(self.prompts, self.answers, strict=True)
        counts = [len(prompt) + len(answer) for prompt, answer in rows]
        return torch.tensor(counts, dtype=torch.int64, device=self.device)

    def _numbers(self, rows: Tensor | None) -> Sequence[int]:
        return range(len(self.prompts)) if rows is None else rows.tolist()

    def _encode(self, answers: list[Tensor], keep: Tensor, rows: Sequence[int]) -> Tensor:
        """Rewards fp32 [n, m] of the rows' prompts followed by answers, [m, t] for each row; NaN
        for those not in `keep` [n, m]."""
        out = torch.full(keep.shape, torch.nan, dtype=torch.float32, device=keep.device)
        if not keep.any():
            return out
        if self.reward_tokenizer is not None:
            ids, mask = self._tokenize(answers, keep, rows)
        else:
            ids, mask = (x[keep] for x in self._pack(answers, rows))
        step = max(1, _TOKENS_PER_FORWARD // ids.shape[1])
        parts = [
            self._forward(i, m) for i, m in zip(ids.split(step), mask.split(step), strict=True)
        ]
        out[keep] = torch.cat(parts)
        return out

    def _pack(self, answers: list[Tensor], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        lengths = [(len(self.prompts[r]), a.shape[1]) for r, a in zip(rows, answers, strict=True)]
        shape = len(rows), len(answers[0]), max(p + t for p, t in lengths)
        ids = answers[0].new_full(shape, self.pad)
        mask = torch.zeros_like(ids)
        for i, (row, (p, t)) in enumerate(zip(rows, lengths, strict=True)):
            ids[i, :, :p] = self.prompts[row]
            ids[i, :, p : p + t] = answers[i]
            mask[i, :, : p + t] = 1
        return ids, mask

    def _texts(self, answers: list[Tensor], keep: Tensor, rows: Sequence[int]) -> list[str]:
        """The texts of the answers in `keep`, prompts included."""
        texts = []
        for i, row in enumerate(rows):
            if self.prompt_tokenizer is self.tokenizer:
                # Decoded with the prompt: a token's spaces and bytes depend on those before it.
                whole = [torch.cat([self.prompts[row], a]) for a in answers[i][keep[i]]]
                texts += [self.tokenizer.decode(r, skip_special_tokens=True) for r in whole]
            else:
                texts += [
                    self.prompt_texts[row] + self.tokenizer.decode(a, skip_special_tokens=True)
                    for a in answers[i][keep[i]]
                ]
        return texts

    def _tokenize(
        self, answers: list[Tensor], keep: Tensor, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        out = self.reward_tokenizer(
            self._texts(answers, keep, rows),
            padding=True,
            padding_side="right",
            return_tensors="pt",
            truncation=False,
        )
        self._check_length(out["input_ids"].shape[1])
        device = keep.device
        return out["input_ids"].to(device), out["attention_mask"].to(device)

    def _check_length(self, length: int) -> None:
        limit = getattr(self.rm.text_config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"a text of {length} reward-model tokens was reached, reward_model takes "
                f"{limit}; pass shorter prompts or a smaller max_new_tokens"
            )

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.pooled:
            logits = self.parts.model(input_ids=ids, attention_mask=mask).logits
            return self.parts.of_logits(logits.view(len(ids), -1)).to(ids.device)
        hidden, _ = self.parts.forward_base(ids, attention_mask=mask, use_cache=False)
        last = (mask.sum(-1) - 1).to(hidden.device)
        rows = torch.arange(ids.shape[0], device=hidden.device)
        return self.parts.rewards(hidden[rows, last][:, None], self.backend)[:, 0].to(ids.device)
