"""Microbenchmarks of the ops: ``python -m rgtg_fast bench <op> [--backend ...]``.

Every time is that of one call. Implementations are called in turns, so that a slow spell of the
machine hits all. On a CPU calls rotate through copies of the inputs, more than its cache holds (few
for small inputs, which a decoding step finds in the cache too). On a GPU it is device time with a
cold L2 cache, of launches and of graph replays (:mod:`.gpu_timing`). An implementation whose result
differs from the reference's gets no time.
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
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..ops import installation
from ..ops.dispatch import unavailable_reason
from .gpu_timing import Taken, device_times

Function = Callable[..., Any]
CACHE_BYTES = 96 * 2**20
MOST_COPIES = 32


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
    if not want.is_floating_point() or want.numel() == 0:
        return torch.equal(got, want)
    size = float(want.float().abs().max())
    relative = 1e-2 if want.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return torch.allclose(got.float(), want.float(), rtol=0.0, atol=relative * max(size, 1.0))


def times(functions: list[Function], inputs: list[tuple], device: str, repeat: int) -> list[Taken]:
    """Microseconds of ``repeat`` calls of each, after one on every copy that does not count."""
    if device != "cpu":
        return device_times(functions, inputs, torch.device(device), repeat)
    taken: list[list[float]] = [[] for _ in functions]
    warm = max(3, len(inputs))
    for turn in range(warm + repeat):
        for i, function in enumerate(functions):
            # Each takes another copy: the last one's may still be in the cache.
            arguments = inputs[(turn + i * len(inputs) // len(functions)) % len(inputs)]
            begin = time.perf_counter()
            function(*arguments)
            taken[i].append(1e6 * (time.perf_counter() - begin))
    return [Taken(one[warm:]) for one in taken]


def copy_bandwidth(device: str) -> float:
    """GB/s read plus written by a copy of a large buffer."""
    source = torch.zeros(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    (taken,) = times([target.copy_], [(source,)], device, 20)
    return 2e-3 * source.numel() * source.element_size() / statistics.median(taken.launched)


def _empty(device: str, repeat: int) -> Taken:
    """A launch that does next to nothing: what every kernel's time has in it."""
    nothing = torch.zeros(1, device=device)
    return times([nothing.fill_], [(0.0,)], device, repeat)[0]


def _contenders(op: str, case: Case, device: str, backends: list[str]) -> dict[str, Function]:
    def ours(name: str) -> Function:
        call = case.ours or getattr(ops, op)
        return lambda *arguments: call(*arguments, backend=name)

    found = {name: ours(name) for name in backends}
    found["torch"] = case.baseline
    if device == "cuda":
        found["torch.compile"] = torch.compile(case.baseline, dynamic=False)
    return {**found, **case.others}


def _quantiles(name: str, taken: list[float]) -> dict[str, float]:
    """Median, least, 10th and 90th percentile; ``name`` is that of the median and, but for "us",
    stands before the others'."""
    deciles = statistics.quantiles(taken, n=10, method="inclusive")
    prefix = "" if name == "us" else f"{name} "
    spread = {"least": min(taken), "p10": deciles[0], "p90": deciles[-1]}
    return {name: statistics.median(taken)} | {prefix + k: v for k, v in spread.items()}


def _row(taken: Taken, least_bytes: int, copy: float, base: float) -> dict[str, Any]:
    row: dict[str, Any] = _quantiles("us", taken.launched)
    rate = 1e-3 * least_bytes / row["us"]
    row |= {"bytes": least_bytes, "GB/s": rate, "% of copy": 100 * rate / copy}
    row |= {"x torch": base / row["us"], "late": taken.late}
    if taken.host is not None:
        row["host"] = statistics.median(taken.host)
    if taken.replayed is not None:
        row |= _quantiles("replay", taken.replayed)
    return row | ({"note": taken.note} if taken.note else {})


def measure(
    op: str, device: str, backends: list[str], repeat: int, copy: float, cases: int | None = None
) -> list[dict[str, Any]]:
    """One row per case (the first ``cases``) and implementation; ``us`` is None where parity
    failed. ``copy`` in GB/s is what a case's bytes per second are held against."""
    rows = []
    for case in islice(cases_of(op, device), cases):
        copies = min(MOST_COPIES, max(4, CACHE_BYTES // case.least_bytes))
        inputs = [case.make() for _ in range(copies if case.least_bytes > 2**16 else 4)]
        want = (case.ours or getattr(ops, op))(*inputs[0], backend="reference")
        contenders = _contenders(op, case, device, backends)
        wrong = [n for n in backends if not agrees(contenders[n](*inputs[0]), want)]
        timed = {name: f for name, f in contenders.items() if name not in wrong}
        found = dict(zip(timed, times(list(timed.values()), inputs, device, repeat), strict=True))
        base = statistics.median(found["torch"].launched)
        for name in contenders:
            row: dict[str, Any] = {"op": op, "case": case.label, "implementation": name}
            if name in wrong:
                rows.append(row | {"us": None, "note": "differs from the reference: no speed"})
            else:
                rows.append(row | _row(found[name], case.least_bytes, copy, base))
    return rows


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str | None:
    """The commit of the checkout that this package lies in; None without git or outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def circumstances() -> dict[str, Any]:
    """What the figures depend on: processor, commit (in a checkout), versions, build, threads."""
    facts = installation.info()
    del facts["backends"]
    return {"processor": processor(), "commit": commit(), **facts}


def gpu(device: str) -> dict[str, Any]:
    """Name, properties and driver of the current GPU; all None on a CPU."""
    if device != "cuda":
        return {"gpu": None, "driver": None, "cuda": torch.version.cuda}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        driver = ""
    facts = str(torch.cuda.get_device_properties())
    first = next(iter(driver.split()), None)
    return {"gpu": facts, "driver": first, "cuda": torch.version.cuda}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a table."""
    numbers = ["us", "least", "p10", "p90", "GB/s", "% of copy", "x torch"]
    if any("host" in row for row in rows):  # on a GPU
        numbers[4:4] = ["host", "late", "replay"]
    lines = [["case", "implementation", *numbers, ""]]
    for row in rows:
        figures = [f"{row[name]:.2f}" if row.get(name) is not None else "" for name in numbers]
        lines.append([row["case"], row["implementation"], *figures, row.get("note", "")])
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


def run(
    op: str,
    backend: str | None,
    device: str,
    repeat: int,
    out: Path | None,
    cases: int | None = None,
) -> bool:
    """Measures the first ``cases`` (default: all) and prints; False where parity failed.

    Given ``out``, a JSON file, writes the raw figures there and, where matplotlib is installed, a
    plot beside it.

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
    copy = copy_bandwidth(device)
    rows = measure(op, device, backends, repeat, copy, cases)
    place = torch.cuda.get_device_name() if device == "cuda" else processor()
    print(f"{op} on {place}, a copy moves {copy:.0f} GB/s")
    show(rows)
    if out is not None:
        empty = _empty(device, repeat)
        record = {**circumstances(), **gpu(device), "copy GB/s": copy}
        record["empty launch"] = _row(empty, 4, copy, statistics.median(empty.launched))
        record["rows"] = rows
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        if find_spec("matplotlib") is not None:
            draw(op, rows, out.with_suffix(".png"))
    return all(row["us"] is not None for row in rows)
