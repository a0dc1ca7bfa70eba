"""Microbenchmarks of the ops: ``python -m rgtg_fast bench <op> [--backend ...]``.

Every time is that of one call on inputs that are not in the cache: on a GPU a buffer larger than
the L2 cache is overwritten before each call (which also lets the host run ahead, so that the events
around the call enclose device time and not the launch), and calls go round several copies of the
inputs. An implementation whose result differs from the reference's gets no time.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import installation as config
from ..ops.dispatch import Backend, unavailable_reason

Function = Callable[..., Any]
FLUSH_BYTES = 512 * 2**20
COPIES = 4
EMPTY = "an empty launch"


@dataclass(frozen=True)
class Case:
    """``make()`` gives the op's arguments, of which ``least_bytes`` must be moved at least."""

    label: str
    make: Callable[[], tuple]
    least_bytes: int
    baseline: Function  # torch's own expression, on the same arguments
    others: dict[str, Function]
    ours: Function | None = None  # takes ``backend`` too; the op of that name where None


def _topk_cases(device: str) -> Iterator[Case]:
    def baseline(logits: Tensor, k: int) -> Any:
        return torch.log_softmax(logits.float(), dim=-1).topk(k)

    others: dict[str, Function] = {}
    try:
        import flashinfer

        if hasattr(flashinfer, "top_k"):
            others["flashinfer"] = flashinfer.top_k
    except ImportError:
        pass
    for rows in (1, 64, 256) if device == "cuda" else (1, 8):
        for k in (10, 64):

            def make(rows: int = rows, k: int = k) -> tuple:
                return torch.randn(rows, 151_936, device=device).bfloat16(), k

            least = rows * (151_936 * 2 + 12 * k)
            yield Case(f"B={rows} V=151936 bf16 k={k}", make, least, baseline, others)


def _head_cases(device: str) -> Iterator[Case]:
    def baseline(hidden: Tensor, weight: Tensor) -> Any:
        return torch.nn.functional.linear(hidden, weight[None]).float()

    for rows in (1, 64):

        def make(rows: int = rows) -> tuple:
            hidden = torch.randn(rows, 10, 4096, device=device).bfloat16()
            return hidden, torch.randn(4096, device=device).bfloat16()

        yield Case(f"B={rows} k=10 H=4096 bf16", make, rows * 10 * 8196 + 8192, baseline, {})


def _policy(rows: int, device: str) -> tuple:
    """Row tensors, as a loop holds them: nothing is uploaded or split in the measured call."""
    one = torch.ones(rows, device=device)
    seeds = torch.arange(rows, device=device)
    return one, one, seeds, seeds, True


def _race(logprobs: Tensor, rewards: Tensor, ids: Tensor, beta: Tensor, t: Tensor, *_: Any) -> Any:
    logq = torch.log_softmax((logprobs + beta[:, None] * rewards) / t[:, None], dim=1)
    return (logq - torch.empty_like(logq).exponential_().log()).argmax(dim=1), logq


def _sample_cases(device: str) -> Iterator[Case]:
    for rows in (1, 64):

        def make(rows: int = rows) -> tuple:
            logprobs = torch.log_softmax(torch.randn(rows, 10, device=device), dim=1)
            ids = torch.randint(0, 150_000, (rows, 10), device=device)
            rewards = torch.randn(rows, 10, device=device)
            return logprobs, rewards, ids, *_policy(rows, device)

        yield Case(f"B={rows} k=10", make, rows * 10 * 20, _race, {})


