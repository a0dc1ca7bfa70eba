"""`rgtg-fast gpu-report`: everything that needs a GPU, measured step by step, and what it showed.

`steps` says what is run, `runner` runs a step in a process of its own, `lines` holds every figure
that was wanted of a GPU and reads what was got, `page` writes them down.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..arguments import positive

HELP = "build, test, measure and check on a GPU; a page of what was wanted and got"
EXAMPLE = "rgtg-fast gpu-report --out report --budget 3600"
STOPPED = "The same command with --resume goes on after the last finished step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .steps import STEPS

    groups = list(dict.fromkeys(step.group for step in STEPS))
    parser.epilog = f"Steps, in order: {', '.join(groups)}. A step's own name is in the report."
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for records, raw figures and the report")
    add("--only", nargs="+", metavar="STEP", help="these steps, or groups of them, and anew")
    add("--resume", action="store_true", help="keep what has ended there, run the rest")
    add("--timeout", type=positive, help="seconds for every step (default: each its own limit)")
    add("--budget", type=positive, help="seconds in all; what is not expected to fit is skipped")
    add("--dry-run", action="store_true", help="each step at tiny sizes on the CPU")


def run(args: argparse.Namespace) -> None:
    import torch

    from . import page
    from .runner import folder_of, locked, run_steps, source_tree
    from .steps import chosen

    steps = chosen(args.only)
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device; pass --dry-run to try the steps on the CPU")
    out = folder_of(args.out, args.dry_run, keep=args.resume or bool(args.only))
    tree = source_tree()
    print(f"source tree: {tree or 'none here, so steps that need one are skipped'}", flush=True)
    deadline = time.monotonic() + args.budget if args.budget else None
    with locked(out), _terminated_like_interrupted():
        try:
            run_steps(
                steps, out, tree, args.dry_run,
                resume=args.resume and not args.only, timeout=args.timeout, deadline=deadline,
            )  # fmt: skip
        except KeyboardInterrupt:
            print(f"\n{page.write(out)}: what there is until here", file=sys.stderr)
            raise
        print(page.write(out))
    bad = page.failures(out)
    if bad:
        raise SystemExit(f"gpu-report: {len(bad)} steps without success: {', '.join(bad)}")


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, which a time limit around this program sends, leaves a report too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
