"""The rows of a job's input: read and checked whole, before anything is loaded."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..decode import options as numbers

# What a row may say for itself.
_OWN: dict[str, Callable[[str, Any], Any]] = {
    "beta": numbers.number,
    "temperature": lambda name, value: numbers.temperature(value),
    "max_new_tokens": lambda name, value: numbers.integer(name, value, 1),
    "seed": lambda name, value: numbers.seed(value),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """A prompt: `index` among the rows of the whole file, `line` in it (from 1), its `id` (the line
    where it has none), the `prompt` as the file has it, and its own `options`."""

    index: int
    line: int
    id: str | int
    prompt: Any
    options: dict[str, Any]


def read_rows(path: str, known: set[str]) -> tuple[list[Row], set[str]]:
    """The rows of a JSONL file ("-": standard input), and the names of fields that are not used.

    The whole file is read at once: what happens to it later does not matter. `known` are the
    options of a job, which a row may not have but for its own.

    Raises `ValueError`, naming the line, for what is no UTF-8, no JSON object or has a wrong id or
    option, and for an id that is there twice. Whether a prompt can be answered is not looked at.
    """
    rows: list[Row] = []
    lines: dict[tuple[type, Any], int] = {}
    unused: set[str] = set()
    for line, text in enumerate(_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not text.strip():
            continue
        where = f"{_shown(path)} line {line}"
        fields = _fields(text, where)
        own = {name: fields[name] for name in _OWN if fields.get(name) is not None}
        for name, value in own.items():
            try:
                _OWN[name](name, value)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        for name in fields.keys() - {"id", "prompt", *_OWN}:
            if name in known:
                raise ValueError(
                    f"{where}: {name} is of the whole job, and a row may have {', '.join(_OWN)} of "
                    "its own; take it out, and give it to the job"
                )
            unused.add(name)
        row = Row(len(rows), line, _id(fields.get("id"), line, where), fields.get("prompt"), own)
        other = lines.setdefault((type(row.id), row.id), line)
        if other != line:
            raise ValueError(
                f"{where} has the id {json.dumps(row.id)} of line {other} (a row without one has "
                "the number of its line); give each its own"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f'{_shown(path)} has no prompts; write one {{"prompt": ...}} a line')
    return rows, unused


def _shown(path: str) -> str:
    return "standard input" if path == "-" else path


def _bytes(path: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    if not Path(path).is_file():
        raise ValueError(f"input: no file at {path!r}; pass a JSONL file, or - for standard input")
    return Path(path).read_bytes()


def _fields(text: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error}); save the file so") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); write one JSON object a line") from None
    if not isinstance(fields, dict):
        raise ValueError(
            f'{where} is a JSON {type(fields).__name__}; write an object, {{"prompt": ...}}'
        )
    return fields


def _id(value: Any, line: int, where: str) -> str | int:
    if value is None:
        return line
    if type(value) is int or (isinstance(value, str) and not _SURROGATE.search(value)):
        return value
    raise ValueError(f"{where}: id={value!r}; write a text or a whole number, or leave it out")
