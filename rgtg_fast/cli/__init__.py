"""Command line: `rgtg-fast <command>`, a module for each.

A command's module has `HELP`, `STOPPED` (what to say after Ctrl-C or on a full disk),
`add_arguments(parser)` and `run(args)`. `python -m rgtg_fast` is the same as `rgtg-fast`.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from typing import Any

import torch
from safetensors import SafetensorError

from rgtg_fast.ops import BackendUnavailable

from . import bench, demo, eval, gpu_report, info, select_pairs, serve, train

COMMANDS: dict[str, Any] = {
    "demo": demo,
    "info": info,
    "bench": bench,
    "train": train,
    "eval": eval,
    "select-pairs": select_pairs,
    "serve": serve,
    "gpu-report": gpu_report,
}
# Errors that a user can mend are said in one line; any other is a bug and keeps its traceback.
_FORESEEN = (
    ValueError,
    OSError,
    ImportError,
    MemoryError,
    SafetensorError,
    BackendUnavailable,
    torch.OutOfMemoryError,
)
_INTERRUPTED = 130  # a shell's exit status for SIGINT


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="rgtg-fast", description="Reward-guided text generation, fast."
    )
    commands = top.add_subparsers(required=True, dest="command", metavar=" | ".join(COMMANDS))
    for name, command in COMMANDS.items():
        does = command.HELP
        command.add_arguments(
            commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        )
    return top


def main(argv: list[str] | None = None) -> None:
    """Run one command; `argv` defaults to the process's own arguments.

    Raises `SystemExit`: 2 for arguments that cannot be parsed, 1 with one line for everything else
    that the user can mend, 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    command = COMMANDS[args.command]
    try:
        command.run(args)
    except KeyboardInterrupt as stop:
        print(f"\n{args.command}: {str(stop) or f'stopped. {command.STOPPED}'}", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    except BrokenPipeError:  # whoever reads the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except _FORESEEN as error:
        raise SystemExit(f"{args.command}: {_said(error, command.STOPPED)}") from None


def _said(error: BaseException, stopped: str) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; make room. {stopped}"
    return " ".join(str(error).split()) or type(error).__name__
