"""Tokenizers first, weights later: what an evaluation loads, and from where."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError

from ..scorers import registry
from ..scorers.factory import same_vocabulary
from ..training.settings import missing_base, missing_base_error
from .settings import CONFIGS, Run, Settings


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name, ready for left-padded batches. Raises `ValueError`
    naming it where there is none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left")
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {name!r} cannot be loaded ({error}); save one to that folder"
        ) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name} has neither padding nor EOS; set one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def device_of(name: str) -> torch.device:
    """The device asked for; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}; write auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} but torch sees no GPU; write cpu or auto")
    return device


def load_lm(settings: Settings, tokenizer: Any) -> Any:
    """The base policy. Its folder's sampling defaults (temperature, top-p, penalties) are dropped:
    the base is the model's own distribution."""
    lm = load_model("CausalLM", settings.model, settings.dtype, settings.device)
    eos = lm.generation_config.eos_token_id
    lm.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=lm.generation_config.bos_token_id,
    )
    return lm


def load_classifier(name: str, settings: Settings) -> Any:
    """A reward model with one label; raises `ValueError` for one with several."""
    model = load_model("SequenceClassification", name, settings.dtype, settings.device)
    if model.config.num_labels != 1:
        raise ValueError(f"{name!r} gives {model.config.num_labels} labels; pass a model with one")
    return model


def load_guide(run: Run, lm: Any, settings: Settings) -> Any:
    """What `rgtg_fast.generate` takes as `reward_model` for this run."""
    assert run.reward_model is not None

    def load(holds: str, name: str) -> Any:
        if holds == "SequenceClassification":
            return load_classifier(name, settings)
        return load_model(holds, name, settings.dtype, settings.device)

    try:
        return registry.load_guide(run.kind, run.reward_model, load, lm, **run.options)
    except TypeError as error:
        if not run.options:
            raise
        raise ValueError(f"run {run.name}: options={run.options!r}: {error}") from None


def reward_tokenizer(run: Run, tokenizer: Any) -> Any:
    """The guide's tokenizer where its vocabulary is not that of the language model, else None.

    Raises `ValueError` where the guide is of a kind that needs the language model's.
    """
    assert run.reward_model is not None
    kind = registry.KINDS[run.kind]
    if kind.holds == "head":
        return None
    try:
        own = load_tokenizer(run.reward_model)
    except ValueError as error:
        raise ValueError(f"run {run.name}: reward_model: {error}") from None
    if same_vocabulary(tokenizer, own):
        return None
    if not kind.is_model:
        raise ValueError(
            f"run {run.name}: reward_model={run.reward_model!r} has another vocabulary than the "
            f"language model, and kind: {run.kind} shares its token ids; pass a guide trained with "
            "the language model's tokenizer"
        )
    return own


def check_found(key: str, name: str) -> None:
    """Raises `ValueError` for a name that is neither a folder nor found on the hub."""
    if Path(name).is_dir():
        return
    error: OSError | None = None
    for file in CONFIGS:
        try:
            hf_hub_download(name, file)
            return
        except RemoteEntryNotFoundError as absent:  # no config.json: it may be an adapter
            error = absent
        except OSError as failed:
            error = failed
            break
    said = str(error).strip().split("\n")[0]
    raise ValueError(
        f"{key}: there is no folder {name!r}, and the hub gave nothing of that name ({said}); mend "
        "the path or the name"
    )


def check_guide(run: Run) -> None:
    """Raises `ValueError` where the folder's files say that the guide is of another kind."""
    assert run.reward_model is not None
    key, folder = f"run {run.name}: reward_model", Path(run.reward_model)
    holds = registry.KINDS[run.kind].holds
    if holds == "SequenceClassification":
        check_classifier(key, run.reward_model)
    wanted = (registry.HEAD_FILE,) if holds == "head" else CONFIGS
    if folder.is_dir() and not any((folder / file).is_file() for file in wanted):
        raise ValueError(
            f"{key}={run.reward_model!r} has no {wanted[0]}, which kind: {run.kind} needs; pass "
            "another folder, or the kind that it is"
        )


def check_classifier(key: str, name: str) -> None:
    """Raises `ValueError` where the folder's configuration says that it is no reward model."""
    path = Path(name) / "config.json"
    if not path.is_file():
        return
    config = transformers.AutoConfig.from_pretrained(name)
    classifier = any("SequenceClassification" in n for n in config.architectures or ())
    if not classifier or config.num_labels != 1:
        what = ", ".join(config.architectures or ["unknown"])
        guide = key.endswith("reward_model") and what.endswith("ForCausalLM")
        kinds = ", or say its kind (autoregressive, vocab, rewriting)" if guide else ""
        raise ValueError(
            f"{key}={name!r} is {what} with {config.num_labels} labels; pass a sequence classifier "
            f"with one label{kinds}"
        )


def load_model(task: str, name: str, dtype: str, device: str, device_map: Any = None) -> Any:
    """The model that AutoModelFor`task` loads from a folder or by a hub name, ready for inference;
    in the dtype that it was saved in with "auto"; over several devices where `device_map` says so,
    as transformers has it. Raises `ValueError` for one that cannot be loaded, or whose file lacks
    weights: transformers would draw them at random with no more than a warning."""
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if device_map is not None:
        options["device_map"] = device_map
    adapter = (Path(name) / "adapter_config.json").is_file()
    missing: Any = ()
    try:
        if adapter:
            import peft

            if task == "SequenceClassification":
                options["num_labels"] = 1
            model = getattr(peft, f"AutoPeftModelFor{task}").from_pretrained(name, **options)
            kept = peft.load_peft_weights(name, device="cpu")
            missing = sorted(set(peft.get_peft_model_state_dict(model)) - set(kept))
        else:
            model, info = getattr(transformers, f"AutoModelFor{task}").from_pretrained(
                name, output_loading_info=True, **options
            )
            missing = sorted(info["missing_keys"])
    except (ImportError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        base = missing_base(name)
        if base is not None:
            raise ValueError(missing_base_error(repr(name), base)) from None
        raise ValueError(f"{name!r} cannot be loaded ({error})") from None
    if missing:
        saved = ", ".join(getattr(model.config, "architectures", None) or [])
        causal = task == "SequenceClassification" and saved.endswith("ForCausalLM")
        way = f"it was saved as {saved}: say its kind" if causal else "pass a whole model"
        raise ValueError(
            f"{name!r} lacks {len(missing)} of the weights of {type(model).__name__} "
            f"({', '.join(missing[:3])}); they would be random: {way}"
        )
    return (model if device_map is not None else model.to(device_of(device))).eval()


def identity(name: str) -> list[Any]:
    """What tells a model or function from another of the same name: its files' sizes and times."""
    path = Path(name)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".bin"))
        return [str(path.resolve()), *([p.name, *_stamp(p)] for p in files)]
    loaded = sys.modules.get(name.partition(":")[0])
    source = getattr(loaded, "__file__", None)
    return [name, *([_stamp(Path(source))] if source else [])]


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def digest(value: Any) -> str:
    """Ten hex digits that stand for a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
