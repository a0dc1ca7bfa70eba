"""`rgtg-fast train`."""

from __future__ import annotations

import argparse

from .arguments import add_config

HELP = "train a reward model for partial sequences"
EXAMPLE = "rgtg-fast train --config train.yaml learning_rate=2e-5"
STOPPED = (
    "The same command with resume=true (on-policy rounds: as it is) goes on from the last "
    "checkpoint in output_dir; save_steps says how often one is kept"
)
KEYS = (
    "model, train, eval or hold_out, output_dir, loss_type, tokenizer, dtype, lora, frozen, l2, "
    "resume, overwrite, on_policy (help(rgtg_fast.on_policy)), and every field of "
    "rgtg_fast.training.PrefixRewardConfig, which has those of transformers.TrainingArguments; an "
    "example is in help(rgtg_fast.training)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, KEYS)
    parser.add_argument(
        "--on-policy",
        nargs="*",
        metavar="key=value",
        help="rounds of training on answers of the guided policy, instead of the values in "
        "the file's mapping on_policy; see help(rgtg_fast.on_policy)",
    )


def run(args: argparse.Namespace) -> None:
    from rgtg_fast.training.config_file import read_overrides, read_yaml
    from rgtg_fast.training.run import train

    values = read_yaml(args.config, args.overrides)
    if args.on_policy is None and "on_policy" not in values:
        train(args.config, args.overrides)
        return
    from rgtg_fast.on_policy import train_on_policy

    own = values.get("on_policy") or {}
    if args.on_policy and isinstance(own, dict):
        values["on_policy"] = own | read_overrides(args.on_policy)
    train_on_policy(values)
