"""Guided by rewards of next tokens (GenARM, FaRMA, CD-Q, ILQL), against plain generation and the
rewards of a classifier, which runs k tokens where these run one.

    python bench/bench_next_token.py
    python bench/bench_next_token.py --shape llama --dtype bfloat16 --prompt 512 --json out.json
    python bench/bench_next_token.py --only plain cd_q ilql --threads 1 --cpu-time

"cd_q" and "ilql" are heads over the vocabulary on the language model's own states: one matrix, and
two of them less a value. The other models have the same shape, and random weights. "own cache" is
the same scorer on Hugging Face's cache and forward (a hook on the model asks for that). "whole" is
the whole vocabulary, k=None, "best of the sum" `candidates="sum"`. Whole calls in turns, greedy but
for "drawn", nothing stops early; the least of all times is shown, in milliseconds a token, and its
ratio to plain. `--cpu-time` counts the seconds of the process and not the clock's, for a machine
that has other work.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from generate_models import ARGUMENTS, build_models

import rgtg_fast
from rgtg_fast import presets
from rgtg_fast.cli.microbench import circumstances
from rgtg_fast.scorers import AutoregressiveScorer, VocabRewardScorer


def contenders(lm, rewards, prompt, new, k):
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    options |= {"max_new_tokens": new, "min_new_tokens": new}

    def guided(kind, model, k=k, **more):
        scorer, how = kind(model), options | more
        return lambda: rgtg_fast.generate(lm, prompt, reward_model=scorer, k=k, **how)

    found = {"plain": lambda: lm.generate(prompt, **options)}
    # Random models repeat themselves, which makes guesses of what comes look better than they are.
    found["classifier"] = guided(lambda model: model, rewards["classifier"], speculate=False)
    for name, kind in (("genarm", AutoregressiveScorer), ("farma", VocabRewardScorer)):
        found[name] = guided(kind, rewards["static"])
        found[f"{name}, best of the sum"] = guided(kind, rewards["static"], candidates="sum")
        found[f"{name}, whole"] = guided(kind, rewards["static"], None)
        drawn = {"do_sample": True, "top_k": 0, "seed": 1}
        found[f"{name}, whole, drawn"] = guided(kind, rewards["static"], None, **drawn)
        found[f"{name}, own cache"] = guided(kind, rewards["own"])
    rows = (lm.config.vocab_size, lm.config.hidden_size)
    q1, q2 = (0.02 * torch.randn(rows, dtype=lm.dtype, device=lm.device) for _ in range(2))
    for name, preset in (
        ("cd_q", presets.cd_q(lm, q1, k=k)),
        ("ilql", presets.ilql(lm, [q1, q2], q1[0], k=k)),
    ):
        call = options | {"reward_model": preset["reward_model"], "k": k}
        found[name] = lambda call=call: rgtg_fast.generate(lm, prompt, **call)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    for name, options in ARGUMENTS.items():
        add(name, **options)
    add("--batch", type=int, default=1)
    add("--new", type=int, default=64)
    add("--repeats", type=int, default=7)
    add("--only", nargs="+", help="names of the table's lines")
    add("--threads", type=int)
    add("--cpu-time", action="store_true")
    add("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    dtype, size = getattr(torch, args.dtype), args.prompt + args.new
    (lm, classifier), (reward, _), (own, _) = (
        build_models(args.shape, size, dtype, args.device, args.small) for _ in range(3)
    )
    own.register_forward_hook(lambda *_: None)
    ids = torch.randint(3, lm.config.vocab_size, (args.batch, args.prompt), device=args.device)
    models = {"classifier": classifier, "static": reward, "own": own}
    calls = contenders(lm, models, ids, args.new, args.k)
    calls = {name: call for name, call in calls.items() if name in (args.only or calls)}
    taken = {name: [] for name in calls}
    for turn in range(args.repeats + 1):
        for name, call in calls.items():
            begin = clock()
            call()
            if args.device != "cpu":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                taken[name].append(1e3 * (clock() - begin) / args.new)
    least = {name: min(times) for name, times in taken.items()}
    for name, best in least.items():
        print(f"{name:24} {best:8.3f} ms/token   {best / least['plain']:.2f} x plain")
    if args.json is not None:
        record = {**circumstances(), "options": vars(args) | {"json": None}, "ms": taken}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
