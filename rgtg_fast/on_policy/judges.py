"""Who scores whole answers: a classifier, a function of texts, or a server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..evaluation import models
from ..evaluation.prompts import Prompt
from ..evaluation.scoring import Classifier, Row
from ..evaluation.settings import is_function, load_function
from ..scorers.text import scores_of
from .settings import endpoint_of, is_url


class TextJudge:
    """A function `list[str] -> list[float]` of the texts prompt + answer.

    The texts are without special tokens, as the scorer of text rewards has them: an answer that was
    cut at its length limit and one that ended there are the same.
    """

    def __init__(self, function: Callable[[list[str]], Sequence[float]], tokenizer: Any) -> None:
        self.function, self.tokenizer = function, tokenizer

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Row]) -> list[float]:
        """Rewards of answers (`ids`) to the prompts; `ValueError` for one that is not finite."""
        # Decoded with the prompt: a token's spaces and bytes depend on those before it.
        whole = [p.ids + a["ids"] for p, a in zip(prompts, answers, strict=True)]
        texts = self.tokenizer.batch_decode(whole, skip_special_tokens=True)
        scores = scores_of(self.function, texts)
        for prompt, score in zip(prompts, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"on_policy: judge gave {score} for an answer to the prompt "
                    f"{prompt.text[:60]!r}; it must give finite numbers"
                )
        return scores


def make_judge(judge: Any, tokenizer: Any, batch_size: int, dtype: str, device: str) -> Any:
    """What scores answers by `score(prompts, answers)`, loaded; `tokenizer` is the language
    model's."""
    if callable(judge):
        return TextJudge(judge, tokenizer)
    if isinstance(judge, Mapping) or is_url(judge):
        return TextJudge(endpoint_of(judge), tokenizer)
    if is_function(judge):
        return TextJudge(load_function("on_policy: judge", judge), tokenizer)
    model = models.load_model("SequenceClassification", judge, dtype, device)
    return Classifier(model, models.load_tokenizer(judge), tokenizer, batch_size)
