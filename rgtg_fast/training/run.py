"""`python -m rgtg_fast train`: from a config file to a model with metrics, plot and card."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from .card import write_card
from .config import USED_BY, PrefixRewardConfig
from .data import remove_leaks
from .head_only import fit_head, pair_features
from .metrics import label_report, plot_report, prefix_report
from .objectives import OBJECTIVES
from .output_folder import (
    FIGURES,
    check_unused,
    find_checkpoint,
    finished_at,
    how_to_go_on,
    locked,
    remove_run,
    write_figures,
)
from .sequencematch import add_backspace
from .settings import Settings, load_pretrained, load_tokenizer, read_settings
from .summary import print_summary
from .trainer import PrefixRewardTrainer, check_fit, make_dataset
from .trainer_options import check_trainer_options


def train(path: str | os.PathLike[str], overrides: list[str] | None = None) -> dict[str, Any]:
    """Trains as the config file at `path` says; returns what it writes to metrics.json.

    `output_dir` gets the model, its tokenizer, README.md (the model card), with an eval set of
    pairs accuracy_by_prefix.png, and at last metrics.json: a folder that has it is finished. A
    table of the figures ends the run.

    One run a folder: what an earlier one left there is an error, unless the config says
    `resume: true` (to go on from its last checkpoint) or `overwrite: true`.

    Raises `ValueError` as `read_settings` and the trainer do, for a used `output_dir`, and where
    another process trains into it; `OSError` where the disk is full; `KeyboardInterrupt`, saying
    how to go on.
    """
    return train_as(read_settings(path, overrides))


def train_as(settings: Settings, note: str = "", lm: str | None = None) -> dict[str, Any]:
    """`train` with settings that are read already; `note` is a line of the model card, and `lm` the
    language model that its example guides (default: `settings.model`)."""
    args = PrefixRewardConfig(**settings.args)
    check_trainer_options(args, OBJECTIVES[args.loss_type].data)
    out = Path(str(args.output_dir))
    try:
        with locked(out) if args.process_index == 0 else contextlib.nullcontext():
            return _train_into(out, settings, args, note, lm or settings.model)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {how_to_go_on(out)}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _of_writing(error):
            raise
        raise OSError(
            f"{out} cannot be written to, is the disk full? ({error}); {how_to_go_on(out)}"
        ) from error


def _train_into(
    out: Path, settings: Settings, args: PrefixRewardConfig, note: str, lm: str
) -> dict[str, Any]:
    start = time.perf_counter()
    main_process = args.process_index == 0
    _check_target(settings, args, out)
    transformers.set_seed(args.seed)
    tokenizer = load_tokenizer(settings)
    undoes = OBJECTIVES[args.loss_type].data == "answers"
    if undoes:
        tokenizer.add_tokens(args.backspace, special_tokens=True)  # answers may hold it
    train, evaluate = make_datasets(settings, args, tokenizer)
    reports = {"train": train.report} | ({} if evaluate is None else {"eval": evaluate.report})
    if main_process:
        for name, report in reports.items():
            print(f"{name}: {report}", flush=True)
    model = load_model(settings, args)
    if undoes:
        add_backspace(model, tokenizer, args.backspace)
    metrics: dict[str, Any] = {"loss_type": args.loss_type, "frozen": settings.frozen}
    if settings.frozen:
        metrics |= _fit_frozen(model, settings, args, train, evaluate, out)
    else:
        trainer = _trainer(settings, args, model, tokenizer, train, evaluate)
        if settings.overwrite and main_process:
            remove_run(out)
        metrics |= _run_trainer(trainer, settings, out)
    metrics["data"] = {name: asdict(report) for name, report in reports.items()}
    metrics["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    if main_process:
        tokenizer.save_pretrained(out)
        _write(metrics, settings, args, model, out, note, lm)
        print_summary(metrics, out)
    return metrics


def _of_writing(error: Exception) -> bool:
    """Whether an error is one of a full disk; that of safetensors and torch.save is no OSError."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("os error", "PytorchStreamWriter", "unexpected pos", "file write failed")
    return any(word in str(error) for word in words)


def _check_target(settings: Settings, args: PrefixRewardConfig, out: Path) -> None:
    """Raises `ValueError` for an `output_dir` that is not for this run."""
    if settings.overwrite:
        if settings.resume:
            raise ValueError("overwrite and resume are both given; drop one of them")
        for key in ("model", "tokenizer"):
            name = getattr(settings, key)
            if name and out.resolve() in (Path(name).resolve(), *Path(name).resolve().parents):
                raise ValueError(
                    f"{key}={name!r} lies in output_dir={str(out)!r}, and overwrite would remove "
                    "it; name another output_dir"
                )
    elif args.process_index == 0:  # other processes may check after this one has begun to write
        if settings.resume:
            find_checkpoint(settings.resume, out)
        else:
            check_unused(out, can_resume=not settings.frozen)
    if settings.frozen:
        for name in ("weights", "extension", "margin", "centering"):
            if getattr(args, name) not in (None, USED_BY[name][0]):
                raise ValueError(f"{name} has no part in the fit of a frozen model's head; drop it")


