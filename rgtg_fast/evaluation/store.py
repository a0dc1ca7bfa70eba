"""Rows kept as they come, so that nothing done is done again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .models import digest

_NUMBER = (int, float)
_MAYBE = (int, float, type(None))
# What a row of each kind holds beside `i`, its place among the prompts.
KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "answers": {
        "text": (str,),
        "ids": (list,),
        "end": (int, type(None)),
        "logp": _NUMBER,
        "kl": _MAYBE,
        "log_ratio": _MAYBE,
        "proxy": _MAYBE,
    },
    "rewards": {"reward": _NUMBER},
    "wins": {"win": _NUMBER, "unread": (int,), "swapped": (bool,)},
}


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new, never a piece."""
    temporary = path.with_name(f"{path.name}.part")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                _write_through(file, data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path into an `OSError`: that of a write to a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _write_through(file: Any, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


class Rows:
    """A JSONL file of `kind` ("answers", "rewards", "wins"), one row for each of the first of
    `total` prompts, which belong to `key`: it is in the file's name and its first line.

    Another key is another file: answers of other settings are neither mixed in nor overwritten. The
    file is valid up to the first line that is not what was written there (cut short by a kill, of
    another key, twice, missing, out of order, of another shape); the rest is cut off, with a
    `UserWarning` that says so, and made again.
    """

    def __init__(self, folder: Path, name: str, kind: str, key: dict[str, Any], total: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.{kind}.{digest(key)}.jsonl"
        self.kind, self.total = kind, total
        self.rows: list[dict[str, Any]] = []
        self._head = json.dumps({"key": key}).encode()
        if not self.path.exists():
            write_whole(self.path, self._head + b"\n")
            return
        wrong = self._read()
        if wrong is not None:
            warnings.warn(
                f"{self.path}: {wrong}; what stood from there on is cut off and made again, "
                f"{len(self.rows)} of {total} rows are kept",
                UserWarning,
                stacklevel=2,
            )
            self._rewrite()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows; they are on disk when this returns."""
        with naming(self.path), self.path.open("ab") as file:
            _write_through(file, b"".join(_line(row) for row in rows))
        self.rows += rows

    def cut(self, n: int) -> None:
        """Keep the first n rows."""
        if n < len(self.rows):
            self.rows = self.rows[:n]
            self._rewrite()

    def _rewrite(self) -> None:
        write_whole(self.path, self._head + b"\n" + b"".join(_line(row) for row in self.rows))

    def _read(self) -> str | None:
        """Take the rows up to the first wrong line; says what is wrong with it."""
        head, *lines = self.path.read_bytes().split(b"\n")
        if head != self._head:
            return "line 1 is not the key of these rows"
        torn = bool(lines.pop()) if lines else True
        for number, line in enumerate(lines):
            wrong = self._take(line, number)
            if wrong is not None:
                return f"line {number + 2} {wrong}"
        return "the last line is cut short" if torn else None

    def _take(self, line: bytes, number: int) -> str | None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return "is not JSON"
        if type(row) is not dict or type(row.get("i")) is not int:
            return "is no row"
        if number >= self.total:
            return f"is one more than the {self.total} prompts"
        if row["i"] != number:
            return f"has i={row['i']} where i={number} belongs"
        for name, types in KINDS[self.kind].items():
            if type(row.get(name, ...)) not in types:
                return f"has no {name}, or one of another type"
        if any(type(token) is not int for token in row.get("ids", ())):
            return "has ids that are no ints"
        self.rows.append(row)
        return None


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"
