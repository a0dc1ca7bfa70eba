"""`PrefixRewardConfig`: the options of reward-model training beside those of the Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .data import EOS_RULES, INVALID, LEAKS, OVERLONG, one_of
from .objectives import OBJECTIVES

CHOICES = {
    "weights": ("uniform", "linear"),
    "extension": ("hold", "eos"),
    "overlong": OVERLONG,
    "invalid": INVALID,
    "leaks": LEAKS,
    "eos": EOS_RULES,
}
# The loss types that compare the two answers of a pair.
PAIRS = tuple(
    name
    for name, made in OBJECTIVES.items()
    if made.data == "pairs" and not made.rewrites and not made.policy
)
# What has no effect with an option's value, and with which loss types it has one.
USED_BY = {
    "weights": ("uniform", ("prefix", "genarm_prefix", "rad")),
    "extension": ("hold", ("prefix",)),
    "margin": (0.0, PAIRS),
    "label_smoothing": (0.0, PAIRS),
    "consistency": (None, PAIRS),
    "centering": (0.0, PAIRS),
    "prefix_share": (1.0, ("genarm_prefix",)),
    "separator": (None, ("seq2seq",)),
    "value_beta": (1.0, ("soft_q",)),
    "td_lambda": (0.0, ("soft_q",)),
    "backspace": ("<backspace>", ("sequencematch",)),
    "slip_rate": (0.1, ("sequencematch",)),
    "gamma": (0.99, ("sequencematch",)),
    "alpha": (0.1, ("sequencematch",)),
    "match_share": (0.5, ("sequencematch",)),
    "match_after": (0, ("sequencematch",)),
}
# The least that an option may be. The Trainer would fail late over some, or train on in silence.
LEAST: dict[str, int] = {"first": 1, "alternate": 1, "max_length": 2}
LEAST |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1)
LEAST |= dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), 1)
LEAST |= dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), 0)
LEAST |= dict.fromkeys(("data_seed", "dataloader_num_workers", "neftune_noise_alpha"), 0)
LEAST["match_after"] = 0


@dataclass
class PrefixRewardConfig(TrainingArguments):
    """`TrainingArguments` with what a reward model for partial sequences needs.

    Raises `ValueError` for options out of range, at construction.
    """

    loss_type: str = field(
        default="prefix",
        metadata={
            "help": "prefix: Bradley-Terry at every prefix; full: at the last token only; farma: "
            "vocabulary head; genarm: autoregressive; genarm_prefix: autoregressive, at every "
            "prefix; seq2seq: rewrites drafts; rad: squared error to scalar labels; soft_q: soft "
            "Q-learning of scalar labels; copg: the language model itself, by the scores of its "
            "answers; distill: the language model itself, from the guided policy; sequencematch: "
            "the language model itself, which learns to undo tokens"
        },
    )
    first: int = field(default=1, metadata={"help": "shortest prefix that counts, in tokens"})
    weights: str | None = field(
        default=None,
        metadata={"help": "uniform or linear in the prefix length (default: rad linear)"},
    )
    margin: float | None = field(
        default=None,
        metadata={"help": "subtracted from every reward difference; rows may have one"},
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "probability that a preference label is the wrong way round"}
    )
    consistency: float | None = field(
        default=None,
        metadata={
            "help": "CREAM's C in (0.5, 1]: the loss is C times that of the pair and 1 - C times "
            "that of the pair swapped; the same as label_smoothing = 1 - C"
        },
    )
    centering: float = field(
        default=0.0, metadata={"help": "times (r_chosen + r_rejected)²: keeps rewards around zero"}
    )
    extension: str = field(
        default="hold",
        metadata={
            "help": "the shorter answer after its end: hold its last reward, or eos: pad with EOS "
            "tokens and take the rewards there (the published padding)"
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "scale of the log-probabilities (default: genarm 0.05, as published, "
            "genarm_prefix 0.1); copg: weight of the KL from what the model began as (0.05)"
        },
    )
    prefix_share: float = field(
        default=1.0,
        metadata={
            "help": "genarm_prefix: weight of the loss at every prefix; the rest is that of whole "
            "answers"
        },
    )
    alternate: int = field(
        default=1, metadata={"help": "farma: optimiser steps before the two losses change places"}
    )
    separator: str | None = field(
        default=None,
        metadata={"help": "seq2seq: the token between draft and rewriting (default: EOS)"},
    )
    value_beta: float = field(
        default=1.0,
        metadata={
            "help": "soft_q: inverse temperature of the values; 0: the mean under the model that "
            "training begins with, inf: the best token"
        },
    )
    td_lambda: float = field(
        default=0.0, metadata={"help": "soft_q: 0: targets of one step, 1: the labels themselves"}
    )
    backspace: str = field(
        default="<backspace>",
        metadata={"help": "sequencematch: the token that undoes one"},
    )
    slip_rate: float = field(
        default=0.1,
        metadata={"help": "sequencematch: share of steps with a wrong token that is to be undone"},
    )
    gamma: float = field(default=0.99, metadata={"help": "sequencematch: discount of later steps"})
    alpha: float = field(
        default=0.1, metadata={"help": "sequencematch: weight of the χ² penalty on rewards"}
    )
    match_share: float = field(
        default=0.5,
        metadata={"help": "sequencematch: weight of its objective; the rest is the likelihood's"},
    )
    match_after: int = field(
        default=0, metadata={"help": "sequencematch: optimiser steps on the likelihood alone first"}
    )
    max_length: int | None = field(default=512, metadata={"help": "tokens of prompt and answer"})
    overlong: str = field(default="truncate", metadata={"help": "truncate, drop or error"})
    invalid: str = field(default="error", metadata={"help": "error or drop: empty and equal pairs"})
    leaks: str = field(default="error", metadata={"help": "error, drop or allow"})
    eos: str | None = field(
        default=None,
        metadata={"help": "append EOS to whole answers, or keep them (default: rad keep)"},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "train without dropout"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay False"})

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ImportError as error:
            raise ImportError(
                f"training needs more packages: pip install 'rgtg_fast[train]' ({error})"
            ) from None
        one_of("loss_type", self.loss_type, tuple(OBJECTIVES))
        scalar_labels = OBJECTIVES[self.loss_type].data == "labelled"
        for name, (without, users) in USED_BY.items():
            if self.loss_type not in users and getattr(self, name) not in (None, without):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no part in loss_type={self.loss_type!r}, "
                    f"only in {', '.join(users)}; leave it out"
                )
        if self.weights is None:
            self.weights = "linear" if self.loss_type == "rad" else "uniform"
        if self.beta is None:
            self.beta = 0.1 if self.loss_type == "genarm_prefix" else 0.05
        if self.eos is None:
            self.eos = "keep" if scalar_labels else "append"
        for name, allowed in CHOICES.items():
            one_of(name, getattr(self, name), allowed)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the pairs; leave it False")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}; pass at least {least}")
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise ValueError(
                f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs} train "
                "nothing; pass max_steps of at least 1, or -1 and a positive num_train_epochs"
            )
        if self.prediction_loss_only:
            raise ValueError("prediction_loss_only=True leaves no rewards to report; leave it out")
        if self.consistency is not None:
            self._take_consistency(self.consistency)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing}; pass 0 <= value < 0.5")
        if self.centering < 0:
            raise ValueError(f"centering={self.centering}; pass 0 or more")
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta}; pass a positive number")
        if not self.value_beta >= 0:
            raise ValueError(f"value_beta={self.value_beta}; pass 0 or more, or inf")
        if not 0 <= self.td_lambda <= 1:
            raise ValueError(f"td_lambda={self.td_lambda}; pass 0 <= value <= 1")
        for name in ("prefix_share", "slip_rate", "gamma", "match_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; pass 0 <= value <= 1")
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha}; pass 0 or more")

    def _take_consistency(self, rate: float) -> None:
        if not 0.5 < rate <= 1:
            raise ValueError(
                f"consistency={rate}; pass 0.5 < value <= 1: at 0.5 the two models agree no more "
                "than by chance, and nothing is left to learn from the labels"
            )
        if self.label_smoothing not in (0.0, 1 - rate):
            raise ValueError(
                f"consistency={rate} and label_smoothing={self.label_smoothing} are both given, "
                "and are one option (label_smoothing = 1 - consistency); drop one of them"
            )
        self.label_smoothing = 1 - rate
