"""A PEFT LoRA reward model on disk, read without peft: `adapter_config.json` and safetensors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from .reward_model import HEAD_NAMES

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WAY_OUT = (
    "load it with peft on a sequence-classification model and pass that as reward_model= "
    "(a second set of weights)"
)
# Keys that do not change the forward: they tell of training, or name the layers, as the tensors'
# names do too. `bias` and `init_lora_weights` are checked separately.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip
_INITS_THAT_LEAVE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


class Checkpoint(NamedTuple):
    """LoRA weights by the module's name in the sequence-classification model, and the head."""

    path: str
    base_name: str | None
    layers: dict[str, tuple[Tensor, Tensor, float]]  # A [r, in], B [out, r], scale
    head_weight: Tensor  # [1, H]
    head_bias: Tensor | None  # [1]


def read_checkpoint(path: str | Path, **hub: Any) -> Checkpoint:
    """Read the checkpoint at `path`, a folder or a Hub id (`hub`: revision, subfolder, token).

    Raises `ValueError` for whatever the checkpoint holds beyond plain LoRA and a linear head.
    """
    config = json.loads(Path(_file(path, _CONFIG, hub)).read_text(encoding="utf-8"))
    _check_config(path, config)
    tensors = load_file(_file(path, _WEIGHTS, hub))
    parts: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(
                f"{path}: {key} has dtype {tensor.dtype}; save the adapter in float32, bfloat16 "
                "or float16"
            )
        lora = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        owner, _, kind = name.rpartition(".")
        if lora and lora[1].split(".")[0] not in HEAD_NAMES:
            parts.setdefault(lora[1], {})[lora[2]] = tensor
        elif owner in HEAD_NAMES and kind in ("weight", "bias"):
            head[kind] = tensor
        else:
            raise ValueError(
                f"{path} holds {key!r}, which is no LoRA weight of a linear layer and no linear "
                f"reward head; {_WAY_OUT}"
            )
    weight, bias = _check_head(path, head, config)
    layers = {name: _low_rank(path, name, part, config) for name, part in parts.items()}
    if not layers:
        raise ValueError(f"{path} holds no LoRA weights; for a head alone use RewardHead")
    return Checkpoint(str(path), config.get("base_model_name_or_path"), layers, weight, bias)


def _file(path: str | Path, name: str, hub: dict[str, Any]) -> str:
    try:
        found = cached_file(str(path), name, **hub)
    except OSError as error:
        raise _not_found(path, name) from error
    if found is None:
        raise _not_found(path, name)
    return found


def _not_found(path: str | Path, name: str) -> ValueError:
    return ValueError(
        f"{name} was not found at {path}; pass the folder (or Hub id) of a PEFT checkpoint, as "
        "save_pretrained of a PeftModel writes it"
    )


def _check_config(path: str | Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} is a PEFT checkpoint of type {kind}, LORA is wanted; {_WAY_OUT}")
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{path} was trained with bias={config['bias']!r}, so the base model's biases are not "
            f"the language model's; train with bias='none', or {_WAY_OUT}"
        )
    init = config.get("init_lora_weights")
    if init not in _INITS_THAT_LEAVE_THE_BASE:
        raise ValueError(
            f"{path} was started with init_lora_weights={init!r}, which changes the base weights; "
            "convert it with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            f"or {_WAY_OUT}"
        )
    for name, value in config.items():
        # Only switches that are on and non-empty tables change the forward; numbers and names are
        # parameters of switches, without effect while those are off.
        if name not in _HARMLESS and (value is True or (value and isinstance(value, (dict, list)))):
            shown = repr(value) if len(repr(value)) < 80 else "..."
            raise ValueError(f"{path} uses {name}={shown}, plain LoRA is wanted; {_WAY_OUT}")


def _check_head(
    path: str | Path, head: dict[str, Tensor], config: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    weight = head.get("weight")
    if weight is None:
        raise ValueError(
            f"{path} (task_type={config.get('task_type')}) holds no trained reward head named "
            f"{', '.join(HEAD_NAMES)}; train with task_type='SEQ_CLS', or with the head's name in "
            "modules_to_save"
        )
    if weight.dim() != 2 or weight.shape[0] != 1:
        raise ValueError(
            f"{path}: the head has shape {list(weight.shape)}, one label [1, H] is wanted; train "
            "with num_labels=1"
        )
    return weight, head.get("bias")


def _low_rank(
    path: str | Path, name: str, part: dict[str, Tensor], config: dict[str, Any]
) -> tuple[Tensor, Tensor, float]:
    missing = {"A", "B"} - set(part)
    if missing:
        raise ValueError(f"{path} lacks {name}.lora_{missing.pop()}.weight; save the adapter again")
    a, b = part["A"], part["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{path}: {name} has A of shape {list(a.shape)} and B of shape {list(b.shape)}, "
            f"[r, in] and [out, r] of a linear layer are wanted; {_WAY_OUT}"
        )
    rank = a.shape[0]
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):  # PEFT's own rule; the first match counts
            alpha = value
            break
    return a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def scaled(b: Tensor, scale: float) -> Tensor:
    """B with its scale, in float32 at least."""
    return b.to(torch.promote_types(b.dtype, torch.float32)) * scale
