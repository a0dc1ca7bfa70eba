"""Command line: `rgtg-fast <command>`, a module for each.

A command's module has `HELP`, `EXAMPLE`, `STOPPED` (what to say after Ctrl-C or on a full disk),
`add_arguments(parser)` and `run(args)`. `python -m rgtg_fast` is the same as `rgtg-fast`.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch
from safetensors import SafetensorError

import rgtg_fast
from rgtg_fast.jobs import JobFailed
from rgtg_fast.ops import BackendUnavailable

from . import bench, demo, eval, generate, gpu_report, info, plan, select_pairs, serve, train

COMMANDS: dict[str, Any] = {
    "demo": demo,
    "info": info,
    "bench": bench,
    "train": train,
    "eval": eval,
    "select-pairs": select_pairs,
    "generate": generate,
    "plan": plan,
    "serve": serve,
    "gpu-report": gpu_report,
}
logger = logging.getLogger("rgtg_fast")
# Errors that a user can mend are said in one line; any other is a bug and keeps its traceback.
_OF_INPUT = (ValueError, BackendUnavailable)
_OF_RUN = (
    OSError,
    ImportError,
    MemoryError,
    SafetensorError,
    torch.OutOfMemoryError,
    JobFailed,
)
_BAD_INPUT, _FAILED, _INTERRUPTED = 2, 1, 130  # argparse's exit status, and a shell's for SIGINT


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="rgtg-fast",
        description="Reward-guided text generation, fast.",
        epilog="rgtg-fast <command> --help has an example.",
    )
    top.add_argument("--version", action="version", version=f"rgtg-fast {rgtg_fast.__version__}")
    _add_verbose(top)
    commands = top.add_subparsers(required=True, dest="command", metavar=" | ".join(COMMANDS))
    for name, command in COMMANDS.items():
        does = command.HELP
        own = commands.add_parser(
            name,
            help=does,
            description=f"{does[0].upper()}{does[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(own)
        _add_verbose(own)
        more = [textwrap.fill(own.epilog, 96)] if own.epilog else []
        own.epilog = "\n\n".join([*more, f"example:\n  {command.EXAMPLE}"])
    return top


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    # Of the command's own parser a default would stand over what stood ahead of the command.
    parser.add_argument(
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="log more, and show where errors come from",
    )


def main(argv: list[str] | None = None) -> None:
    """Run one command; `argv` defaults to the process's own arguments.

    Raises `SystemExit`: 2 with one line for arguments and input that cannot be used, 1 with one
    line for everything else that the user can mend, 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    verbose = getattr(args, "verbose", False)
    with _logged(verbose):
        try:
            COMMANDS[args.command].run(args)
        except KeyboardInterrupt as stop:
            stopped = str(stop) or f"stopped. {COMMANDS[args.command].STOPPED}"
            raise _ended(_INTERRUPTED, f"\n{args.command}: {stopped}") from None
        except BrokenPipeError:  # whoever reads the output has closed it, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(_FAILED) from None
        except (*_OF_INPUT, *_OF_RUN) as error:
            logger.debug("%s:", args.command, exc_info=True)
            said = _said(error, COMMANDS[args.command].STOPPED)
            code = _BAD_INPUT if isinstance(error, _OF_INPUT) else _FAILED
            raise _ended(code, f"{args.command}: {said}") from None


def _ended(code: int, said: str) -> SystemExit:
    """The end with an exit status of `code`, and what has been said of it."""
    print(said, file=sys.stderr)
    end = SystemExit(said)
    end.code = code  # of a text Python would print it again, and end with 1
    return end


class _Stderr(logging.StreamHandler):
    """To standard error as it is at the time: a progress bar puts its own in its place."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """It is always standard error."""


@contextmanager
def _logged(verbose: bool) -> Iterator[None]:
    """The package's log on standard error, for the time of a command."""
    handler = _Stderr()
    if verbose:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _said(error: BaseException, stopped: str) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" for {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; make room. {stopped}"
    said = " ".join(str(error).split()) or type(error).__name__
    return f"{said}. {stopped}" if isinstance(error, JobFailed) else said
