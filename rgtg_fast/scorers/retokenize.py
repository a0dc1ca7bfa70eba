"""A causal reward model behind other tokens: only what retokenisation changed is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.padding import at_counts, left_padded
from ..models.reward_model import RewardModel
from ..models.siblings import SiblingForward
from .reencode import ReencodeScorer

_TOKENS_AT_ONCE = 8  # of a row, in a forward under masks


class RetokenizeScorer(ReencodeScorer):
    """As `ReencodeScorer` with two tokenizers, on a key/value cache of the reward model's tokens.

    Each candidate of each row has a row of the cache, k times the memory of one prefix. A text is
    tokenized whole, as its last tokens may change with what comes behind; the longest prefix that
    the cache has already stays there, the rest is cut off, and only what is new is run: mostly the
    last winner and the candidate. `fused` as for `TreeScorer`.
    """

    method = "retokenize"
    state = (*ReencodeScorer.state, "forward", "cached")
    forward: SiblingForward  # for one call; its row r * k + j is candidate j of row r
    cached: list[list[int]]  # the tokens of each row of the forward

    def __init__(self, rm: RewardModel, k: int, *, fused: bool, **options: Any) -> None:
        super().__init__(rm, k, **options)
        self.fused = fused

    def _encode(self, answers: list[Tensor], keep: Tensor, rows: Sequence[int]) -> Tensor:
        self._begin_rows()
        out = torch.full(keep.shape, torch.nan, dtype=torch.float32, device=keep.device)
        kept = keep.nonzero().tolist()
        if not kept:
            return out
        tokens = self._ids_of(self._texts(answers, keep, rows))
        places = [rows[i] * self.k + j for i, j in kept]
        out[keep] = self._rewards_of(tokens, places).to(out)
        return out

    def _rewards_of(self, tokens: list[list[int]], places: list[int]) -> Tensor:
        """Rewards fp32 [n] of tokens in these rows of the forward, which then has them."""
        # The last token is run again even if it is there: its hidden state is not.
        same = [
            min(common(self.cached[place], ids), len(ids) - 1)
            for place, ids in zip(places, tokens, strict=True)
        ]
        where = torch.tensor(places, dtype=torch.int64, device=self.device)
        self.forward.crop(torch.tensor(same, dtype=torch.int64, device=self.device), where)
        new = [torch.tensor(ids[n:], device="cpu") for ids, n in zip(tokens, same, strict=True)]
        counts = torch.tensor([len(ids) for ids in new], dtype=torch.int64, device=self.device)
        hidden = self.forward.extend(
            pad_sequence(new, batch_first=True).to(self.device), counts, where
        )
        for place, ids in zip(places, tokens, strict=True):
            self.cached[place] = ids
        return self.parts.rewards(at_counts(hidden, counts), self.backend)[:, 0]

    def _begin_rows(self) -> None:
        """Run the prompts of rows that the forward does not have."""
        first = len(self.__dict__.setdefault("cached", [])) // self.k
        if first == len(self.prompts):
            return
        tokens = self._ids_of(self.prompt_texts[first:])
        ids = [torch.tensor(row, device=self.device) for row in tokens]
        copies = torch.arange(len(ids), device=self.device).repeat_interleave(self.k)
        if "forward" not in self.__dict__:
            width = 1 if self.fused else _TOKENS_AT_ONCE
            self.forward = SiblingForward(self.parts, width, 0, self.fused, self.backend)
            self.forward.prefill(*left_padded(ids), copies)
        else:
            self.forward.join([ids[i] for i in copies.tolist()])
        self.cached += [list(tokens[i]) for i in copies.tolist()]

    def _ids_of(self, texts: list[str]) -> list[list[int]]:
        ids = self.reward_tokenizer(texts, truncation=False)["input_ids"]
        self._check_length(max(map(len, ids)))
        return [list(row) for row in ids]

    def _keep(self, rows: Tensor) -> None:
        if "forward" in self.__dict__:
            self._begin_rows()  # those that came since the last score
            own = (rows[:, None] * self.k + torch.arange(self.k, device=rows.device)).flatten()
            self.cached = [self.cached[place] for place in own.tolist()]
            self.forward.keep_rows(own)
        super()._keep(rows)


def common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    if one == other[: len(one)]:
        return len(one)
    return next(i for i, (a, b) in enumerate(zip(one, [*other, -1], strict=False)) if a != b)
