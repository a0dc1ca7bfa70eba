"""No cache: the whole text of every candidate through the reward model, batched over rows x k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.reward_model import RewardModel
from .base import RewardModelScorer

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
    state = (*RewardModelScorer.state, "prompts", "answer", "prompt_texts", "ids")

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
        self.pooled = pooled
        self.tokenizer, self.reward_tokenizer = tokenizer, reward_tokenizer
        self.prompt_tokenizer = prompt_tokenizer or tokenizer
        pad = getattr(rm.text_config, "pad_token_id", None)
        self.pad = pad if pad is not None and 0 <= pad < rm.vocab_size else 0

    @property
    def commits_unscored(self) -> bool:
        """Nothing but the ids is kept of a step; with EOS "previous", the prefix's reward too."""
        return self.eos_ids is None

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.prompts = [
            row[keep.bool()] for row, keep in zip(input_ids, attention_mask, strict=True)
        ]
        self.answer = input_ids.new_empty((input_ids.shape[0], 0))
        if self.reward_tokenizer is not None:
            self.prompt_texts = [
                self.prompt_tokenizer.decode(p, skip_special_tokens=True) for p in self.prompts
            ]
        one = torch.ones((len(self.prompts), 1), dtype=torch.bool, device=input_ids.device)
        if self.eos_ids is None:
            return torch.zeros((len(self.prompts),), dtype=torch.float32, device=input_ids.device)
        return self._encode(self.answer[:, None], one)[:, 0]

    def _score(self, ids: Tensor) -> Tensor:
        return self._score_kept(ids, torch.ones_like(ids, dtype=torch.bool))

    def _score_kept(self, ids: Tensor, keep: Tensor) -> Tensor:
        self.ids = ids
        prefix = self.answer[:, None].expand(-1, ids.shape[1], -1)
        return self._encode(torch.cat([prefix, ids[..., None]], dim=-1), keep)

    def _commit(self, slot: Tensor) -> None:
        self.answer = torch.cat([self.answer, self.ids.gather(1, slot[:, None])], dim=-1)

    def _keep_rows(self, rows: Tensor) -> None:
        self.prompts = [self.prompts[b] for b in rows.tolist()]
        self.answer = self.answer[rows]
        if self.reward_tokenizer is not None:
            self.prompt_texts = [self.prompt_texts[b] for b in rows.tolist()]

    def _encode(self, answers: Tensor, keep: Tensor) -> Tensor:
        """Rewards fp32 [B, n] of the prompts followed by answers [B, n, t]; NaN for those not in
        `keep` [B, n]."""
        out = torch.full(keep.shape, torch.nan, dtype=torch.float32, device=keep.device)
        if not keep.any():
            return out
        if self.reward_tokenizer is not None:
            ids, mask = self._tokenize(answers, keep)
        else:
            ids, mask = (x[keep] for x in self._pack(answers))
        step = max(1, _TOKENS_PER_FORWARD // ids.shape[1])
        parts = [
            self._forward(i, m) for i, m in zip(ids.split(step), mask.split(step), strict=True)
        ]
        out[keep] = torch.cat(parts)
        return out

    def _pack(self, answers: Tensor) -> tuple[Tensor, Tensor]:
        batch, n, t = answers.shape
        length = max(len(p) for p in self.prompts) + t
        ids = answers.new_full((batch, n, length), self.pad)
        mask = torch.zeros_like(ids)
        for b, prompt in enumerate(self.prompts):
            p = len(prompt)
            ids[b, :, :p] = prompt
            ids[b, :, p : p + t] = answers[b]
            mask[b, :, : p + t] = 1
        return ids, mask

    def _tokenize(self, answers: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        texts = []
        for b, prompt in enumerate(self.prompts):
            if self.prompt_tokenizer is self.tokenizer:
                # Decoded with the prompt: a token's spaces and bytes depend on those before it.
                rows = [torch.cat([prompt, a]) for a in answers[b, keep[b]]]
                texts += [self.tokenizer.decode(r, skip_special_tokens=True) for r in rows]
            else:
                texts += [
                    self.prompt_texts[b] + self.tokenizer.decode(a, skip_special_tokens=True)
                    for a in answers[b, keep[b]]
                ]
        out = self.reward_tokenizer(
            texts, padding=True, padding_side="right", return_tensors="pt", truncation=False
        )
        limit = getattr(self.rm.text_config, "max_position_embeddings", None)
        length = out["input_ids"].shape[1]
        if limit is not None and length > limit:
            raise ValueError(
                f"a text of {length} reward-model tokens was reached, reward_model takes "
                f"{limit}; pass shorter prompts or a smaller max_new_tokens"
            )
        device = answers.device
        return out["input_ids"].to(device), out["attention_mask"].to(device)

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.pooled:
            logits = self.parts.model(input_ids=ids, attention_mask=mask).logits
            return self.parts.of_logits(logits.view(len(ids), -1)).to(ids.device)
        hidden, _ = self.parts.forward_base(ids, attention_mask=mask, use_cache=False)
        last = (mask.sum(-1) - 1).to(hidden.device)
        rows = torch.arange(ids.shape[0], device=hidden.device)
        return self.parts.rewards(hidden[rows, last][:, None], self.backend)[:, 0].to(ids.device)
