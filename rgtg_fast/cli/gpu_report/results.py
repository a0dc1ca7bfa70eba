"""Reads what the steps wrote. Whatever is missing or cut off reads as None, or as no rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runner import read_json

OURS = ("cuda", "triton")


@dataclass(frozen=True)
class Got:
    value: float
    note: str = ""


@dataclass(frozen=True)
class Results:
    """The records and figures below a report's folder."""

    out: Path

    @property
    def dry(self) -> bool:
        return bool((read_json(self.out / "run.json") or {}).get("dry"))

    def record(self, step: str) -> dict[str, Any]:
        return read_json(self.out / "steps" / step / "record.json") or {}

    def environment(self) -> dict[str, Any]:
        return read_json(self.out / "steps" / "environment" / "environment.json") or {}

    def microbench(self, op: str) -> dict[str, Any]:
        return read_json(self.out / "steps" / f"microbench.{op}" / f"{op}_gpu.json") or {}

    def timed(self, op: str, case: str, names: tuple[str, ...] = OURS) -> list[dict[str, Any]]:
        """The rows of a case (by the beginning of its label) that have a time, fastest first."""
        rows = self.microbench(op).get("rows", [])
        found = [r for r in rows if r["case"].startswith(case) and r["implementation"] in names]
        return sorted((r for r in found if r["us"] is not None), key=lambda r: r["us"])

    def fastest(self, op: str, case: str) -> dict[str, Any] | None:
        return next(iter(self.timed(op, case)), None)

    def contender(self, batch: int, k: int, *names: str) -> dict[str, Any] | None:
        """The row of the generation benchmark whose token is the fastest of these contenders'."""
        file = self.out / "steps" / f"generate.b{batch}" / f"generate_b{batch}_gpu.json"
        cells = [c for c in (read_json(file) or {}).get("cells", []) if c["k"] == k]
        rows = [row for cell in cells for row in cell["rows"] if row["name"] in names]
        return min(rows, key=lambda row: row["decode_ms"], default=None)


# What a line reads. Each takes what is particular to the line and gives its reader.


def microseconds(op: str, case: str):
    """Of the fastest of our kernels, launched, cold L2."""

    def read(results: Results) -> Got | None:
        row = results.fastest(op, case)
        if row is None:
            return None
        replay = f", {row['replay']:.1f} µs replayed" if "replay" in row else ""
        return Got(row["us"], f"{row['implementation']}{replay}")

    return read


def share_of_copy(op: str, case: str):
    def read(results: Results) -> Got | None:
        row = results.fastest(op, case)
        if row is None:
            return None
        return Got(row["% of copy"], f"{row['implementation']}, {row['us']:.1f} µs")

    return read


def host_microseconds(op: str, cases: tuple[str, ...], implementation: str):
    """The most that the host needs to launch one of the cases."""

    def read(results: Results) -> Got | None:
        rows = [row for case in cases for row in results.timed(op, case, (implementation,))]
        found = [(row["host"], row["case"]) for row in rows if "host" in row]
        return Got(*max(found)) if len(found) == len(cases) else None

    return read


def least_over_torch(op: str, cases: tuple[str, ...]):
    """Torch's time over ours, in the worst of the cases."""

    def read(results: Results) -> Got | None:
        rows = [results.fastest(op, case) for case in cases]
        found = [(row["x torch"], row["case"]) for row in rows if row]
        return Got(*min(found)) if len(found) == len(cases) else None

    return read


def most_over_other(op: str, cases: tuple[str, ...], other: str):
    """Our time over another implementation's, in the worst of the cases."""

    def read(results: Results) -> Got | None:
        found = []
        for case in cases:
            ours, theirs = results.fastest(op, case), results.timed(op, case, (other,))
            if ours and theirs:
                found.append((ours["us"] / theirs[0]["us"], ours["case"]))
        return Got(*max(found)) if len(found) == len(cases) else None

    return read


def most_over_empty_launch(op: str, cases: tuple[str, ...]):
    def read(results: Results) -> Got | None:
        empty = results.microbench(op).get("empty launch")
        rows = [results.fastest(op, case) for case in cases]
        found = [(row["us"], row["case"]) for row in rows if row]
        if not empty or len(found) < len(cases):
            return None
        most, case = max(found)
        return Got(most / empty["us"], f"{case}, empty {empty['us']:.1f} µs")

    return read


def of_contender(batch: int, k: int, names: tuple[str, ...], field: str, note: str = ""):
    """One figure of the fastest of `names`; `note` is a format with the row's fields."""

    def read(results: Results) -> Got | None:
        row = results.contender(batch, k, *names)
        return Got(row[field], note.format(**row)) if row and field in row else None

    return read


def of_two(batch: int, over: tuple[str, int], under: tuple[str, int], field: str):
    """The ratio of a figure of two contenders, each a name and a k."""

    def read(results: Results) -> Got | None:
        a, b = (results.contender(batch, k, name) for name, k in (over, under))
        return Got(a[field] / b[field], f"{a[field]:.1f} / {b[field]:.1f}") if a and b else None

    return read


def failed_tests(step: str):
    """How many failed, where some ran; a check around the tests that fails counts as one."""

    def read(results: Results) -> Got | None:
        record = results.record(step)
        if record.get("status") not in ("ok", "failed"):
            return None
        tests = record.get("tests", {"passed": 0, "failed": 0})
        if record["status"] == "ok" and not tests["passed"]:
            return None  # all were skipped
        bad = max(tests["failed"], record["status"] == "failed")
        return Got(float(bad), f"{tests['passed']} passed")

    return read
