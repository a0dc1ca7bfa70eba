"""What guides a job: rewards and presets as a command line or YAML can say them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import presets
from ..models.on_base import RewardAdapter
from ..scorers import registry
from ..scorers.endpoint import RewardEndpoint
from ..scorers.factory import same_vocabulary
from ..scorers.rewards import Reward, WeightedRewards
from ..scorers.sources import CAUSAL_KINDS
from ..training.config_file import check_keys
from . import models
from .settings import check_model, is_function, load_function

KINDS = ("classifier", *CAUSAL_KINDS, "head", "adapter", "attention_credit")
_PER_TOKEN = {
    said
    for name, kind in registry.KINDS.items()
    if kind.per_token
    for said in (name, *kind.loss_types)
}
# What a mapping has beside the key that says what it is, and beside weight and clamp.
FORMS: dict[str, tuple[str, ...]] = {
    "model": ("kind", "options", "label", "tokenizer", "method", "eos_reward"),
    "url": ("batch_size", "concurrency", "deadline", "retries", "key_env"),
    "function": (),
    "policy": ("reference",),
    "parts": ("reduction", "penalty", "offset"),
}
_OF_REWARD = {"label": "reward_label", "method": "reward_method", "eos_reward": "eos_reward"}


def check_reward(value: Any, where: str = "reward_model") -> dict[str, Any]:
    """A reward as a mapping with one of `FORMS`; texts and lists are spelt out.

    A text is a folder or hub name, an http(s) URL or `module:function`, a list a sum. Raises
    `ValueError` for what is no reward, unknown keys, and models that are not there.
    """
    if isinstance(value, str):
        value = {form_of(value): value}
    if isinstance(value, list):
        value = {"parts": value}
    forms = [form for form in FORMS if isinstance(value, dict) and form in value]
    if len(forms) != 1:
        raise ValueError(
            f"{where}={value!r}; write a folder or hub name, a URL, module:function, a list of "
            f"these, or a mapping with one of {', '.join(FORMS)}"
        )
    (form,) = forms
    check_keys(value, (form, *FORMS[form], "weight", "clamp"), f"{where}: ")
    if form == "parts":
        if not isinstance(value["parts"], list) or not value["parts"]:
            raise ValueError(f"{where}: parts={value['parts']!r}; write a list of rewards")
        parts = [check_reward(p, f"{where}[{i}]") for i, p in enumerate(value["parts"])]
        value = value | {"parts": parts}
    else:
        _check_part(form, value, where)
    return value


def form_of(reward: str) -> str:
    """Which of `FORMS` a text is."""
    if reward.startswith(("http://", "https://")):
        return "url"
    return "function" if is_function(reward) else "model"


def _check_part(form: str, value: dict[str, Any], where: str) -> None:
    names = {n: value.get(n) for n in (form, *(("reference",) if form == "policy" else ()))}
    for name, given in names.items():
        if not isinstance(given, str) or not given:
            raise ValueError(f"{where}: {name}={given!r}; write a text")
    if form == "function":
        load_function(where, value["function"])
    elif form == "url":
        RewardEndpoint(value["url"], **{n: value[n] for n in FORMS["url"] if n in value})
    else:
        for name in names.values():
            check_model(where, str(name))
            models.check_found(where, str(name))
    kind = value.get("kind", "classifier")
    if kind not in KINDS:
        raise ValueError(f"{where}: kind={kind!r}; pass one of {', '.join(KINDS)}")
    if not isinstance(value.get("options", {}), dict):
        raise ValueError(f"{where}: options={value['options']!r}; write a mapping")
    if value.get("options"):
        if kind not in registry.KINDS:
            raise ValueError(f"{where}: options={value['options']!r} do nothing with kind: {kind}")
        registry.KINDS[kind].check_options(value["options"])


def check_preset(value: Any, reward: dict[str, Any]) -> dict[str, Any]:
    """A preset as a mapping with its `name` and options. Raises `ValueError` for one that there is
    not, options that it does not have, or another number of models."""
    value = {"name": value} if isinstance(value, str) else value
    name = value.get("name") if isinstance(value, dict) else None
    if name not in presets.__all__:
        raise ValueError(f"preset={name or value!r}; name one of {', '.join(presets.__all__)}")
    make = getattr(presets, name)
    needed = _models_of(make)
    if "lm" in needed:
        raise ValueError(f"preset={name!r} needs the weights of heads; call generate_many for it")
    given = [None] * (1 if needed == ["reward_model"] else len(_names(name, reward)))
    try:
        inspect.signature(make).bind(*given, **{k: v for k, v in value.items() if k != "name"})
    except TypeError as error:
        raise ValueError(
            f"preset {name}, with {len(given)} models in reward_model: {error}; see "
            f"help(rgtg_fast.presets.{name})"
        ) from None
    return value


def preset_options(preset: dict[str, Any]) -> dict[str, Any]:
    """What a checked preset says beside its models, for which it has None."""
    make = getattr(presets, preset["name"])
    own = {name: value for name, value in preset.items() if name != "name"}
    return make(*[None] * len(_models_of(make)), **own)


def _models_of(preset: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(preset).parameters.values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty]


def _names(preset: str, reward: dict[str, Any]) -> list[str]:
    """The causal language models that stand in `reward_model` for a preset."""
    if "policy" in reward:
        return [reward["policy"], reward["reference"]]
    names = [part.get("model") for part in reward.get("parts", [reward])]
    if None in names:
        raise ValueError(
            f"preset={preset!r} takes language models; write their folders or hub names as "
            "reward_model, in the order of its arguments"
        )
    return names


@dataclass
class Loaded:
    """The language model and its tokenizer, and how to load what stands beside them.

    A reward model whose tokenizer has another vocabulary gets its own; with `tokenizer=None` all
    are taken to share the language model's.
    """

    lm: Any
    tokenizer: Any
    dtype: str
    device: str
    device_map: Any = None

    def load(self, holds: str, name: str) -> Any:
        return models.load_model(holds, name, self.dtype, self.device, self.device_map)


def guiding_options(
    reward: dict[str, Any], preset: dict[str, Any] | None, options: dict[str, Any], loaded: Loaded
) -> dict[str, Any]:
    """The options of `generate_many`: the preset's, and over them `options`, the job's own."""
    if preset is None:
        return {"reward_model": _reward(reward, loaded, options), **options}
    make = getattr(presets, preset["name"])
    own = {k: v for k, v in preset.items() if k != "name"}
    if _models_of(make) == ["reward_model"]:
        given = [_reward(reward, loaded, options)]
    else:
        given = [loaded.load("CausalLM", name) for name in _names(preset["name"], reward)]
    return make(*given, **own) | options


def per_token(reward: dict[str, Any], options: dict[str, Any]) -> bool | None:
    """Whether an answer's reward is the sum over its tokens, and not that of the last; None for a
    sum of both kinds, which gives an answer no reward. `options` as `guiding_options` gives."""
    if "reward_kind" in options:
        return options["reward_kind"] in _PER_TOKEN
    found = {part.get("kind") in _PER_TOKEN for part in _leaves(reward)}
    return found.pop() if len(found) == 1 else None


def identities(reward: dict[str, Any]) -> dict[str, Any]:
    """The reward with what tells its models and functions from others of the same names."""
    names = ("model", "function", "policy", "reference", "tokenizer")
    known = {n: models.identity(v) if n in names else v for n, v in reward.items()}
    if "parts" in reward:
        known["parts"] = [identities(part) for part in reward["parts"]]
    if "url" in reward:
        known["url"] = models.digest(reward["url"])  # it is written down, and may hold a key
    return known


def _leaves(reward: dict[str, Any]) -> list[dict[str, Any]]:
    return [leaf for part in reward.get("parts", ()) for leaf in _leaves(part)] or [reward]


def _reward(reward: dict[str, Any], loaded: Loaded, options: dict[str, Any]) -> Any:
    """What `generate` takes as `reward_model`."""
    own = {n: reward[n] for n in ("reduction", "penalty", "offset") if n in reward}
    if "parts" in reward:
        parts = [_reward(part, loaded, {}) for part in reward["parts"]]
        weights = [part.get("weight", 1.0) for part in reward["parts"]]
        made: Any = WeightedRewards(parts, weights, bounds=reward.get("clamp"), **own)
        return made
    if "url" in reward:
        made = RewardEndpoint(reward["url"], **{n: reward[n] for n in FORMS["url"] if n in reward})
    elif "function" in reward:
        made = load_function("reward_model", reward["function"])
    elif "policy" in reward:
        made = tuple(loaded.load("CausalLM", reward[n]) for n in ("policy", "reference"))
    else:
        made = _model(reward, loaded, options)
    if "clamp" in reward:
        return WeightedRewards([made], bounds=reward["clamp"])
    return made


def _model(reward: dict[str, Any], loaded: Loaded, options: dict[str, Any]) -> Any:
    name, kind = reward["model"], reward.get("kind", options.get("reward_kind", "classifier"))
    said = {given: reward[own] for own, given in _OF_REWARD.items() if own in reward}
    if kind == "adapter":
        return _said(RewardAdapter.from_pretrained(loaded.lm, name), said)
    if kind in CAUSAL_KINDS:
        _own_tokenizer(reward, loaded, shared=True)
        return Reward(loaded.load("CausalLM", name), reward_kind=kind, **said)
    if kind != "head":
        tokenizer = _own_tokenizer(reward, loaded, shared=kind != "classifier")
        said |= {} if tokenizer is None else {"reward_tokenizer": tokenizer}
    made = registry.load_guide(kind, name, loaded.load, loaded.lm, **reward.get("options", {}))
    return _said(made, said)


def _said(made: Any, options: dict[str, Any]) -> Any:
    return Reward(made, **options) if options else made


def _own_tokenizer(reward: dict[str, Any], loaded: Loaded, shared: bool) -> Any:
    """The reward model's tokenizer where its vocabulary is another; `shared`: it must not be."""
    if loaded.tokenizer is None:
        return None
    name = reward.get("tokenizer", reward["model"])
    if "tokenizer" not in reward and not _has_tokenizer(name):
        raise ValueError(
            f"reward_model={name!r} has no tokenizer; write a mapping with model: and tokenizer: "
            "(that of the language model, where it shares its token ids)"
        )
    tokenizer = models.load_tokenizer(name)
    if same_vocabulary(loaded.tokenizer, tokenizer):
        return None
    if shared:
        raise ValueError(
            f"reward_model={reward['model']!r} has another vocabulary than the language model, and "
            f"kind: {reward.get('kind')} shares its token ids; pass one with the same tokenizer"
        )
    return tokenizer


def _has_tokenizer(name: str) -> bool:
    path = Path(name)
    return not path.is_dir() or any(path.glob("tokenizer*")) or any(path.glob("*vocab*"))
