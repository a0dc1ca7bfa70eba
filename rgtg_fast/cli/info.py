"""`rgtg-fast info`."""

from __future__ import annotations

import argparse

import rgtg_fast

HELP = "versions and which backends work here"
EXAMPLE = "rgtg-fast info"
STOPPED = "Give the same command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace) -> None:
    rgtg_fast.show_config()