def load_model(settings: Settings, args: PrefixRewardConfig) -> Any:
    """The model that the objective trains; a missing scalar head starts at random."""
    dtype = getattr(torch, settings.dtype, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype={settings.dtype!r}; write float32, bfloat16 or float16")
    if settings.frozen or OBJECTIVES[args.loss_type].head == "vocab":
        return load_pretrained(
            transformers.AutoModelForCausalLM, "model", settings.model, dtype=dtype
        )
    auto = transformers.AutoModelForSequenceClassification
    return load_pretrained(auto, "model", settings.model, num_labels=1, dtype=dtype)


def make_datasets(settings: Settings, args: PrefixRewardConfig, tokenizer: Any) -> tuple[Any, Any]:
    """Train and eval set, leaks looked for."""
    train: Any = make_dataset(settings.train, args, tokenizer, "train")
    if settings.hold_out:
        return train, train.take_out(settings.hold_out, args.seed)
    evaluate = make_dataset(settings.eval, args, tokenizer, "eval")
    if evaluate is not None:
        remove_leaks(train, evaluate, args.leaks)
    return train, evaluate


def _trainer(
    settings: Settings, args: PrefixRewardConfig, model: Any, tokenizer: Any, train: Any, eval: Any
) -> PrefixRewardTrainer:
    peft_config = None
    if settings.lora is not None:
        from peft import LoraConfig

        task = "CAUSAL_LM" if OBJECTIVES[args.loss_type].head == "vocab" else "SEQ_CLS"
        try:
            peft_config = LoraConfig(**{"task_type": task} | settings.lora)
        except TypeError as error:
            raise ValueError(f"lora: {error}; write options of peft.LoraConfig") from None
    return PrefixRewardTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=eval,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def _run_trainer(trainer: PrefixRewardTrainer, settings: Settings, out: Path) -> dict[str, Any]:
    done = trainer.train(resume_from_checkpoint=settings.resume or None)
    if done.metrics["train_runtime"] == 0 and finished_at(out) == done.global_step:
        raise ValueError(
            f"the run in output_dir={str(out)!r} is finished, at step {done.global_step}; raise "
            "max_steps (or num_train_epochs) to go on, or name another output_dir"
        )
    if trainer.is_world_process_zero():
        (out / FIGURES).unlink(missing_ok=True)  # figures of the model that is overwritten now
    trainer.save_model()
    history = [h for h in trainer.state.log_history if "loss" in h]
    metrics: dict[str, Any] = {
        "steps": done.global_step,
        "train_loss": _mean_loss(history, done.training_loss),
        "train_seconds": done.metrics["train_runtime"],
        "history": history,
    }
    if trainer.eval_dataset is not None:
        predicted = trainer.predict(trainer.eval_dataset)  # type: ignore[arg-type]
        if predicted.predictions is not None:
            report = prefix_report if trainer.objective.data == "pairs" else label_report
            metrics["eval"] = report(predicted.predictions, predicted.label_ids)
        metrics["eval_loss"] = (predicted.metrics or {})["test_loss"]
    return metrics


def _mean_loss(history: list[dict[str, Any]], short: float) -> float:
    """Mean over all logged steps; `short` where the run was too short for a log. In a resumed run
    the Trainer's own figure divides the loss since the resumption by the steps of the whole run."""
    if not history:
        return short
    before = [0, *(entry["step"] for entry in history)]
    steps = [entry["step"] - at for entry, at in zip(history, before, strict=False)]
    return sum(e["loss"] * n for e, n in zip(history, steps, strict=True)) / sum(steps)


def _fit_frozen(
    model: Any, settings: Settings, args: PrefixRewardConfig, train: Any, eval: Any, out: Path
) -> dict[str, Any]:
    from safetensors.torch import save_file

    for name, data in (("train", train), ("eval", eval)):
        if data is not None:
            check_fit(data, model.config.get_text_config(), name)
            if any("margin" in row for row in data.rows):
                raise ValueError(f"{name} has margins, which have no part in the fit of a head")
    model = model.to(args.device)
    options: dict[str, Any] = {"first": args.first, "full": args.loss_type == "full"}
    size = args.per_device_train_batch_size
    fit = fit_head(
        pair_features(model, train, batch_size=size, **options),
        l2=settings.l2,
        label_smoothing=args.label_smoothing,
    )
    if settings.overwrite:
        remove_run(out)
    save_file({"weight": fit.weight}, out / "reward_head.safetensors")
    metrics: dict[str, Any] = {
        "train_loss": fit.loss,
        "train_accuracy": fit.accuracy,
        "evaluations": fit.evaluations,
    }
    if eval is not None:
        metrics["eval"] = _head_report(fit.weight, pair_features(model, eval, batch_size=size))
    return metrics


def _head_report(weight: torch.Tensor, features: Any) -> dict[str, Any]:
    """`prefix_report` of a head's margins; equal prefixes have a zero difference."""
    pairs, width = int(features.pair.max()) + 1, int(features.length.max())
    margins = torch.zeros(pairs, width)
    margins[features.pair, features.length - 1] = features.differences @ weight
    same = (features.differences == 0).all(-1)
    lengths = torch.zeros(pairs, dtype=torch.long)
    lengths.scatter_reduce_(0, features.pair, features.length, "amax")
    equal = torch.zeros(pairs, dtype=torch.long)
    equal.scatter_reduce_(0, features.pair[same], features.length[same], "amax")
    return prefix_report(margins, torch.stack([lengths, lengths, equal], dim=1))


def _known(value: Any) -> Any:
    """`value` with null for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _known(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_known(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(
    metrics: dict[str, Any],
    settings: Settings,
    args: PrefixRewardConfig,
    model: Any,
    out: Path,
    note: str,
    lm: str,
) -> None:
    plotted = OBJECTIVES[args.loss_type].data == "pairs" and "eval" in metrics
    if plotted:
        plot_report(
            metrics["eval"], out / "accuracy_by_prefix.png", f"{settings.model}, {args.loss_type}"
        )
    write_card(out / "README.md", metrics, settings, args, model.config, plotted, note, lm)
    write_figures(out, _known(metrics))
