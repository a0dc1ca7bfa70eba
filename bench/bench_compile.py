"""`generate(compile=True)` against `compile=False`: milliseconds of decoding for a token.

    python bench/bench_compile.py
    python bench/bench_compile.py --shape gpt2 --dtype bfloat16 --rewards head --threads 1

The two are interleaved in one process, and the least of all runs is taken. A figure is the time of
a call of `--new` tokens less that of a call of one token, over the tokens in between; `cpu` is the
process's CPU time of the same, which other work on the machine changes less. What compiling took
(the first call, less a later one) is told apart; torch keeps its results on disk, so a second run
of this script compiles faster.
"""

import argparse
import json
import time

import torch
from generate_models import SHAPES, adapter_on_base, build_models, head_on_base

import rgtg_fast

REWARDS = ("separate", "adapter", "head")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=[s for s in SHAPES if s != "llama-8b"], default="llama")
    add("--dtype", nargs="+", default=["float32", "bfloat16"])
    add("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    add("--device", default="cpu")
    add("--batch", type=int, default=1)
    add("--prompt", type=int, default=128)
    add("--k", type=int, default=10)
    add("--new", type=int, default=33)
    add("--repeats", type=int, default=7)
    add("--threads", type=int, help="torch threads (default: torch's own)")
    add("--quick", action="store_true", help="tiny models and few tokens, to see that it runs")
    add("--json", help="write the figures there")
    args = parser.parse_args()
    if args.quick:
        args.prompt, args.new, args.repeats = 8, 4, 2
    return args


def clocks(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def measure(args, lm, reward_model):
    """ms of wall and CPU time for a token without and with, and seconds that compiling took."""
    ids = torch.randint(
        0,
        lm.config.vocab_size,
        (args.batch, args.prompt),
        generator=torch.Generator().manual_seed(0),
    ).to(args.device)

    def call(compile, new):
        start = clocks(args.device)
        out = rgtg_fast.generate(
            lm,
            ids,
            attention_mask=torch.ones_like(ids),
            reward_model=reward_model,
            k=args.k,
            max_new_tokens=new,
            min_new_tokens=new,
            compile=compile,
            speculate=False,
        )
        return clocks(args.device) - start, out

    call(False, args.new)
    first, _ = call(True, args.new)
    least = {}
    for _ in range(args.repeats):
        for compile in (False, True):
            (whole, out), (one, _) = call(compile, args.new), call(compile, 1)
            known = least.setdefault(compile, (whole, one))
            least[compile] = torch.minimum(known[0], whole), torch.minimum(known[1], one)
            answers = least.setdefault(("answer", compile), out)
    ms = {c: 1000 * (least[c][0] - least[c][1]) / (args.new - 1) for c in (False, True)}
    same = (least["answer", False] == answers)[:, args.prompt :].float().mean().item()
    return ms, (first - least[True][0])[0].item(), same


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    figures = []
    for dtype in args.dtype:
        small = 512 if args.quick else None
        lm, rm = build_models(
            args.shape, args.prompt + args.new, getattr(torch, dtype), args.device, small
        )
        for reward in args.rewards:
            makers = {"adapter": adapter_on_base, "head": head_on_base}
            ms, compiling, same = measure(
                args, lm, makers[reward](lm)[0] if reward in makers else rm
            )
            (wall, cpu), (wall_c, cpu_c) = ms[False].tolist(), ms[True].tolist()
            figures.append(
                {"dtype": dtype, "reward": reward, "ms": wall, "ms_compiled": wall_c}
                | {"ratio": wall_c / wall, "cpu_ratio": cpu_c / cpu}
                | {"compile_s": compiling, "same_tokens": same}
            )
            print(
                f"{args.shape} {dtype:9} {reward:9} {wall:7.2f} -> {wall_c:7.2f} ms/token: x"
                f"{wall_c / wall:.3f} (cpu x{cpu_c / cpu:.3f}); compiling {compiling:.0f} s; "
                f"{same:.0%} of the tokens are the same",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()
