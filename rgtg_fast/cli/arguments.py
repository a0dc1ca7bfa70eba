"""Types for argparse's `type=`, and arguments that commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """An int from `least` to `most`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            top = f" and at most {most}" if most < 2**63 - 1 else ""
            raise argparse.ArgumentTypeError(f"{text!r} is no int of at least {least}{top}")
        return value

    return number


def finite(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def device(text: str) -> str:
    """A device that torch has here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        why = str(error).split("\n")[0]
        raise argparse.ArgumentTypeError(f"torch has no device {text!r} here: {why}") from None
    return text


def add_config(parser: argparse.ArgumentParser, keys: str) -> None:
    """`--config` and its overrides; `keys` says which there are."""
    parser.epilog = f"Keys: {keys}."
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="instead of the file's")