def _step_cases(device: str) -> Iterator[Case]:
    def baseline(logprobs: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
        rewards = torch.nn.functional.linear(hidden, weight[None]).float()[..., 0]
        return _race(logprobs, rewards, *rest)

    nothing = torch.zeros(1, device=device)
    others: dict[str, Function] = {EMPTY: lambda *_: nothing.zero_()}
    for rows in (1, 8, 64):

        def make(rows: int = rows) -> tuple:
            logprobs = torch.log_softmax(torch.randn(rows, 10, device=device), dim=1)
            hidden = torch.randn(rows, 10, 4096, device=device).bfloat16()
            weight = torch.randn(4096, device=device).bfloat16() / 64
            ids = torch.randint(0, 150_000, (rows, 10), device=device)
            return logprobs, hidden, weight, ids, *_policy(rows, device)

        least = rows * 10 * (8192 + 24) + 8192
        yield Case(f"B={rows} k=10 H=4096 bf16", make, least, baseline, others)


def _vocab_cases(device: str) -> Iterator[Case]:
    def baseline(hidden: Tensor, weight: Tensor, ids: Tensor) -> Any:
        return (weight[ids] * hidden[:, None]).sum(dim=-1)

    vocab = 128_000 if device == "cuda" else 32_000
    weight = torch.randn(vocab, 4096, device=device, dtype=torch.bfloat16)
    for rows, k in ((1, 10), (64, 10), (64, 64)):

        def make(rows: int = rows, k: int = k) -> tuple:
            hidden = torch.randn(rows, 4096, device=device).bfloat16()
            return hidden, weight, torch.randint(0, vocab, (rows, k), device=device)

        yield Case(f"B={rows} k={k} H=4096 bf16", make, rows * k * 8204, baseline, {})


def _attention_cases(device: str) -> Iterator[Case]:
    def baseline(
        q: Tensor, keys: Tensor, values: Tensor, own_key: Tensor, own_value: Tensor,
        start: Tensor, length: Tensor, scale: float,
    ) -> Any:  # fmt: skip
        k, prefix = q.shape[1], keys.shape[2]
        all_keys = torch.cat([keys, own_key.transpose(1, 2)], dim=2)
        all_values = torch.cat([values, own_value.transpose(1, 2)], dim=2)
        own = torch.eye(k, dtype=torch.bool, device=q.device)
        mask = torch.cat([own.new_ones(k, prefix), own], dim=1)
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), all_keys, all_values, mask, scale=scale, enable_gqa=True
        )

    sizes = ((1, 2048), (8, 8192)) if device == "cuda" else ((1, 512),)
    for rows, prefix in sizes:

        def make(rows: int = rows, prefix: int = prefix) -> tuple:
            def tensor(*shape: int) -> Tensor:
                return torch.randn(shape, device=device).bfloat16()

            start = torch.zeros(rows, dtype=torch.int64, device=device)
            past, own = (rows, 8, prefix, 128), (rows, 10, 8, 128)
            tensors = tensor(*past), tensor(*past), tensor(*own), tensor(*own)
            return tensor(rows, 10, 32, 128), *tensors, start, start + prefix, 128**-0.5

        least = rows * (2 * prefix * 8 * 128 * 2 + 10 * (2 * 32 + 2 * 8) * 128 * 2)
        yield Case(f"B={rows} L={prefix} k=10 32/8x128 bf16", make, least, baseline, {})


def pair_step(*arguments: Any, backend: Backend = "auto") -> tuple[Tensor, ...]:
    """The prefix loss and its gradients."""
    loss = ops.prefix_bt_loss(*arguments, backend=backend)
    return loss.detach(), *torch.autograd.grad(loss, arguments[:2])


def torch_pair_step(
    chosen: Tensor, rejected: Tensor, mask_chosen: Tensor, mask_rejected: Tensor
) -> tuple[Tensor, ...]:
    """:func:`pair_step` as one writes it in torch."""
    ends = mask_chosen.sum(dim=1, keepdim=True), mask_rejected.sum(dim=1, keepdim=True)
    at = torch.arange(chosen.shape[1], device=chosen.device)
    x = chosen.gather(1, torch.minimum(at, ends[0] - 1)).float()
    y = rejected.gather(1, torch.minimum(at, ends[1] - 1)).float()
    live = at < torch.maximum(*ends)
    losses = torch.where(live, -torch.nn.functional.logsigmoid(x - y), 0.0)
    loss = (losses.sum(dim=1) / live.sum(dim=1)).mean()
    return loss.detach(), *torch.autograd.grad(loss, (chosen, rejected))


