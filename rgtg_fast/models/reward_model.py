"""A reward model taken apart: a base (hidden states) and a head (a number)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from .foreign import hooked
from .parts import ModelParts

HEAD_NAMES = ("score", "classifier", "v_head", "regression_head", "regression_layer")
Label = str | int | list[str | int] | dict[str | int, float] | None


class RewardModel(ModelParts):
    """A reward model taken apart: `base(ids) -> hidden [.., H]` and `rewards(hidden) -> fp32 [..]`.

    The public `...ForSequenceClassification` forward pools one position only, so base and head are
    called directly. The head is a module of `model` named `score`, `classifier`, `v_head`,
    `regression_head` or `regression_layer`; another is given as `head` (a callable [..., H] ->
    [...] or [..., 1]).

    `label`, a name in the model's `id2label` or an index, is for a model with several labels. The
    reward is then the label's log-probability: log-softmax over the labels, or log-sigmoid where
    the configuration says `problem_type="multi_label_classification"`; with
    `problem_type="regression"`, and of a head that is named so, it is the label's logit itself.
    Several labels make a weighted sum: a list of them (each of weight 1) or {label: weight}.
    `problem_type` stands in for the configuration's; "multi_label_classification" makes a head of
    one number the log-sigmoid of it.

    Raises `ValueError` where no base or head is found, or the head gives several labels and none is
    named.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Callable[[Tensor], Tensor] | None = None,
        label: Label = None,
        problem_type: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"reward_model must be a torch module or a scorer with prefill, score and commit; "
                f"got {type(model).__name__}"
            )
        if head is not None and not callable(head):
            raise ValueError(
                f"reward_head must be a module or function, hidden [..., H] -> rewards [...]; "
                f"got {head!r}"
            )
        if head is not None and label is not None:
            raise ValueError(
                f"reward_label={label!r} chooses among the labels of the model's own head, and "
                "reward_head is given; pass one of them"
            )
        super().__init__(model)
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        # The public forward uses the model's own head: the probe cannot check another against it.
        self.check_public = head is None
        self.head: Any = head
        self.label: tuple[tuple[int, float], ...] | None = None  # columns and their weights
        self.problem = getattr(getattr(inner, "config", self.config), "problem_type", None)
        if head is None:
            name, self.head = _find_head(inner, self.base)
            self.label = _columns(label, _labels(self.head), inner)
            if name.startswith("regression"):
                self.problem = "regression"
            if problem_type is not None:
                self.problem = problem_type
                if self.label is None and problem_type == "multi_label_classification":
                    self.label = ((0, 1.0),)
        self._kernels: dict[tuple, Callable[..., Tensor]] = {}  # of reward_head

    def rewards(self, hidden: Tensor, backend: ops.Backend = "auto") -> Tensor:
        """Rewards fp32 [B, n] of hidden states [B, n, H], on the hidden states' device."""
        head, linear = self.head, self.linear_head()
        if linear is not None and len(linear[0]) == hidden.shape[-1]:
            weight, bias = linear
            if weight.device != hidden.device:
                hidden = hidden.to(weight.device)
            key = backend, hidden.device, len(hidden)
            if key not in self._kernels:
                self._kernels[key] = ops.kernel("reward_head", *key)
            return self._kernels[key](hidden.to(weight.dtype), weight, bias)
        parameter = next(head.parameters(), None) if isinstance(head, nn.Module) else None
        if parameter is not None:
            hidden = hidden.to(parameter.device, parameter.dtype)
        out = head(hidden)
        if self.label is not None:
            return self.of_logits(out)
        if out.dim() == hidden.dim() and out.shape[-1] == 1:
            out = out.squeeze(-1)
        if out.shape != hidden.shape[:-1]:
            raise ValueError(
                f"reward_head gave shape {list(out.shape)} for hidden states "
                f"{list(hidden.shape)}; it must give one number per position"
            )
        return out.float()

    def linear_head(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight [H] and bias [1] of a head that is one plain linear layer; None of any other."""
        head = self.head
        if type(head) is not nn.Linear or hooked(head) or self.label is not None:
            return None
        return (head.weight[0], head.bias) if len(head.weight) == 1 else None

    def of_logits(self, logits: Tensor) -> Tensor:
        """Rewards fp32 [..] of the labels' logits [.., labels]."""
        logits = logits.float()
        if self.label is None:
            return logits.squeeze(-1)
        if self.problem == "multi_label_classification":
            logits = nn.functional.logsigmoid(logits)
        elif self.problem != "regression":
            logits = logits.log_softmax(-1)
        (column, weight), *rest = self.label
        if not rest and weight == 1:
            return logits[..., column]
        weights = logits.new_tensor([weight for _, weight in self.label])
        return logits[..., [column for column, _ in self.label]] @ weights

    def twin(self, eval_mode: bool = True) -> Self:
        own = super().twin(eval_mode)
        assert own.twins is not None
        own.head = own.twins.rebound(self.head)
        own._kernels = {}
        return own

    def _roots(self) -> list[nn.Module]:
        heads = [self.head] if isinstance(self.head, nn.Module) else []
        return [self.model, self.base, *heads]


def as_reward_model(
    model: Any,
    head: Callable[[Tensor], Tensor] | None = None,
    label: Label = None,
) -> RewardModel:
    """`model` taken apart, if it is not already. Raises `ValueError` for two heads at once."""
    if not isinstance(model, RewardModel):
        return RewardModel(model, head, label)
    for name, value in (("reward_head", head), ("reward_label", label)):
        if value is not None:
            raise ValueError(
                f"{name} is given beside a {type(model).__name__}, which has a head; leave it out"
            )
    return model


def _find_head(model: nn.Module, base: nn.Module) -> tuple[str, nn.Module]:
    owners = [model] + ([base] if base is not model else [])
    heads = ((name, getattr(owner, name, None)) for owner in owners for name in HEAD_NAMES)
    found = next(((name, h) for name, h in heads if isinstance(h, nn.Module)), None)
    if found is None and is_causal(model):
        raise ValueError(
            f"reward_model {type(model).__name__} is a language model, which has no reward head; "
            'pass reward_kind="genarm" for one trained as GenARM (rewards are its log-probs), '
            'reward_kind="farma" for one trained as FaRMA (rewards are its logits), '
            'reward_kind="seq2seq" for one that rewrites drafts, or '
            "reward_head= (hidden [..., H] -> reward [...])"
        )
    if found is None:
        raise ValueError(
            f"reward_model {type(model).__name__} has no reward head named "
            f"{', '.join(HEAD_NAMES)}; pass reward_head= (hidden [..., H] -> reward [...])"
        )
    return found


def is_causal(model: Any) -> bool:
    """Whether a model gives logits over a vocabulary."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def _labels(head: nn.Module) -> int:
    """Numbers that the head gives for each position."""
    # Not config.num_labels: Hugging Face sets it to 2 where a custom class never says.
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    return linears[-1].out_features if linears else 1


def _columns(label: Label, labels: int, model: Any) -> tuple[tuple[int, float], ...] | None:
    """The columns of the head that `label` names and their weights; None for a head of one."""
    if label is None and labels == 1:
        return None
    if not isinstance(label, (list, tuple, Mapping)):
        return ((_column(label, labels, model), 1.0),)
    weights = label.items() if isinstance(label, Mapping) else [(one, 1.0) for one in label]
    for one, weight in weights:
        real = isinstance(weight, Real) and not isinstance(weight, bool)
        if not real or not math.isfinite(weight):  # type: ignore[arg-type]
            raise ValueError(
                f"reward_label: {one!r} has the weight {weight!r}; pass finite numbers"
            )
    columns = [(_column(one, labels, model), float(weight)) for one, weight in weights]
    if not columns or len({column for column, _ in columns}) != len(columns):
        raise ValueError(
            f"reward_label={label!r} names {'a label twice' if columns else 'no label'}; pass a "
            "list of labels, or {label: weight}"
        )
    return tuple(columns)


def _column(label: str | int | None, labels: int, model: Any) -> int:
    """The column of the head that `label` names."""
    id2label = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(id2label.get(i, i)) for i in range(labels)]
    shown = ", ".join(names[:8]) + (", ..." if labels > 8 else "")
    if labels == 1:
        raise ValueError(
            f"reward_label={label!r} is for a model with several labels, and "
            f"{type(model).__name__} gives one number; leave it out"
        )
    if label is None:
        raise ValueError(
            f"reward_model gives {labels} labels ({shown}), one number is wanted; pass "
            f"reward_label= (a name, 0 to {labels - 1}, a list of these, or {{label: weight}}), or "
            "reward_head= for another number"
        )
    if isinstance(label, str) and names.count(label) == 1:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < labels:
        return label
    raise ValueError(
        f"reward_label={label!r} is none of the labels of {type(model).__name__} ({shown}); pass "
        f"one of these names, or 0 to {labels - 1}"
    )
