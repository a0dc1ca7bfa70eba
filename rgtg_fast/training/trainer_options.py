"""Options that transformers' Trainer takes and fails over late, or ignores: checked beforehand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import get_scheduler
from transformers.integrations import get_available_reporting_integrations

from .data import one_of
from .metrics import DECILES, LENGTHS

# What evaluation reports by the kind of its data; a length where an answer is as long.
_METRICS = {
    "pairs": (
        *("loss", "accuracy", "prefix_accuracy"),
        *(f"accuracy_decile_{decile}" for decile in DECILES),
        *(f"accuracy_length_{length}" for length in LENGTHS),
    ),
    "guided": ("loss",),
    "answers": ("loss",),
    "labelled": ("loss", "mse", *(f"mse_decile_{decile}" for decile in DECILES)),
}


def check_trainer_options(args: Any, data: str) -> None:
    """Raises `ValueError` where `TrainingArguments` name a schedule that cannot be made, a reporter
    that is not there, or a `metric_for_best_model` that evaluation on `data` (of an
    objective) does not report."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    options = args.lr_scheduler_kwargs or {}
    try:
        optimizer = torch.optim.SGD([parameter])
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 9, scheduler_specific_kwargs=options)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs={options!r} makes no schedule of "
            f"lr_scheduler_type={args.lr_scheduler_type.value!r} ({error}); mend it or leave it out"
        ) from None
    installed = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in installed:
            raise ValueError(
                f"report_to={name!r} is not installed here, or not known; install it, or pass one "
                f"of {', '.join((*installed, 'none'))}"
            )
    if args.metric_for_best_model is not None:
        one_of(
            "metric_for_best_model",
            args.metric_for_best_model.removeprefix("eval_"),
            _METRICS[data],
        )
