"""`rgtg-fast eval`."""

from __future__ import annotations

import argparse

from .arguments import add_config

HELP = "compare ways to decode over a file of prompts"
EXAMPLE = "rgtg-fast eval --config eval.yaml limit=100"
STOPPED = "What is done is kept in output_dir: the same command goes on from there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "see help(rgtg_fast.evaluation)")


def run(args: argparse.Namespace) -> None:
    from rgtg_fast.evaluation import evaluate

    evaluate(args.config, args.overrides)
