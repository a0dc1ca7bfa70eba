"""Microbenchmarks of the ops: ``python -m rgtg_fast bench <op> [--backend ...]``.

Every time is that of one call. Implementations are called in turns, so that a slow spell of the
machine hits all. On a CPU calls rotate through copies of the inputs, more than its cache holds (few
for small inputs, which a decoding step finds in the cache too). On a GPU a buffer larger than the
L2 cache is overwritten before each call; meanwhile the host runs ahead, so that the events around
the call enclose device time and not the launch. An implementation whose result differs from the
reference's gets no time.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..ops import installation
from ..ops.dispatch import unavailable_reason

Function = Callable[..., Any]
FLUSH_BYTES = 512 * 2**20
CACHE_BYTES = 96 * 2**20
MOST_COPIES = 32
EMPTY = "an empty launch"


@dataclass(frozen=True)
class Case:
    """``make()`` gives the op's arguments, of which ``least_bytes`` must be moved at least."""

    label: str
    make: Callable[[], tuple]
    least_bytes: int
    baseline: Function  # torch's own expression, on the same arguments
    others: dict[str, Function] = field(default_factory=dict)
    ours: Function | None = None  # takes ``backend`` too; the op of that name where None


def cases_of(op: str, device: str) -> Iterator[Case]:
    """The cases of ``op``, which its module ``op_benches.<op>`` gives as ``cases(device)``."""
    return import_module(f"{__package__}.op_benches.{op}").cases(device)


def agrees(got: Any, want: Any) -> bool:
    """Integers bit for bit; values to what their type and a sum of some thousand terms allow."""
    if isinstance(want, (tuple, list)):
        return all(agrees(a, b) for a, b in zip(got, want, strict=True))
    if not want.is_floating_point():
        return torch.equal(got, want)
    size = float(want.float().abs().max())
    relative = 1e-2 if want.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return torch.allclose(got.float(), want.float(), rtol=0.0, atol=relative * max(size, 1.0))


