"""Compiles the Triton kernels that the benchmarks launch, on all cores, into Triton's own cache.

    python -m rgtg_fast.cli.gpu_report.precompile [--dry-run]

A kernel takes seconds, and the steps behind would compile one after another, in their own time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import islice
from multiprocessing import get_context
from typing import Any

from ... import ops
from ...ops.dispatch import unavailable_reason
from ..microbench import cases_of

MOST = 16  # processes: each holds a CUDA context of half a gigabyte


def launch(op: str, index: int, device: str) -> dict[str, Any]:
    """Launches the Triton kernels of one benchmark case once."""
    begin = time.monotonic()
    case = next(islice(cases_of(op, device), index, None))
    (case.ours or getattr(ops, op))(*case.make(), backend="triton")
    return {"op": op, "case": case.label, "seconds": round(time.monotonic() - begin, 1)}


def tasks(device: str, cases: int | None) -> list[tuple[str, int]]:
    """Every op that has a Triton kernel here, with the numbers of its first `cases` cases."""
    with_kernel = [op for op in ops.OPS if unavailable_reason(op, "triton") is None]
    return [
        (op, i) for op in with_kernel for i, _ in enumerate(islice(cases_of(op, device), cases))
    ]


def main(dry: bool) -> int:
    """How many cases failed; each is printed as a line of JSON."""
    waiting, failed = tasks(*(("cpu", 1) if dry else ("cuda", None))), 0
    jobs = min(MOST, os.cpu_count() or 1, max(1, len(waiting)))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        run = _here if dry else pool.submit  # the interpreter compiles nothing worth a process
        futures = {run(launch, *task, "cpu" if dry else "cuda"): task for task in waiting}
        for future in as_completed(futures):
            try:
                print(json.dumps(future.result()), flush=True)
            except Exception as error:  # the step that measures this case says more
                failed += 1
                said = " ".join(str(error).split())[:300]
                print(json.dumps({"op": futures[future], "failed": said}), flush=True)
    return failed


def _here(function: Callable[..., Any], *arguments: Any) -> Future:
    future: Future = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


if __name__ == "__main__":
    sys.exit(min(1, main("--dry-run" in sys.argv)))
