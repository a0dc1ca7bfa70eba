"""`PrefixRewardTrainer`: reward models for partial sequences on the Hugging Face Trainer."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .collate import make_collator
from .config import PrefixRewardConfig
from .data import LabelledDataset, PreferenceDataset, TokenRows, remove_leaks
from .distill import GuidedAnswers
from .forward import TrainedParts, call_inside, check_causal, disable_dropout
from .metrics import label_metrics, pair_metrics
from .objectives import OBJECTIVES, Objective, Scored, answer_columns
from .output_folder import find_checkpoint
from .reference import add_reference, check_scores
from .sequencematch import AnswerRows, check_answers

logger = logging.get_logger(__name__)


class GroupedByLength(LengthGroupedSampler):
    """Batches of rows of like length, in an order that depends on seed and epoch only, so that a
    resumed run finds its place."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class _AtTheEnd(Exception):
    """The checkpoint is at the last step of the run: nothing is left to train."""


class _StepsLeft(TrainerCallback):
    """Checks, once a checkpoint is loaded, whether steps are left: at the last step the Trainer
    would train one more, or none, and report a training loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > state.max_steps:
            raise ValueError(
                f"the checkpoint is at step {state.global_step}, beyond the {state.max_steps} "
                "steps of the run; raise max_steps (or num_train_epochs), or train into another "
                "output_dir"
            )
        if state.global_step == state.max_steps:
            raise _AtTheEnd


# peft checks few of its options: others fail in the midst of making the adapter.
_NO_ADAPTER = (AttributeError, NotImplementedError, RuntimeError, TypeError, re.error)


class PrefixRewardTrainer(Trainer):
    """Trains a reward model so that r(x, y[1:i]) is meaningful at every i (arXiv 2406.07780).

    All prefix rewards of a pair come from one causal forward of the two answers, so a step costs
    what a full-sequence reward model's step costs. `args.loss_type` chooses the objective; the
    model is a `...ForSequenceClassification` with one label for "prefix", "full" and "rad", and a
    causal LM for "farma", "genarm", "genarm_prefix", "seq2seq", "soft_q", "copg", "distill" and
    "sequencematch".

    Args:
        model: the model, PEFT-wrapped or not; `peft_config` wraps it here.
        args: a `PrefixRewardConfig`.
        reference_model: the base policy π of "soft_q", which is not trained (default: a copy of
            `model`, held beside it).
        train_dataset, eval_dataset: `PreferenceDataset` (`LabelledDataset` for "rad" and "soft_q"),
            or anything these take as a source: a JSONL path, a `datasets.Dataset`, a list of rows.
        processing_class: the tokenizer; needed where the datasets are text.

    Evaluation reports `accuracy` (whole answers), `prefix_accuracy` (mean over all prefix lengths),
    and the accuracy at each decile and some absolute lengths; "rad" and "soft_q" report squared
    errors.

    Raises:
        ValueError: for a model that looks ahead or has the wrong head, bad rows, the same pair in
            train and eval, and several GPUs in one process.
    """

    loss_is_scaled_for_ga = False
    args: PrefixRewardConfig
    objective: Objective

    def __init__(
        self,
        model: nn.Module | None = None,
        args: PrefixRewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        data_collator: Any = None,
        compute_metrics: Any = None,
        reference_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = PrefixRewardConfig("reward_model_output")
        if not isinstance(args, PrefixRewardConfig):
            raise ValueError(f"args is {type(args).__name__}; pass a PrefixRewardConfig")
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start with `accelerate launch` or torchrun, "
                "or show it one by CUDA_VISIBLE_DEVICES"
            )
        objective: Objective = OBJECTIVES[args.loss_type]
        self.objective = objective
        if peft_config is not None:
            from peft import get_peft_model

            try:
                model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
            except _NO_ADAPTER as error:
                raise ValueError(
                    f"lora makes no adapter: {error}; write options of peft.LoraConfig"
                ) from error
        for adapter in (getattr(model, "peft_config", None) or {}).values():
            # A relative path would be resolved against wherever the adapter is loaded from.
            base = adapter.base_model_name_or_path
            if base and Path(base).is_dir():
                adapter.base_model_name_or_path = str(Path(base).resolve())
        sources = {"train": train_dataset, "eval": eval_dataset}
        train_dataset, eval_dataset = (
            make_dataset(source, args, processing_class, name) for name, source in sources.items()
        )
        if train_dataset is not None and eval_dataset is not None:
            remove_leaks(train_dataset, eval_dataset, args.leaks)
        for name, data in (("train", train_dataset), ("eval", eval_dataset)):
            if data is not sources[name]:
                whole = data.report.kept == data.report.rows and not data.report.overlong
                (logger.info if whole else logger.warning)(f"{name}: {data.report}")
        pairs = objective.data == "pairs"
        if objective.reference:
            reference_model = copy.deepcopy(model) if reference_model is None else reference_model
            reference_model = reference_model.requires_grad_(False).eval().to(args.device)  # type: ignore[union-attr]
        self.reference_model = reference_model
        config = getattr(model, "config", None)
        cached = getattr(config, "use_cache", None)
        collator: Any = data_collator or make_collator(args, processing_class, model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=collator,
            compute_metrics=compute_metrics or (pair_metrics if pairs else label_metrics),
            **kwargs,
        )
        if cached is not None:
            # Trainer sets it to False, which would be saved with the model and slow its use; the
            # forwards here ask for no cache anyway.
            config.use_cache = cached  # type: ignore[union-attr]
        self.model_accepts_loss_kwargs = False
        self._parts: TrainedParts | None = None
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._mean_count: float | None = None
        self.add_callback(_StepsLeft)
        trained: Any = self.model
        if args.disable_dropout:
            disable_dropout(trained)
        if objective.rewrites and data_collator is None:
            # With the model, for the guide: a tokenizer's EOS need not be the configuration's.
            trained.config.draft_separator_id = collator.separator
        parts = self.parts(trained)
        check_causal(parts)
        for name, data in (("train", train_dataset), ("eval", eval_dataset)):
            if data is not None:
                check_fit(data, parts.rm.text_config, name, objective.rewrites)
                if objective.data == "answers":
                    check_answers(data, parts, collator.backspace, collator.eos)
                if args.loss_type == "copg":
                    check_scores(data, name)
                    add_reference(data, trained, parts, args.per_device_eval_batch_size)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer; `resume_from_checkpoint=True` takes the last whole checkpoint.

        From a checkpoint at the last step the weights are loaded and nothing is trained.

        Raises `ValueError` for a checkpoint beyond the last step, and for one with an adapter where
        the model has none, or the reverse.
        """
        if not resume_from_checkpoint:
            return super().train(None, *args, **kwargs)
        if resume_from_checkpoint is True:
            path = find_checkpoint(True, Path(str(self.args.output_dir)))
        else:
            path = Path(resume_from_checkpoint)
        adapter, wanted = (
            (path / "adapter_config.json").exists(),
            hasattr(self.model, "peft_config"),
        )
        if adapter != wanted:  # the Trainer would go on with random weights where it finds none
            kinds = "an adapter" if adapter else "a whole model"
            raise ValueError(
                f"{path} holds {kinds} and the run trains {'an adapter' if wanted else 'none'}; "
                "resume with the lora of the run that wrote it, or start over"
            )
        try:
            return super().train(str(path), *args, **kwargs)
        except _AtTheEnd:
            self.is_in_train = False
            return TrainOutput(self.state.global_step, math.nan, {"train_runtime": 0.0})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the Trainer. The state that an earlier run left in the folder is removed first: it
        would mark a half-written checkpoint as complete."""
        if self.args.should_save and output_dir is not None:
            (Path(output_dir) / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(data, "lengths"):
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return GroupedByLength(size, data.lengths(), self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def parts(self, model: nn.Module) -> TrainedParts:
        """Base and head of the unwrapped model."""
        if self._parts is None or self._parts.model is not model:
            self._parts = TrainedParts(model, self.objective.head, self.reference_model)
        return self._parts

    def score(self, model: nn.Module, inputs: dict[str, Tensor], step: int | None) -> Scored:
        """Loss and prefix rewards of a batch; `step=None` for evaluation."""
        inner = self.accelerator.unwrap_model(model)
        parts = self.parts(inner)

        def run() -> Scored:
            with self.accelerator.autocast():
                return self.objective.score(parts, inputs, self.args, step)

        return call_inside(model, inner, run)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        scored = self.score(model, inputs, self.state.global_step if model.training else None)
        if model.training and self.objective.data == "pairs":
            phase = "bt_loss" if scored.rewards is not None else "consistency_loss"
            if self.args.loss_type == "farma":
                self._count(phase, scored.loss.detach())
            if scored.rewards is not None:
                gap = last_gap(scored.rewards, inputs["answer_mask"])
                self._count("accuracy", (gap > 0).float().mean())
        loss = scored.loss
        if model.training and self._mean_count is not None:
            loss = loss * (self._counted(inputs) / self._mean_count)
        return (loss, scored) if return_outputs else loss

    def _counted(self, batch: dict[str, Any]) -> int:
        """What the loss of a batch is the mean of: rows, or tokens of rewritings or answers."""
        if self.objective.data == "answers":
            return int(batch["answer_mask"].sum())
        if self.objective.rewrites:
            return int(batch["answer_mask"][:, 0].sum())
        return len(batch["start"])

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one optimiser step. An epoch's last may be smaller: each counts by its
        rows (or tokens), so that accumulation gives the mean over these and not over batches."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        rows = [self._counted(batch) for batch in batches]
        self._mean_count = sum(rows) / len(rows) if rows else None
        return batches, items

    def _count(self, name: str, value: Tensor) -> None:
        total, n = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value, n + 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, (total, n) in self._sums.items():
                logs[name] = round(float(self.accelerator.gather(total / n).mean()), 4)
            self._sums = {}
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss; for pairs r(chosen) - r(rejected) [N, T] of all prefixes and labels [N, 3] (lengths
        and the number of tokens with which both begin); for texts rewards [N, T] and labels [N, 2]
        (target, length), with targets of the prefixes [N, 2 + T]."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scored = self.score(model, inputs, None)
        loss, rewards = scored.loss.detach().mean(), scored.rewards
        if prediction_loss_only or rewards is None:
            return loss, None, None
        lengths = inputs["answer_mask"].sum(-1)
        if self.objective.data == "labelled":
            labels = torch.stack([inputs["target"].float(), lengths.float()], dim=1)
            if "targets" in inputs:
                labels = torch.cat([labels, inputs["targets"].float()], dim=1)
            return loss, rewards.float(), labels
        if self.args.extension == "hold":
            at = torch.arange(rewards.shape[-1], device=rewards.device)
            rewards = rewards.gather(-1, torch.minimum(at, lengths[..., None] - 1))
        mask = inputs["answer_mask"]
        ids = answer_columns(inputs["input_ids"], inputs["start"], mask.shape[-1])
        equal = ((ids[:, 0] != ids[:, 1]) | (mask[:, 0] != mask[:, 1])).long().argmax(-1)
        labels = torch.cat([lengths, equal[:, None]], dim=1)
        return loss, (rewards[:, 0] - rewards[:, 1]).float(), labels


def check_fit(data: TokenRows, text_config: Any, name: str, rewrites: bool = False) -> None:
    """Raises `ValueError` for rows that the model has no positions or no embeddings for; with
    `rewrites`, for those where prompt, draft, separator and rewriting do not fit."""
    longest, positions = max(data.lengths()), getattr(text_config, "max_position_embeddings", None)
    if rewrites:
        sized = zip(data.lengths(), data.rows, strict=True)
        most = max(2 * whole - len(row["prompt_ids"]) + 1 for whole, row in sized)
        if positions and most > positions:
            raise ValueError(
                f"{name} has a row of {most} tokens (prompt, draft, separator and rewriting) and "
                f"the model takes {positions}; set max_length={positions // 2}, which cuts answers"
            )
    if positions and longest > positions:
        raise ValueError(
            f"{name} has a row of {longest} tokens and the model takes {positions}; set "
            f"max_length={positions}"
        )
    if data.largest_id() >= text_config.vocab_size:
        raise ValueError(
            f"{name} holds token id {data.largest_id()} and the model has {text_config.vocab_size} "
            "embeddings; use the model's own tokenizer, or resize its embeddings"
        )


def last_gap(rewards: Tensor, answer_mask: Tensor) -> Tensor:
    """r(chosen) - r(rejected) [N] of the whole answers, from rewards [N, 2, T]."""
    ends = rewards.gather(-1, answer_mask.sum(-1, keepdim=True) - 1)[..., 0]
    return ends[:, 0] - ends[:, 1]


def make_dataset(
    source: Any, args: PrefixRewardConfig, tokenizer: Any, split: str
) -> TokenRows | None:
    """The dataset of `source` for this configuration; one that is ready is returned as it is."""
    if source is None or isinstance(source, TokenRows):
        return source
    if isinstance(source, dict) or not isinstance(source, (str, Iterable)):
        raise ValueError(
            f"{split}_dataset is {type(source).__name__}; pass a path, a dataset or rows"
        )
    options: dict[str, Any] = {
        "split": split,
        "max_length": args.max_length,
        "overlong": args.overlong,
        "invalid": args.invalid,
        "eos": args.eos,
        "min_answer_tokens": args.first,
        "seed": args.seed,
    }
    kinds: dict[str, Any] = {
        "pairs": PreferenceDataset,
        "labelled": LabelledDataset,
        "guided": GuidedAnswers,
        "answers": AnswerRows,
    }
    return kinds[OBJECTIVES[args.loss_type].data](source, tokenizer, **options)
