"""`rgtg-fast select-pairs`."""

from __future__ import annotations

import argparse

from .arguments import add_config

HELP = "of many unlabelled pairs, those most worth a label"
EXAMPLE = "rgtg-fast select-pairs --config pairs.yaml"
STOPPED = "Nothing is kept; give the same command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "see help(rgtg_fast.training.experimental.select_pairs)")


def run(args: argparse.Namespace) -> None:
    from rgtg_fast.training.experimental.select_pairs import select_pairs

    select_pairs(args.config, args.overrides)
