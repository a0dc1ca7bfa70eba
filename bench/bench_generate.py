"""Milliseconds per token of guided generation against plain and against published decoding.

    python bench/bench_generate.py
    python bench/bench_generate.py --shape llama --dtype bfloat16 --batch 1 4 16 --json out.json
    python bench/bench_generate.py --grid cost --json cost.json --plot cost.png
    python bench/bench_generate.py --shape llama-8b --device cuda --prompt 512 --k 10 40
    python bench/bench_generate.py --shape llama --top-p 0.95 --entropy 0.8 --batch 1 16
    python bench/bench_generate.py --memory
    python bench/bench_generate.py --overhead

LM and reward model have the shape of GPT-2 124M (or of a Llama of that size, or of Llama-3.1-8B)
and random weights; decoding is greedy, but with --top-p, and nothing stops early. All contenders
run in one process, interleaved, and the medians are compared.

A run is a whole call. `ms/token` is its time over the new tokens, for all rows of a batch together;
`decode` is the time after the first token over the other tokens, so without the prompt and without
what a call does once. The floor is in floors.py; `peak MB` is what a run adds to the memory in use,
seen in one more run of each.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import warnings
from pathlib import Path

import torch
import transformers
from floors import bandwidth, floor_ms
from generate_contenders import LABELS, SLOW, Bench, Models, why_not
from generate_models import SHAPES, build_models, sharpen
from generate_probes import HOLDS_CACHE, kv_memory, overhead
from plot_generate import plot

import rgtg_fast
from rgtg_fast.cli.microbench import commit, gpu, processor

SLOW_REPEATS = 2
COST_PROMPTS, COST_KS, COST_BASE = (64, 128, 256, 512, 1024), (5, 10, 20, 40), (10, 256)
QUICK_PROMPTS, QUICK_KS, QUICK_BASE = (8, 16), (2, 4), (4, 8)
QUICK_VOCAB, OVERHEAD_VOCAB = 512, 50257


def environment(device):
    return {
        "cpu": processor(),
        **gpu(torch.device(device).type),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rgtg_fast": rgtg_fast.__version__,
        "commit": commit(),
    }


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="gpt2", help="llama-8b: on CUDA only")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="llama-8b: bfloat16")
    add("--device", default="cpu")
    add("--batch", type=int, nargs="+", default=[1])
    add("--prompt", type=int, nargs="+", help="prompt tokens (128)")
    add("--k", type=int, nargs="+", help="candidates per token (10)")
    add("--new", type=int, help="new tokens (64)")
    add("--beta", type=float, default=1.0, help="weight of the reward (less: more is pruned)")
    add("--top-p", type=float, help="draw tokens, with this top_p, instead of greedy decoding")
    add("--entropy", type=float, help="nats among the LM's k candidates, as 0.8 in trained models")
    add("--repeats", type=int, help="timed rounds, after one to warm up (5; --overhead: 15)")
    add(
        "--slow-new",
        type=int,
        default=8,
        help="new tokens of the re-encoding contenders, from the middle of the answer, fewer where "
        "prompt * k * batch is more than 1280; 0: all",
    )
    add("--budget", type=float, default=120, help="skip what takes longer for a run, seconds")
    add("--threads", type=int, help="torch threads (default: torch's own)")
    add("--contenders", nargs="+", choices=list(LABELS), help="default: all")
    add("--grid", choices=["cost"], help="cost vs prompt length at k=10, vs k at prompt 256")
    add("--memory", action="store_true", help="the reward model's cache at k=10 and 40 instead")
    add("--overhead", action="store_true", help="the loop's own time on tiny models instead")
    add("--quick", action="store_true", help="tiny models and few tokens, to see that it runs")
    add("--json", type=Path, help="write the raw seconds there")
    add("--plot", type=Path, help="draw the curves there")
    args = parser.parse_args(argv)
    if args.shape == "llama-8b" and args.device == "cpu" and not (args.quick or args.overhead):
        parser.error("llama-8b has 16 billion weights in two models; pass --device cuda")
    if args.overhead and args.device != "cpu":
        parser.error("--overhead times forwards on the host; leave --device cpu")
    args.contenders = args.contenders or (["auto"] if args.memory else list(LABELS))
    if args.memory and not set(args.contenders) <= set(HOLDS_CACHE):
        parser.error(f"--memory reads the caches of these contenders: {', '.join(HOLDS_CACHE)}")
    args.dtype = args.dtype or ("bfloat16" if args.shape == "llama-8b" else "float32")
    args.new = args.new or (6 if args.quick else 8 if args.memory else 64)
    args.repeats = args.repeats or (2 if args.quick else 15 if args.overhead else 5)
    return args


def grid(args):
    """The points (batch, k, prompt) to measure."""
    base_k, base_prompt = QUICK_BASE if args.quick else COST_BASE
    if args.grid == "cost":
        prompts = args.prompt or (QUICK_PROMPTS if args.quick else COST_PROMPTS)
        ks = args.k or (QUICK_KS if args.quick else COST_KS)
        points = [(b, base_k, p) for b in args.batch for p in prompts]
        points += [(b, k, base_prompt) for b in args.batch for k in ks]
    else:
        prompts = args.prompt or [8 if args.quick else 1024 if args.memory else 128]
        ks = args.k or ([10, 40] if args.memory else [base_k])
        points = [(b, k, p) for b in args.batch for p in prompts for k in ks]
    return list(dict.fromkeys(points))


def free_bytes(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    free = [line for line in lines if line.startswith("MemAvailable")]
    return int(free[0].split()[1]) * 1024 if free else float("inf")


def measure(args, models, contenders, point):
    """One point of the grid: raw runs per contender, and the bandwidth between them."""
    batch, k, prompt = point
    generator = torch.Generator().manual_seed(batch * 100_000 + prompt)
    ids = torch.randint(0, models.lm.config.vocab_size, (batch, prompt), generator=generator)
    sizes = k, args.new, args.slow_new
    bench = Bench(models, ids.to(args.device), *sizes, args.beta, args.top_p)
    skipped, failed, runs, memory, rates = {}, {}, {}, {}, []

    def attempt(call, name):
        """None where contender `name` fails: the others go on without it."""
        if name in failed:
            return None
        try:
            return call(name)
        except Exception as error:  # its compiler's, out of memory, other tokens
            failed[name] = " ".join(str(error).split())[:500] or type(error).__name__
            return None

    for name in contenders:
        reason = bench.too_dear(name, args.budget, free_bytes(args.device))
        if reason:
            skipped[name] = reason
        else:
            attempt(bench.answer, name)
            runs[name] = []
    for repeat in range(args.repeats + 1):
        rates.append(bandwidth(args.device, 16 if args.quick else None))
        for name, values in runs.items():
            # A slow contender runs many forwards: it needs no run to warm up, and few repeats.
            if name in SLOW and 1 <= repeat <= SLOW_REPEATS:
                memory[name] = attempt(bench.run_for_memory, name)
                values.append(memory[name])
            elif name not in SLOW:
                run = attempt(bench.run, name)
                values += [run] if repeat > 0 else []
    memory |= {name: attempt(bench.run_for_memory, name) for name in runs if name not in SLOW}
    counted = [n for n in ("auto", "pruned") if n in runs and (n == "pruned" or args.top_p)]
    scored = {name: attempt(bench.candidates_scored, name) for name in counted}
    runs = {name: values for name, values in runs.items() if name not in failed}
    return {
        "batch": batch,
        "k": k,
        "prompt": prompt,
        "new": args.new,
        "slow_new": bench.slow_new,
        "bandwidth": {key: statistics.median(r[key] for r in rates) for key in rates[0]},
        "near_ties": bench.near_ties,
        "kl": bench.answer("auto").kl,
        "skipped": skipped,
        "failed": failed,
        "candidates_scored": scored,
        "runs": runs,
        "rows": rows_of(models, runs, memory, rates, batch, args.new),
    }


def rows_of(models, runs, memory, rates, batch, new):
    """The table of one point, from the medians of its runs."""
    copy_rate = statistics.median(rate["copy_gb_s"] for rate in rates)
    rows = []
    for name, values in runs.items():
        ms = [1000 * v["call"] / new for v in values]
        decode = [1000 * (v["call"] - v["first"]) / max(1, new - 1) for v in values]
        floor = floor_ms(models.step_bytes(name), copy_rate)
        rows.append(
            {
                "name": name,
                "ms_per_token": statistics.median(ms),
                "low": min(ms),
                "high": max(ms),
                "tokens_per_s": 1000 * batch / statistics.median(ms),
                "decode_ms": statistics.median(decode),
                "step_bytes": models.step_bytes(name),
                "floor_ms": floor,
                "over_floor": statistics.median(decode) / floor,
                "growth_mb": memory[name]["growth_mb"],
                "peak_mb": memory[name]["peak_mb"],
            }
        )
    for base, key in (("plain", "over_plain"), ("auto", "over_guided")):
        reference = next((r for r in rows if r["name"] == base), None)
        for row in rows if reference else ():
            row[key] = row["ms_per_token"] / reference["ms_per_token"]
            row[f"decode_{key}"] = row["decode_ms"] / reference["decode_ms"]
    return rows


def show(args, cell):
    rate = cell["bandwidth"]
    print(
        f"\n{'2-layer ' if args.quick else ''}{SHAPES[args.shape]} twice, {args.dtype}, "
        f"k={cell['k']}, batch {cell['batch']}, prompt {cell['prompt']}, {cell['new']} new tokens, "
        f"{args.device}, {torch.get_num_threads()} threads, median of {args.repeats} "
        f"({min(args.repeats, SLOW_REPEATS)} for re-encoding)\n"
        f"copy {rate['copy_gb_s']:.1f} GB/s, read {rate['read_gb_s']:.1f} GB/s; KL of the guided "
        f"answer from π {cell['kl']:.3f} nats per token"
    )
    heads = ["ms/token", "spread", "tokens/s", "/ plain", "/ guided", "decode", "/ plain"]
    heads += ["/ floor", "peak MB"]
    widths = [9, 16, 10, 9, 9, 9, 9, 9, 9]
    print(f"{'':28}" + "".join(h.rjust(w) for h, w in zip(heads, widths, strict=True)))
    for row in cell["rows"]:
        values = [
            f"{row['ms_per_token']:.1f}",
            f"{row['low']:.1f}-{row['high']:.1f}",
            f"{row['tokens_per_s']:.2f}",
            *(f"{row[key]:.2f}" if key in row else "" for key in ("over_plain", "over_guided")),
            f"{row['decode_ms']:.1f}",
            f"{row['decode_over_plain']:.2f}" if "decode_over_plain" in row else "",
            f"{row['over_floor']:.2f}",
            f"{row['growth_mb']:.0f}",
        ]
        text = "".join(v.rjust(w) for v, w in zip(values, widths, strict=True))
        print(f"{LABELS[row['name']]:28}{text}")
    for name, reason in cell["skipped"].items():
        print(f"{LABELS[name]:28} skipped: {reason}")
    for name, reason in cell["failed"].items():
        print(f"{LABELS[name]:28} no time, it failed: {reason}")
    if cell["slow_new"] < cell["new"] and any(r["name"] in SLOW for r in cell["rows"]):
        print(
            f"Re-encoding contenders ran {cell['slow_new']} tokens from the middle of the answer "
            f"(mean length {cell['prompt'] + cell['new'] / 2:.0f}), scaled to {cell['new']}; "
            "--slow-new 0 runs all."
        )
    for name, scored in cell["candidates_scored"].items():
        print(f"{LABELS[name]} scored {scored or 0:.2f} of {cell['k']} candidates.")
    peak = max((row["peak_mb"] for row in cell["rows"]), default=0)
    print(f"Peak memory of the process (CUDA: of its tensors): {peak:.0f} MB.")
    print(f"Those with a time agree on the tokens; near ties: {cell['near_ties']}")


def table(rows, columns):
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        cells = (f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        print("".join(cell.rjust(18) for cell in cells))


def special(args, points, positions):
    """--memory and --overhead: the size of the reward model's cache, and the loop's own time."""
    dtype = getattr(torch, args.dtype)
    if args.overhead:
        models = build_models(args.shape, positions, dtype, small=OVERHEAD_VOCAB)
        _, k, prompt = points[0]
        rows = overhead(*models, prompt, k, args.new, args.repeats)
        print(f"2 layers, 64 wide, {SHAPES[args.shape]}, {args.dtype}, k={k}, ms per decode step")
        table(rows, ["name", "ms_per_token", "forwards_ms", "overhead_ms", "overhead_least_ms"])
        return {"overhead": rows}
    small = QUICK_VOCAB if args.quick else None
    models = build_models(args.shape, positions, dtype, args.device, small)
    prompts, ks = (list(dict.fromkeys(p[i] for p in points)) for i in (2, 1))
    rows = kv_memory(*models, prompts, args.contenders, ks, args.new)
    print(f"Keys and values held for the reward model, {SHAPES[args.shape]}, {args.dtype}")
    table(rows, ["method", "prompt", "k", "mb", "ratio"])
    return {"memory": rows}


def race(args, points, positions, save):
    """All points with one pair of models; `save(cells)` after each."""
    contenders = []
    for name in args.contenders:
        reason = why_not(name, args.device, args.top_p)
        if reason:
            print(f"{LABELS[name]}: skipped, {reason}")
        else:
            contenders.append(name)
    dtype, small = getattr(torch, args.dtype), QUICK_VOCAB if args.quick else None
    models = Models(*build_models(args.shape, positions, dtype, args.device, small))
    if args.entropy:
        sharpen(models.lm, points[0][1], args.entropy)
    models.add_on_base(contenders)
    cells = []
    for point in points:
        cells.append(measure(args, models, contenders, point))
        show(args, cells[-1])
        save({"cells": cells})
    return cells


def main(argv=None):
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    # The scorers' warnings about these models would interrupt the table.
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    options = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    record = {"bench": "generate", "options": options, "environment": environment(args.device)}

    def save(found):
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record | found, indent=1) + "\n")

    points = grid(args)
    positions = max(prompt for *_, prompt in points) + args.new + 1
    if args.memory or args.overhead:
        save(special(args, points, positions))
        return
    cells = race(args, points, positions, save)
    if args.plot:
        plot(cells, args.plot)
    failed = [reason for cell in cells for reason in cell["failed"].values()]
    if failed:
        sys.exit("no time for some contenders: " + "; ".join(failed))


if __name__ == "__main__":
    main()
