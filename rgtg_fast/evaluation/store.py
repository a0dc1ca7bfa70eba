"""Rows kept as they come, so that nothing done is done again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .models import digest


class Rows:
    """A JSONL file of rows that belong to `key`, which is in its name and its first line.

    Another key is another file: answers of other settings are neither mixed in nor overwritten. A
    line that a kill cut short is dropped.
    """

    def __init__(self, folder: Path, name: str, key: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.{digest(key)}.jsonl"
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            whole, _, _ = self.path.read_bytes().rpartition(b"\n")
            lines = whole.decode("utf-8").splitlines()
            self.rows = [json.loads(line) for line in lines[1:]]
            with self.path.open("r+b") as file:
                file.truncate(len(whole) + 1 if lines else 0)
        if not self.path.exists() or self.path.stat().st_size == 0:
            self._write([{"key": key}])

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows; they are on disk when this returns."""
        self._write(rows)
        self.rows += rows

    def cut(self, n: int) -> None:
        """Keep the first n rows."""
        if n < len(self.rows):
            lines = self.path.read_bytes().split(b"\n")[: n + 1]
            self.path.write_bytes(b"\n".join(lines) + b"\n")
            self.rows = self.rows[:n]

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
