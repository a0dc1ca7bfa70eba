"""The file of `python -m rgtg_fast train --config`: read, checked key by key."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .config import PrefixRewardConfig
from .config_file import read_yaml, type_names, typed
from .formats import NAMED


@dataclass
class Settings:
    """What the file says beside the fields of `PrefixRewardConfig`, which are in `args`.

    `model` and `train` are needed; see `rgtg_fast.training.formats.load_rows` for what `train` and
    `eval` may be. `hold_out` takes that many training rows for evaluation where there is no `eval`,
    the pairs of a prompt together.
    `lora` holds the options of `peft.LoraConfig`. `frozen` fits a head on the frozen model's hidden
    states (penalty `l2`) and trains nothing else. `resume` is true (the last checkpoint in
    `output_dir`) or a checkpoint's folder. `overwrite` removes what an earlier run wrote to
    `output_dir`, and nothing else, before training starts.
    """

    model: str
    train: str
    eval: str | None = None
    hold_out: int = 0
    tokenizer: str | None = None
    dtype: str = "float32"
    lora: dict[str, Any] | None = None
    frozen: bool = False
    l2: float = 1e-4
    resume: bool | str = False
    overwrite: bool = False
    args: dict[str, Any] = field(default_factory=dict)


OWN = {f.name: f for f in dataclasses.fields(Settings) if f.name != "args"}
TRAINER = {f.name: f for f in dataclasses.fields(PrefixRewardConfig) if f.init}


def read_settings(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Settings:
    """Settings from a YAML file and `key=value` overrides; paths are as seen from where one runs.

    Raises `ValueError` for a file that is no mapping, unknown keys (naming the nearest known one),
    missing keys, and values of the wrong kind.
    """
    return check_settings(read_yaml(path, overrides or ()))


def check_settings(values: dict[str, Any]) -> Settings:
    """Settings from a mapping; raises `ValueError` as `read_settings` does."""
    unknown = [str(key) for key in values if key not in OWN and key not in TRAINER]
    if unknown:
        raise ValueError("; ".join(map(_unknown, unknown)))
    missing = [key for key in ("model", "train", "output_dir") if not values.get(key)]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}; set {missing[0]}: ...")
    own = {key: _typed(key, value, OWN[key]) for key, value in values.items() if key in OWN}
    args = {k: _typed(k, value, TRAINER[k]) for k, value in values.items() if k in TRAINER}
    settings = Settings(**own, args={"report_to": "none", "logging_steps": 10} | args)
    named = NAMED.get(str(settings.train).partition(":")[0])
    if named is not None:
        settings.args.setdefault("first", named.first)
    if settings.lora is not None and not isinstance(settings.lora, dict):
        raise ValueError(f"lora is {settings.lora!r}; write a mapping of peft.LoraConfig's options")
    if settings.args.get("resume_from_checkpoint"):
        raise ValueError(
            f"resume_from_checkpoint={settings.args['resume_from_checkpoint']!r} has no effect on "
            "the Trainer; write resume: true, or resume: a checkpoint's folder"
        )
    if settings.hold_out < 0:
        raise ValueError(f"hold_out={settings.hold_out}; pass the number of rows to keep for eval")
    if settings.hold_out and settings.eval:
        raise ValueError("hold_out and eval are both given; drop one of them")
    loss_type = settings.args.get("loss_type", "prefix")
    if settings.frozen and (
        settings.lora or settings.resume or loss_type not in ("prefix", "full")
    ):
        raise ValueError(
            "frozen: true fits a head only, at once; drop lora and resume, and use loss_type "
            "prefix or full"
        )
    return settings


def load_pretrained(auto: Any, key: str, name: str, **options: Any) -> Any:
    """`auto.from_pretrained(name)`; raises `ValueError` with the config's `key` where it fails."""
    try:
        return auto.from_pretrained(name, **options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        base = missing_base(name)
        if base is not None:
            raise ValueError(missing_base_error(f"{key}={name!r}", base)) from None
        why = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise ValueError(
            f"{key}={name!r} cannot be loaded by {auto.__name__} ({why}); give a folder that holds "
            "it, or a name on the hub"
        ) from None


def missing_base_error(which: str, base: str) -> str:
    """What to say of an adapter without its base model."""
    return (
        f"{which} is an adapter and its base model {base!r} is not there; put it there, or mend "
        "base_model_name_or_path in its adapter_config.json"
    )


def missing_base(name: str) -> str | None:
    """The base model of an adapter's folder where that is a path to nothing."""
    try:
        text = (Path(name) / "adapter_config.json").read_text(encoding="utf-8")
        base = json.loads(text)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError):
        return None
    local = base and (os.path.isabs(base) or base.startswith(".") or base.count("/") > 1)
    return base if local and not Path(base).is_dir() else None


def load_tokenizer(settings: Any) -> Any:
    """The tokenizer of `settings.tokenizer`, or else of `settings.model`."""
    key = "tokenizer" if settings.tokenizer else "model"
    return load_pretrained(AutoTokenizer, key, getattr(settings, key))


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, [*OWN, *TRAINER], n=1)
    hint = f"did you mean {near[0]}?" if near else "see PrefixRewardConfig and TrainingArguments"
    return f"unknown key {key}: {hint}"


def _typed(key: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    """`value` as the field's type has it; mappings, lists and enums are not looked at."""
    simple = {"bool", "int", "float", "str", "None"}.issuperset(type_names(field))
    if value is False and not simple:
        return "no"  # YAML reads the `no` of `save_strategy: no` as False
    return typed(key, value, field) if simple else value
