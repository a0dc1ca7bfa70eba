"""`rgtg-fast train`."""

from __future__ import annotations

import argparse

from .arguments import add_config

HELP = "train a reward model for partial sequences"
EXAMPLE = "rgtg-fast train --config train.yaml learning_rate=2e-5"
STOPPED = (
    "The same command with resume=true goes on from the last checkpoint in output_dir; save_steps "
    "says how often one is kept"
)
KEYS = (
    "model, train, eval or hold_out, output_dir, loss_type, tokenizer, dtype, lora, frozen, l2, "
    "resume, overwrite, and every field of rgtg_fast.training.PrefixRewardConfig, which has those "
    "of transformers.TrainingArguments; an example is in help(rgtg_fast.training)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, KEYS)


def run(args: argparse.Namespace) -> None:
    from rgtg_fast.training.run import train

    train(args.config, args.overrides)
