"""What the op benchmarks share: timing in turns, the parity gate, printed and raw results."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rgtg_fast.ops import installation

RESULTS = Path(__file__).parent / "results"


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=60, help="timed calls of each function")
    parser.add_argument("--json", action="store_true", help="also write bench/results/<name>.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def best_microseconds(functions: list[Callable[[], Any]], repeat: int) -> list[float]:
    """The fastest call of each, timed in turns so that a slow spell of the machine hits all."""
    best = [float("inf")] * len(functions)
    for turn in range(repeat + 2):
        for i, function in enumerate(functions):
            function()  # its inputs into the cache, and its threads awake
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if turn >= 2:
                best[i] = min(best[i], elapsed)
    return [1e6 * seconds for seconds in best]


def require(holds: bool, what: str) -> None:
    """The parity gate: a wrong result has no speed."""
    if not holds:
        raise SystemExit(f"parity with the reference fails, so no timing is shown: {what}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def report(name: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints ``rows`` as a table and, with ``--json``, writes them with what they depend on."""
    columns = list(rows[0])
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    if not options.json:
        return
    commit = subprocess.run(
        ["git", "-C", str(RESULTS), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    facts = installation.info()
    del facts["backends"]
    record = {"processor": _processor(), "commit": commit, **facts, "rows": rows}
    record["threads"] = options.threads
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
