"""A job's output file: a line for each answer, kept as it comes, so that nothing is done twice."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from ..evaluation.store import naming, write_whole

logger = logging.getLogger(__name__)
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_SYNC_EVERY = 1.0  # seconds; what a crash of the machine may take is answered again


class Output(Protocol):
    """Where answers go; `done` are the ids that are there already."""

    done: set[str | int]

    def add(self, answer: dict[str, Any]) -> None:
        """Append a line, whole or not at all."""


class Stream:
    """Standard output: nothing is kept of an earlier run."""

    def __init__(self) -> None:
        self.done: set[str | int] = set()

    def add(self, answer: dict[str, Any]) -> None:
        sys.stdout.buffer.write(line_of(answer))
        sys.stdout.buffer.flush()


class File:
    """A JSONL file that this process alone writes; see `opened`."""

    def __init__(self, path: Path, raw: FileIO, done: set[str | int], size: int) -> None:
        self.path, self.raw, self.done, self.size = path, raw, done, size
        self.synced = time.monotonic()

    def add(self, answer: dict[str, Any]) -> None:
        line = line_of(answer)
        with naming(self.path):
            try:
                written = self.raw.write(line)
                if written < len(line):  # a full disk takes what it has room for
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    self.raw.truncate(self.size)
                raise
            self.size += len(line)
            if time.monotonic() - self.synced > _SYNC_EVERY:
                self.sync()

    def sync(self) -> None:
        """Everything written is on the disk when this returns."""
        with naming(self.path):
            os.fsync(self.raw.fileno())
        self.synced = time.monotonic()


def line_of(answer: dict[str, Any]) -> bytes:
    """An answer as a line, also for readers that end lines at U+2028 and the like, as Python's
    `splitlines` does."""
    text = json.dumps(answer, ensure_ascii=False, allow_nan=False)
    return _LINE_ENDS.sub(lambda end: f"\\u{ord(end[0]):04x}", text).encode() + b"\n"


def key_file(path: Path) -> Path:
    """The file beside an output that says what its lines belong to."""
    return path.with_name(f"{path.name}.job.json")


@contextmanager
def opened(path: Path, key: dict[str, Any], ids: set[str | int], overwrite: bool) -> Iterator[File]:
    """The output file of the job that `key` describes, with answers to rows `ids`.

    A torn last line, which a kill or a crash leaves, is cut off.

    Raises `ValueError` for a file that another process writes, that cannot be written to, or whose
    lines belong to another job (naming what has changed), with the ways out.
    """
    with _open(path) as raw:  # which holds the lock until it is closed, or the process has ended
        try:
            fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output={str(path)!r} is being written by another process; wait until it has "
                "ended, or name another output"
            ) from None
        if overwrite:
            raw.truncate(0)
        if os.fstat(raw.fileno()).st_size == 0:
            write_whole(key_file(path), json.dumps({"key": key}, indent=1).encode() + b"\n")
        else:
            _check_key(path, key)
        done, size = _kept(path, ids)
        raw.truncate(size)
        file = File(path, raw, done, size)
        try:
            yield file
        finally:
            file.sync()


def _open(path: Path) -> FileIO:
    if path.exists() and not path.is_file():
        raise ValueError(
            f"output={str(path)!r} is no regular file; name one, or - for standard output"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileIO(path, "ab")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"output={str(path)!r} cannot be written to ({error.strerror}); name another"
        ) from None


def _check_key(path: Path, key: dict[str, Any]) -> None:
    ways = "name another output, or pass overwrite (--overwrite) to begin anew"
    try:
        before = json.loads(key_file(path).read_bytes())["key"]
        changed = [name for name in {**before, **key} if before.get(name) != _plain(key).get(name)]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(
            f"output={str(path)!r} has lines, and {key_file(path).name} beside it does not say of "
            f"what job; {ways}"
        ) from None
    if changed:
        said = ", ".join(_changed(name, before, key) for name in changed)
        raise ValueError(
            f"output={str(path)!r} has the answers of a job with another {said}; give what it was "
            f"to go on, {ways}"
        )


def _changed(name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    values = [key.get(name) for key in (before, now)]
    if any(isinstance(value, (dict, list, tuple)) for value in values):
        return name
    return f"{name} ({values[0]!r}, now {values[1]!r})"


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(key))


def _kept(path: Path, ids: set[str | int]) -> tuple[set[str | int], int]:
    """The ids of the whole lines, and how many bytes these are."""
    done: set[str | int] = set()
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                answer = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                answer = None
            if answer is None:
                rest = path.stat().st_size - size
                logger.warning(
                    "%s: line %d is torn; %d bytes from there on are cut off, and what they "
                    "answered is answered again", path, number, rest,
                )  # fmt: skip
                break
            one = answer.get("id") if isinstance(answer, dict) else None
            if type(one) not in (str, int) or one not in ids or one in done:
                raise ValueError(
                    f"{path} line {number} is no answer to a row of this job, or a second one; "
                    "take it out, name another output, or pass overwrite (--overwrite)"
                )
            done.add(one)
            size += len(line)
    return done, size
