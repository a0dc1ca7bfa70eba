"""`rgtg-fast generate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import finite, positive, whole

HELP = "answer a file of prompts, guided by a reward"
STOPPED = "What is answered is in the output file: the same command goes on from there"
EXAMPLE = (
    "rgtg-fast generate --model lm --reward-model rm --input prompts.jsonl --output answers.jsonl "
    "--beta 2 --do-sample --max-new-tokens 64"
)


def _k(text: str) -> int | None:
    return None if text == "none" else whole(1, 64)(text)


def _label(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Flags and key=value stand over the file of --config. Its keys are the flags with _ for -, "
        "and every option of rgtg_fast.generate_many (top_p, kl_budget, reward_range, ..); "
        "reward_model may be a mapping or a list, see help(rgtg_fast.jobs.settings.Job). "
        'Input: {"id", "prompt": text or messages} a line, and if need be beta, temperature, '
        'max_new_tokens, seed of its own. Output: {"id", "text", "tokens", "reward", "kl"} a line, '
        'or {"id", "error"}. A run that was killed goes on with the same command.'
    )

    def add(name: str, help: str, **how: Any) -> None:
        parser.add_argument(name, help=help, default=argparse.SUPPRESS, **how)

    add("--config", "YAML file of the job", type=Path)
    add("--model", "causal language model: folder or hub name")
    add("--reward-model", "folder, hub name, http(s) URL or module:function; again for a sum",
        action="append")  # fmt: skip
    add("--weight", "of each --reward-model", type=finite, action="append")
    add("--reward-kind", "of a causal language model as reward model: genarm, farma, ..")
    add("--reward-label", "of a reward model with several labels: a name or an index", type=_label)
    add("--preset", "a published decoder: a name of rgtg_fast.presets")
    add("--input", "JSONL file; - is standard input")
    add("--output", "JSONL file; - is standard output")
    add("--tokenizer", "of the language model, where its folder has none")
    add("--k", "candidates a token, 1 to 64; none: the whole vocabulary (default: 10)", type=_k)
    add("--beta", "weight of the reward (default: 1)", type=finite)
    add("--temperature", "of the guided policy", type=positive)
    add("--do-sample", "draw; without it the best token is taken",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--max-new-tokens", "of an answer (default: 128)", type=whole(1))
    add("--batch-size", "rows at a time (default: 16)", type=whole(1))
    add("--seed", "of all draws (default: 0)", type=whole(0))
    add("--dtype", "auto, float32, bfloat16 or float16 (default: auto, as saved)")
    add("--device", "default: a GPU where there is one")
    add("--reward-device", "of the reward models, where it is another")
    add("--device-map", "for models larger than a GPU: auto spreads their layers, as transformers")
    add("--shard", "i/n: every n-th prompt from the i-th (0 to n-1), to a file of its own; "
        "default: torchrun's rank")  # fmt: skip
    add("--engine", "who runs the models: hf, vllm, or ray over a cluster (default: hf)")
    add("--workers", "of --engine ray: actors (default: one for each GPU)", type=whole(1))
    add("--worker-engine", "of --engine ray: what runs in an actor, hf or vllm (default: hf)")
    add("--report", "folder for the distribution of rewards, KL and lengths")
    add("--inspect", "HTML file that shows the first 8 answers token by token")
    add("--overwrite", "begin anew where the output has lines", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in the YAML file")


def run(args: argparse.Namespace) -> None:
    from rgtg_fast.jobs.run import run_job

    run_job(values_of(args))


def values_of(args: argparse.Namespace) -> dict[str, Any]:
    """The job's mapping: the YAML file, then flags, then overrides."""
    from rgtg_fast.evaluation.rewards import form_of
    from rgtg_fast.training.config_file import read_overrides, read_yaml

    given = {k: v for k, v in vars(args).items() if k not in ("command", "overrides", "verbose")}
    values = read_yaml(given.pop("config")) if "config" in given else {}
    weights = given.pop("weight", None)
    models = given.get("reward_model")
    if weights is not None:
        if len(weights) != len(models or ()):
            raise ValueError(
                f"--weight is given {len(weights)} times, and --reward-model "
                f"{len(models or ())} times; give one for each"
            )
        pairs = zip(models or (), weights, strict=True)
        given["reward_model"] = [{form_of(m): m, "weight": w} for m, w in pairs]
    elif models is not None and len(models) == 1:
        given["reward_model"] = models[0]
    return values | given | (read_overrides(args.overrides) if args.overrides else {})
