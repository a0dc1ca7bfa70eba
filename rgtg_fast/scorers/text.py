"""Rewards by a function of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .rows import ScorerRows


class TextScorer(ScorerRows):
    """Rewards by a function `list[str] -> list[float]` of the texts prompt + answer + candidate.

    All candidates of a step go to the function in one call, each text once. Texts are decoded
    without special tokens, so that EOS adds nothing: r(prefix + EOS) = r(prefix). `tokenizer` is
    the language model's; the prompts may be in another's ids, `prompt_tokenizer`'s.

    Raises `ValueError` for another number of scores than texts, and scores that are no numbers.
    """

    method = "text"
    can_skip = True
    commits_unscored = "row"  # nothing but the ids is kept of a step

    def __init__(
        self,
        function: Callable[[list[str]], Sequence[float]],
        tokenizer: Any,
        prompt_tokenizer: Any = None,
    ) -> None:
        self.function, self.tokenizer = function, tokenizer
        self.prompt_tokenizer = prompt_tokenizer or tokenizer
        self.begin(0)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def begin(self, rows: int) -> None:
        super().begin(rows)
        self.texts: list[tuple[list[int], list[int]]] = []  # the prompt and the answer of each row
        self.ids = torch.zeros((0, 0), dtype=torch.int64, device=self.device)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Prompts int64 [B, P] and their mask [B, P], padding on the left."""
        self.begin(len(input_ids))
        rows = zip(input_ids.cpu(), attention_mask.cpu(), strict=True)
        self.texts = [(ids[mask.bool()].tolist(), []) for ids, mask in rows]

    def score(
        self, ids: Tensor, keep: Tensor | None = None, handles: Sequence[int] | None = None
    ) -> Tensor:
        """Rewards fp32 [n, k] of the candidates `ids` int64 [n, k] of each row; NaN for those not
        in `keep` bool [n, k]."""
        names, rows = self.rows_of(handles)
        self.check_candidates(ids, len(names))
        numbers = range(len(self.texts)) if rows is None else rows.tolist()
        self.scored = list(names)
        self.ids = ids.to(self.device)
        wanted = torch.ones_like(self.ids, dtype=torch.bool) if keep is None else keep.cpu()
        texts = [
            self._text(row, token)
            for i, row in enumerate(numbers)
            for token in self.ids[i][wanted[i]].tolist()
        ]
        rewards = torch.full(ids.shape, torch.nan, dtype=torch.float32, device="cpu")
        if texts:
            once = list(dict.fromkeys(texts))
            scores = dict(zip(once, scores_of(self.function, once), strict=True))
            of_texts = [scores[text] for text in texts]
            rewards[wanted] = torch.tensor(of_texts, dtype=torch.float32, device="cpu")
        return rewards.to(ids.device)

    def commit(self, slot: Tensor, handles: Sequence[int] | None = None) -> None:
        """Append candidate `slot` int64 [n] of the last scored ids to the rows."""
        slot = slot.to(self.device)
        rows, at = self.scored_rows(handles, slot)
        ids = self.ids if at is None else self.ids[at]
        chosen = ids.gather(1, slot[:, None])[:, 0].tolist()
        for row, token in zip(
            range(len(self.texts)) if rows is None else rows.tolist(), chosen, strict=True
        ):
            self.texts[row][1].append(token)

    def finish(self) -> None:
        """Let go of the texts."""
        self.begin(0)

    def _text(self, row: int, token: int) -> str:
        prompt, answer = self.texts[row]
        if self.prompt_tokenizer is self.tokenizer:
            # Decoded with the prompt: a token's spaces and bytes depend on those before it.
            return self.tokenizer.decode([*prompt, *answer, token], skip_special_tokens=True)
        begin = self.prompt_tokenizer.decode(prompt, skip_special_tokens=True)
        return begin + self.tokenizer.decode([*answer, token], skip_special_tokens=True)

    def _join(self, prompts: list[Tensor]) -> None:
        self.texts += [(prompt.tolist(), []) for prompt in prompts]

    def _extend(self, ids: Tensor, counts: Tensor, rows: Tensor | None) -> None:
        numbers = range(len(self.texts)) if rows is None else rows.tolist()
        for row, tokens, count in zip(numbers, ids.tolist(), counts.tolist(), strict=True):
            self.texts[row][1].extend(tokens[:count])

    def _crop(self, lengths: Tensor, rows: Tensor | None) -> None:
        numbers = range(len(self.texts)) if rows is None else rows.tolist()
        for row, length in zip(numbers, lengths.tolist(), strict=True):
            prompt, answer = self.texts[row]
            self.texts[row] = prompt[:length], answer[: max(0, length - len(prompt))]

    def _tokens(self) -> Tensor:
        lengths = [len(prompt) + len(answer) for prompt, answer in self.texts]
        return torch.tensor(lengths, dtype=torch.int64, device=self.device)

    def _keep_rows(self, rows: Tensor) -> None:
        # Answers grow in place: a copy's must be a list of its own.
        kept = [self.texts[row] for row in rows.tolist()]
        self.texts = [(prompt, list(answer)) for prompt, answer in kept]


def scores_of(function: Callable[[list[str]], Sequence[float]], texts: list[str]) -> list[float]:
    """What the function says of texts, as one float for each."""
    given: Any = function(texts)
    name = getattr(function, "__name__", type(function).__name__)
    try:
        scores = [float(score) for score in given]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"reward_model {name} gave {_shown(given)} for {len(texts)} texts; it must give a list "
            "of floats, one for each"
        ) from None
    if len(scores) != len(texts):
        raise ValueError(
            f"reward_model {name} gave {len(scores)} scores for {len(texts)} texts; it must give "
            "one for each, in their order"
        )
    return scores


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