def times(
    functions: list[Function], inputs: list[tuple], device: str, repeat: int
) -> list[list[float]]:
    """Microseconds of ``repeat`` calls of each, after one on every copy that does not count."""
    taken: list[list[Any]] = [[] for _ in functions]
    warm = max(3, len(inputs))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device != "cpu" else None
    for turn in range(warm + repeat):
        for i, function in enumerate(functions):
            # Each takes another copy: the last one's may still be in the cache.
            arguments = inputs[(turn + i * len(inputs) // len(functions)) % len(inputs)]
            if flush is None:
                begin = time.perf_counter()
                function(*arguments)
                taken[i].append(1e6 * (time.perf_counter() - begin))
                continue
            flush.zero_()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            function(*arguments)
            last.record()
            taken[i].append((first, last))
    if flush is not None:
        torch.cuda.synchronize()
        taken = [[1e3 * first.elapsed_time(last) for first, last in pairs] for pairs in taken]
    return [one[warm:] for one in taken]


def copy_bandwidth(device: str) -> float:
    """GB/s read plus written by a copy of a large buffer."""
    source = torch.zeros(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    (taken,) = times([target.copy_], [(source,)], device, 20)
    return 2e-3 * source.numel() * source.element_size() / statistics.median(taken)


def _contenders(op: str, case: Case, device: str, backends: list[str]) -> dict[str, Function]:
    def ours(name: str) -> Function:
        call = case.ours or getattr(ops, op)
        return lambda *arguments: call(*arguments, backend=name)

    found = {name: ours(name) for name in backends}
    found["torch"] = case.baseline
    if device == "cuda":
        found["torch.compile"] = torch.compile(case.baseline, dynamic=False)
    return {**found, **case.others}


def measure(op: str, device: str, backends: list[str], repeat: int) -> list[dict[str, Any]]:
    """One row per case and implementation; ``us`` is None where parity failed."""
    copy = copy_bandwidth(device)
    rows = []
    for case in cases_of(op, device):
        copies = min(MOST_COPIES, max(4, CACHE_BYTES // case.least_bytes))
        inputs = [case.make() for _ in range(copies if case.least_bytes > 2**16 else 4)]
        want = (case.ours or getattr(ops, op))(*inputs[0], backend="reference")
        contenders = _contenders(op, case, device, backends)
        wrong = [n for n in backends if not agrees(contenders[n](*inputs[0]), want)]
        timed = {name: f for name, f in contenders.items() if name not in wrong}
        taken_by = times(list(timed.values()), inputs, device, repeat)
        found: dict[str, list[float] | None] = dict.fromkeys(contenders)
        found |= dict(zip(timed, taken_by, strict=True))
        base = statistics.median(found["torch"] or [float("nan")])
        for name, taken in found.items():
            row: dict[str, Any] = {"op": op, "case": case.label, "implementation": name}
            if taken is None:
                rows.append({**row, "us": None, "note": "differs from the reference: no speed"})
                continue
            deciles = statistics.quantiles(taken, n=10)
            median = statistics.median(taken)
            rate = 0.0 if name == EMPTY else 1e-3 * case.least_bytes / median
            spread = {"least": min(taken), "p10": deciles[0], "p90": deciles[-1]}
            row |= {"us": median, **spread, "GB/s": rate}
            rows.append(row | {"% of copy": 100 * rate / copy, "x torch": base / median})
    return rows


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def circumstances() -> dict[str, Any]:
    """What the figures depend on: processor, commit (in a checkout), versions, build, threads."""
    facts = installation.info()
    del facts["backends"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return {"processor": _processor(), "commit": commit, **facts}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a table."""
    numbers = ["us", "least", "p10", "p90", "GB/s", "% of copy", "x torch"]
    lines = [["case", "implementation", *numbers]]
    for row in rows:
        if row["us"] is None:
            lines.append([row["case"], row["implementation"], row["note"], *[""] * 6])
        else:
            figures = [f"{row[name]:.2f}" for name in numbers]
            lines.append([row["case"], row["implementation"], *figures])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        row_text = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(row_text).rstrip())


def draw(op: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Medians by case, a line per implementation, a band from the 10th to the 90th percentile."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for name in dict.fromkeys(row["implementation"] for row in rows):
        timed = [r for r in rows if r["implementation"] == name and r["us"] is not None]
        at = [cases.index(r["case"]) for r in timed]
        axes.plot(at, [r["us"] for r in timed], marker="o", label=name)
        axes.fill_between(at, [r["p10"] for r in timed], [r["p90"] for r in timed], alpha=0.2)
    axes.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("µs (median, 10th to 90th percentile)")
    axes.set_title(op)
    axes.legend()
    figure.savefig(path, dpi=120)


def run(op: str, backend: str | None, device: str, repeat: int, out: Path | None) -> bool:
    """Measures and prints; False where parity failed.

    Given ``out``, a JSON file, writes the raw figures there and a plot beside it.

    Raises:
        BackendUnavailable: if ``backend`` cannot run ``op`` on ``device``.
    """
    torch.manual_seed(0)
    if backend is not None:
        reason = unavailable_reason(op, backend)
        if reason is not None:
            raise ops.BackendUnavailable(f"backend={backend!r} cannot run {op}: {reason}")
        backends = [backend]
    else:
        names = ("cuda", "triton") if device == "cuda" else ("cpp",)
        backends = [name for name in names if unavailable_reason(op, name) is None]
    rows = measure(op, device, backends, repeat)
    print(f"{op} on {torch.cuda.get_device_name() if device == 'cuda' else _processor()}")
    show(rows)
    if out is not None:
        driver = torch.cuda.get_device_properties(0) if device == "cuda" else None
        record = {**circumstances(), "device": str(driver), "cuda": torch.version.cuda}
        record["rows"] = rows
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        draw(op, rows, out.with_suffix(".png"))
    return all(row["us"] is not None for row in rows)