def draw_pairs(rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """Rewards that need gradients, and masks of answers of half the width or more."""
    shape = (rows, width)
    rewards = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2)]
    lengths = [torch.randint(width // 2, width + 1, (rows, 1), device=device) for _ in range(2)]
    return *rewards, *(torch.arange(width, device=device) < length for length in lengths)


def _pair_cases(device: str) -> Iterator[Case]:
    for rows, width in ((8, 64), (64, 128), (64, 512)):

        def make(rows: int = rows, width: int = width) -> tuple:
            return draw_pairs(rows, width, torch.bfloat16, device)

        label = f"N={rows} L={width} bf16, with backward"
        yield Case(label, make, rows * width * 8, torch_pair_step, {}, pair_step)


CASES = {
    "topk_logprobs": _topk_cases,
    "reward_head": _head_cases,
    "ratio_sample": _sample_cases,
    "ratio_step": _step_cases,
    "vocab_reward": _vocab_cases,
    "candidate_attention": _attention_cases,
    "prefix_bt_loss": _pair_cases,
}


def agrees(got: Any, want: Any) -> bool:
    """Integers bit for bit; values to what their type and a sum of some thousand terms allow."""
    if isinstance(want, (tuple, list)):
        return all(agrees(a, b) for a, b in zip(got, want, strict=True))
    if not want.is_floating_point():
        return torch.equal(got, want)
    size = float(want.float().abs().max())
    relative = 1e-2 if want.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return torch.allclose(got.float(), want.float(), rtol=0.0, atol=relative * max(size, 1.0))


def times(function: Function, inputs: list[tuple], device: str, repeat: int) -> list[float]:
    """Microseconds of each of ``repeat`` calls, after three that do not count."""
    if device == "cpu":
        taken = []
        for turn in range(repeat + 3):
            begin = time.perf_counter()
            function(*inputs[turn % len(inputs)])
            taken.append(1e6 * (time.perf_counter() - begin))
        return taken[3:]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    pairs = []
    for turn in range(repeat + 3):
        flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function(*inputs[turn % len(inputs)])
        last.record()
        pairs.append((first, last))
    torch.cuda.synchronize()
    return [1e3 * first.elapsed_time(last) for first, last in pairs[3:]]


def copy_bandwidth(device: str) -> float:
    """GB/s read plus written by a copy of a large buffer."""
    source = torch.zeros(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    taken = statistics.median(times(target.copy_, [(source,)], device, 20))
    return 2e-3 * source.numel() * source.element_size() / taken


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
    for case in CASES[op](device):
        inputs = [case.make() for _ in range(COPIES)]
        want = (case.ours or getattr(ops, op))(*inputs[0], backend="reference")
        found: dict[str, list[float] | None] = {}
        for name, function in _contenders(op, case, device, backends).items():
            if name in backends and not agrees(function(*inputs[0]), want):
                found[name] = None
            else:
                found[name] = times(function, inputs, device, repeat)
        base = statistics.median(found["torch"] or [float("nan")])
        for name, taken in found.items():
            row: dict[str, Any] = {"op": op, "case": case.label, "implementation": name}
            if taken is None:
                rows.append({**row, "us": None, "note": "differs from the reference: no speed"})
                continue
            deciles = statistics.quantiles(taken, n=10)
            median = statistics.median(taken)
            rate = 0.0 if name == EMPTY else 1e-3 * case.least_bytes / median
            row |= {"us": median, "p10": deciles[0], "p90": deciles[-1], "GB/s": rate}
            rows.append(row | {"% of copy": 100 * rate / copy, "x torch": base / median})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a table."""
    columns = ["case", "implementation", "us", "p10", "p90", "GB/s", "% of copy", "x torch"]
    lines = [columns]
    for row in rows:
        if row["us"] is None:
            lines.append([row["case"], row["implementation"], row["note"], "", "", "", "", ""])
        else:
            numbers = [f"{row[name]:.2f}" for name in columns[2:]]
            lines.append([row["case"], row["implementation"], *numbers])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


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
    print(f"{op} on {torch.cuda.get_device_name() if device == 'cuda' else platform.processor()}")
    show(rows)
    if out is not None:
        facts = config.info()
        del facts["backends"]
        driver = torch.cuda.get_device_properties(0) if device == "cuda" else None
        record = {**facts, "device": str(driver), "cuda": torch.version.cuda, "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        draw(op, rows, out.with_suffix(".png"))
    return all(row["us"] is not None for row in rows)
