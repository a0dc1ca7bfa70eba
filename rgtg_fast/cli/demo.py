"""`rgtg-fast demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .arguments import whole

HELP = "guide the embedded models and compare"
EXAMPLE = "rgtg-fast demo --prompts 20 --out demo_output"
STOPPED = "Nothing is kept; give the same command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", type=whole(1, 200), default=200, help="held-out prompts, 1 to 200"
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of the files")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")


def run(args: argparse.Namespace) -> None:
    from rgtg_fast.demo.run import run_demo

    # The models are so small that with threads the demo is slower, on a busy machine many times.
    torch.set_num_threads(1)
    run_demo(prompts=args.prompts, out=args.out, seed=args.seed, draw=not args.no_plot)
