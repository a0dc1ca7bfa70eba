"""The kinds of reward, one line each: the table that loading, training and the docs are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..models.on_base import RewardHead
from .attention_credit import AttentionCreditScorer
from .autoregressive import AutoregressiveScorer
from .rewrite import RewriteScorer
from .vocab_head import VocabRewardScorer

HEAD_FILE = "reward_head.safetensors"


class Kind(NamedTuple):
    """A kind of reward.

    `make` gives what `rgtg_fast.generate` takes as `reward_model`, from what its folder holds and
    keyword options of its own. `holds` says what that is: "SequenceClassification" (one label) or
    "CausalLM", a model that the transformers class AutoModelFor... of that name loads, or "head",
    the weights of a head on the language model's hidden states, with which `make` gets the language
    model first. `loss_types` are those of `rgtg_fast.training` that train one, `per_token` says
    that its rewards are of single tokens, so that an answer's is their sum and not the last.
    """

    make: Callable[..., Any]
    holds: str
    loss_types: tuple[str, ...]
    per_token: bool = False

    @property
    def is_model(self) -> bool:
        """Whether the model itself is the guide: `generate` makes its scorer, by tokens or text."""
        return self.make is reward_model

    @property
    def usage(self) -> str:
        """The Python expression that makes one of `rm`, or of `lm` and `weight`."""
        if self.is_model:
            return "rm"
        if self.holds == "head":
            return f"rgtg_fast.{self.make.__name__}(lm, weight)"
        return f"rgtg_fast.scorers.{self.make.__name__}(rm)"

    def check_options(self, options: dict[str, Any]) -> None:
        """Raises `ValueError` for options that `make` does not have, before anything is loaded."""
        loaded = [None] * (2 if self.holds == "head" else 1)
        try:
            inspect.signature(self.make).bind(*loaded, **options)
        except TypeError as error:
            names = list(inspect.signature(self.make).parameters)[len(loaded) :]
            raise ValueError(
                f"{error}; {self.make.__name__} takes {', '.join(names) or 'no options'}"
            ) from None


def reward_model(rm: Any) -> Any:
    """A reward model with one label, scored as the probe of `make_scorer` finds right."""
    return rm


KINDS: dict[str, Kind] = {
    "classifier": Kind(reward_model, "SequenceClassification", ("prefix", "full", "rad")),
    "head": Kind(RewardHead, "head", ("prefix", "full")),
    "vocab": Kind(VocabRewardScorer, "CausalLM", ("farma", "soft_q")),
    "autoregressive": Kind(
        AutoregressiveScorer, "CausalLM", ("genarm", "genarm_prefix"), per_token=True
    ),
    "rewriting": Kind(RewriteScorer, "CausalLM", ("seq2seq",), per_token=True),
    "attention_credit": Kind(AttentionCreditScorer, "SequenceClassification", ("full",)),
}


def load_guide(
    name: str, folder: str, load: Callable[[str, str], Any], lm: Any, **options: Any
) -> Any:
    """The guide of kind `name` in `folder`; `load(holds, folder)` loads a model."""
    kind = KINDS[name]
    if kind.holds != "head":
        return kind.make(load(kind.holds, folder), **options)
    from safetensors.torch import load_file

    weight = load_file(Path(folder) / HEAD_FILE)["weight"]
    return kind.make(lm, weight.to(lm.device), **options)


def kinds_trained_by(loss_type: str, frozen: bool = False) -> list[Kind]:
    """What a model trained with `loss_type` can guide as, the plainest first; `frozen`: a head."""
    return [
        kind
        for kind in KINDS.values()
        if loss_type in kind.loss_types and (kind.holds == "head") == frozen
    ]


def table() -> str:
    """The kinds as a Markdown table."""
    rows = ["| kind | guide | holds | loss_type |", "| --- | --- | --- | --- |"]
    rows += [
        f"| {name} | `{kind.usage}` | {kind.holds} | {', '.join(kind.loss_types) or '-'} |"
        for name, kind in KINDS.items()
    ]
    return "\n".join(rows)
