"""Options of the plug-in: those of the engine, and those of one request."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from .. import presets
from ..decode import options
from ..decode.options import integer
from ..scorers.factory import EOS_REWARDS, METHODS
from ..scorers.sources import CAUSAL_KINDS

DRAWS = ("rgtg", "vllm")
MOST_CANDIDATES = 64
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_OF_REQUEST: tuple[str, ...] = ("rgtg", "rgtg_k", "rgtg_beta", "rgtg_preset", "rgtg_draw")
_OF_REQUEST += ("rgtg_seed", "rgtg_row_seed", "rgtg_number")
# Of one request: those that are of any reward. The others change the reward, or need models.
PRESETS = ("pargs", "pargs_greedy", "args", "args_stochastic")
# Kinds that a logits processor cannot have, and why.
_OF_STATES = "is of the language model's hidden states, which vLLM does not show"
NOT_SERVED = {"head": _OF_STATES, "adapter": _OF_STATES}
NOT_SERVED |= {"seq2seq": "rewrites a draft of each prompt, and there is none"}


@dataclass(frozen=True)
class Settings:
    """The engine's: `--additional-config '{"rgtg": {...}}'`.

    Args:
        reward_model: folder or hub name of a classifier, or of a causal language model with
            `reward_kind`; a pair [policy, reference] of those (DPO's implicit reward); the
            http(s):// URL of a server that scores texts, or `module:function` of texts; or a
            mapping as in the YAML of a job (see `evaluation.rewards.check_reward`), sums too:
            {"parts": [{"model": "a", "weight": 0.7}, {"model": "b", "clamp": [-3, 3]}]}.
        reward_kind, reward_label, reward_method, eos_reward: as in `rgtg_fast.generate`.
        preset: a name of `rgtg_fast.presets`, or a mapping of `name` and its options: how the
            reward is made, and k and beta where these are not given. The temperature is a
            request's, 0 for a greedy preset.
        k: candidates of a request that does not say `rgtg_k`; 10 if left out.
        beta: of a request that does not say `rgtg_beta`; 1.0 if left out.
        guide: whether requests that do not say `rgtg` are guided.
        dtype: the reward model's; "auto" is the language model's.
        draw: "rgtg": requests with a seed, and greedy ones, get the tokens that `generate` gives;
            "vllm": all are drawn by vLLM's sampler, as requests without a seed are in any case.
        kv_gib: memory for the keys and values of the reward model, GiB on each GPU.
        steps: a file to which reward and KL of each token drawn with "rgtg" are appended, of the
            requests that have an `rgtg_number`; see `steps.StepReader`.
    """

    reward_model: Any
    reward_kind: str | None = None
    reward_label: Any = None
    reward_method: str = "auto"
    eos_reward: str = "auto"
    preset: Any = None
    k: int | None = None
    beta: float | None = None
    guide: bool = True
    dtype: str = "auto"
    draw: str = "rgtg"
    kv_gib: float = 2.0
    steps: str | None = None


@dataclass(frozen=True)
class Guidance:
    """What one request asks for; None is what the engine's settings say."""

    guide: bool | None = None
    k: int | None = None
    beta: float | None = None
    seed: int | None = None
    draw: str | None = None
    row_seed: int | None = None
    number: int | None = None


def settings_of(additional_config: Any) -> Settings:
    """The engine's settings; `ValueError` names a key that is unknown, missing or out of range."""
    given = additional_config.get("rgtg") if isinstance(additional_config, Mapping) else None
    if not isinstance(given, Mapping):
        raise ValueError(
            f'additional_config["rgtg"] is {given!r}; start vLLM with --additional-config '
            '\'{"rgtg": {"reward_model": "...", "k": 10}}\''
        )
    known = [field.name for field in fields(Settings)]
    _check_names('additional_config["rgtg"]', given, known)
    reward = given.get("reward_model")
    if not reward or (isinstance(reward, (list, tuple)) and len(reward) != 2):
        raise ValueError(
            f"reward_model={reward!r}; write the folder or hub name of a reward model, a list of "
            'two (policy, reference), an http(s):// URL, or {"parts": [..]} for a sum'
        )
    settings = Settings(**given)
    wanted: dict[str, tuple[str, ...]] = {
        "reward_method": METHODS,
        "eos_reward": EOS_REWARDS,
        "dtype": _DTYPES,
        "draw": DRAWS,
    }
    if settings.reward_kind is not None:
        wanted["reward_kind"] = tuple(kind for kind in CAUSAL_KINDS if kind not in NOT_SERVED)
    options.choices(vars(settings), wanted)
    options.flags({"guide": settings.guide})
    if settings.k is not None:
        integer("k", settings.k, 1, MOST_CANDIDATES)
    if settings.beta is not None:
        _number("beta", settings.beta)
    if settings.steps is not None and not isinstance(settings.steps, str):
        raise ValueError(f"steps={settings.steps!r}; write the path of a file")
    if _number("kv_gib", settings.kv_gib) <= 0:
        raise ValueError(f"kv_gib={settings.kv_gib}; write the GiB to keep for it, above 0")
    return _with_reward(settings)


def _with_reward(settings: Settings) -> Settings:
    """The settings with reward and preset as mappings, checked as those of a job."""
    from ..evaluation.rewards import check_preset, check_reward  # not needed by vLLM's front end

    given, preset = settings.reward_model, settings.preset
    if isinstance(given, (list, tuple)):
        given = {"policy": given[0], "reference": given[1]}
    reward = check_reward(given)
    for leaf in leaves(reward):
        if leaf.get("kind") in NOT_SERVED:
            raise ValueError(
                f"reward_model: kind={leaf['kind']!r} {NOT_SERVED[leaf['kind']]}; use it with "
                "rgtg_fast.generate or `rgtg-fast generate`"
            )
    if preset is not None:
        preset = check_preset(preset, reward)
    return replace(settings, reward_model=reward, preset=preset)


def leaves(reward: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rewards that a checked one is made of."""
    return [leaf for part in reward.get("parts", ()) for leaf in leaves(part)] or [reward]


def guidance_of(params: Any) -> Guidance:
    """What a request asks for in `extra_args` (HTTP: `vllm_xargs`); `ValueError` for what cannot be
    done, which vLLM answers with status 400."""
    given = params.extra_args or {}
    own = {name: value for name, value in given.items() if str(name).split("_")[0] == "rgtg"}
    _check_names("extra_args", own, _OF_REQUEST)
    own = {name: value for name, value in own.items() if value is not None}
    found = Guidance(guide=_flag("rgtg", own.get("rgtg")))
    if found.guide is False:
        return found
    if "rgtg_k" in own:
        integer("rgtg_k", own["rgtg_k"], 1, MOST_CANDIDATES)
    if "rgtg_beta" in own:
        _number("rgtg_beta", own["rgtg_beta"])
    for name in own.keys() & {"rgtg_seed", "rgtg_row_seed", "rgtg_number"}:
        integer(name, own[name], -(2**63), 2**63 - 1)
        if params.n > 1:
            raise ValueError(
                f"{name}={own[name]} with n={params.n} would be that of {params.n} answers; pass "
                "seed=, of which each answer gets its own"
            )
    if "rgtg_seed" in own and "rgtg_row_seed" in own:
        raise ValueError("rgtg_seed and rgtg_row_seed say the same; leave one of them out")
    if own.get("rgtg_draw", DRAWS[0]) not in DRAWS:
        raise ValueError(f"rgtg_draw={own['rgtg_draw']!r}; pass one of {', '.join(DRAWS)}")
    preset = _preset(own["rgtg_preset"], params) if "rgtg_preset" in own else {}
    seeds = params.seed, own.get("rgtg_seed"), own.get("rgtg_row_seed")
    seeded = any(seed is not None for seed in seeds) or params.temperature == 0
    if own.get("rgtg_draw") == "rgtg" and not seeded:
        raise ValueError('rgtg_draw="rgtg" draws with a seed, and there is none; pass seed=')
    return Guidance(
        found.guide,
        own.get("rgtg_k", preset.get("k")),
        own.get("rgtg_beta", preset.get("beta")),
        own.get("rgtg_seed"),
        own.get("rgtg_draw"),
        own.get("rgtg_row_seed"),
        own.get("rgtg_number"),
    )


def _preset(name: Any, params: Any) -> dict[str, Any]:
    """The options of the preset. What it draws with, which `SamplingParams` says too, must be the
    same there."""
    if name not in PRESETS:
        raise ValueError(
            f"rgtg_preset={name!r}; pass one of {', '.join(PRESETS)} (another one is of the "
            "engine: preset in --additional-config)"
        )
    preset = getattr(presets, name)(None)
    sampled = {"temperature": preset.get("temperature"), "top_p": 1.0}
    wanted = sampled if preset["do_sample"] else {"temperature": 0.0}
    for option, value in wanted.items():
        if getattr(params, option) != value:
            raise ValueError(
                f"rgtg_preset={name!r} is at {option}={value}, and the request's is "
                f"{getattr(params, option)}; pass {option}={value}, or rgtg_k and rgtg_beta "
                "instead of the preset"
            )
    if preset["do_sample"] and params.top_k > 0:
        raise ValueError(
            f"rgtg_preset={name!r} cuts nothing, and the request has top_k={params.top_k}; pass "
            "top_k=0, or rgtg_k and rgtg_beta instead of the preset"
        )
    return preset


def check_penalties(params: Any, guidance: Guidance) -> None:
    """Refuse what vLLM does to the logits behind the plug-in, where the token is drawn in it."""
    if guidance.guide is False or guidance.draw == "vllm":
        return
    none = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    asked = {name: getattr(params, name) for name in none if getattr(params, name) != none[name]}
    seeds = params.seed, guidance.seed, guidance.row_seed
    if asked and (any(seed is not None for seed in seeds) or params.temperature == 0):
        said = ", ".join(f"{name}={value}" for name, value in asked.items())
        raise ValueError(
            f"{said} would not change a guided request that is greedy or has a seed: its token is "
            'drawn before penalties; leave it out, or pass rgtg_draw="vllm", and the penalties '
            "are applied to log π + β r"
        )


def check_engine(vllm_config: Any) -> None:
    """Refuse an engine whose tokens the reward model would not see."""
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "speculative decoding draws tokens that the reward model has not seen; start vLLM "
            "without --speculative-config"
        )
    if vllm_config.model_config.enable_prompt_embeds:
        raise ValueError(
            "prompts of embeddings have no tokens for the reward model; start vLLM without "
            "--enable-prompt-embeds"
        )


def _check_names(where: str, given: Iterable[Any], known: Iterable[str]) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
            raise ValueError(f"{where} has the unknown key {name!r}; {hint}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}; pass a finite number")
    return float(value)


def _flag(name: str, value: Any) -> bool | None:
    """HTTP's `vllm_xargs` knows no booleans: 0, 1, "true" and "false" stand in for them."""
    if value is None or isinstance(value, bool):
        return value
    said = {"0": False, "1": True, "false": False, "true": True}.get(str(value).lower())
    if said is None:
        raise ValueError(f"{name}={value!r}; pass true or false")
    return said
