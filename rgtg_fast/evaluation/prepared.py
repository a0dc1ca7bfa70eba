"""What an evaluation knows before any model is loaded, and the files that it keeps rows in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import models
from .prompts import Prompt, check_lengths, load_prompts
from .settings import Run, Settings, is_function, load_function
from .store import Rows
from .wins import Prefer, make_prefer


@dataclass
class Evaluation:
    """What is known before any model is loaded."""

    settings: Settings
    tokenizer: Any
    prompts: list[Prompt]
    folder: Path
    progress: Progress
    prefer: Prefer | None = None
    guide: tuple[Any, Any] = (None, None)  # what the last guide was loaded for, and it

    def seeds(self, run: Run) -> tuple[int, ...]:
        """The seeds that a run is run with: one where nothing is drawn."""
        return self.settings.seeds if run.do_sample else self.settings.seeds[:1]

    def answers_key(self, run: Run, seed: int) -> dict[str, Any]:
        """What a run's answers depend on."""
        s = self.settings
        own = {k: v for k, v in asdict(run).items() if k != "name"}
        for key in ("reward_model", "select_by"):
            own[key] = own[key] and models.identity(own[key])
        return {
            "model": models.identity(s.model),
            "tokenizer": s.tokenizer and models.identity(s.tokenizer),
            "prompts": models.digest([p.ids for p in self.prompts]),
            "max_new_tokens": s.max_new_tokens,
            "batch_size": s.batch_size,
            "dtype": s.dtype,
            "run": own,
            "seed": seed,
        }

    def rewards_key(self, run: Run, seed: int) -> dict[str, Any]:
        """What the rewards of a run's answers depend on."""
        return {
            "judge": models.identity(self.settings.judge),
            "answers": self.answers_key(run, seed),
        }

    def wins_key(self, run: Run, seed: int) -> dict[str, Any]:
        """What a run's wins over the baseline depend on; there is a `win_judge`."""
        judge: Any = self.settings.win_judge
        asked: Any = {k: getattr(judge, k) for k in ("url", "model", "template", "max_tokens")}
        if judge.function is not None:
            asked = models.identity(judge.function)
        return {
            "judge": asked,
            "answers": self.answers_key(run, seed),
            "baseline": self.answers_key(self.baseline, seed),
        }

    @property
    def baseline(self) -> Run:
        """The run that the others are compared with."""
        return next(run for run in self.settings.runs if run.name == self.settings.baseline)

    def rows(self, kind: str, run: Run, seed: int) -> Rows:
        """The file of a run's "answers", "rewards" or "wins"."""
        key = getattr(self, f"{kind}_key")(run, seed)
        name = f"{run.name.replace(' ', '_')}.{seed}"
        return Rows(self.folder / "rows", name, kind, key, len(self.prompts))


def prepare(settings: Settings, console: Console) -> Evaluation:
    """Everything that can be wrong before models are loaded."""
    models.device_of(settings.device)
    models.check_found("model", settings.model)
    for spec in settings.runs:
        if spec.reward_model is not None:
            models.check_found(f"run {spec.name}: reward_model", spec.reward_model)
            models.check_guide(spec)
        if spec.select_by is not None:
            models.check_found(f"run {spec.name}: select_by", spec.select_by)
            models.check_classifier(f"run {spec.name}: select_by", spec.select_by)
    if is_function(settings.judge):
        load_function("judge", settings.judge)
    else:
        models.check_found("judge", settings.judge)
        models.check_classifier("judge", settings.judge)
    tokenizer = models.load_tokenizer(settings.tokenizer or settings.model)
    for spec in settings.runs:
        if spec.reward_model is not None:
            models.reward_tokenizer(spec, tokenizer)
    prompts = load_prompts(settings.prompts, tokenizer, settings.limit)
    config = transformers.AutoConfig.from_pretrained(settings.model)
    check_lengths(prompts, config, settings.max_new_tokens)
    repeated = len(prompts) - len({p.text for p in prompts})
    if repeated:
        console.print(f"{repeated} of {len(prompts)} prompts repeat another", highlight=False)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), console=console)
    prefer = None if settings.win_judge is None else make_prefer(settings.win_judge)
    return Evaluation(settings, tokenizer, prompts, Path(settings.output_dir), progress, prefer)
