"""`rgtg-fast generate` over a file of prompts: killed and gone on with, sharded, and how fast.

    python bench/bench_job.py
    python bench/bench_job.py --prompts 200 --alone 40

The embedded models answer the embedded prompts (again and again, each time with another seed). One
run without a break; one that is killed with SIGKILL three times and begun again; one by torchrun's
two processes. Each id must be there once, with the tokens of the first run but where the choice was
a near-tie, as sums round differently in other batches. Then the same prompts in batches and one at
a time, in turns: answer tokens per second of the process's time, the shortest of each.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import report, require
from bench_many import edge, near_tie
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rgtg_fast
from rgtg_fast import ops
from rgtg_fast.demo.run import ASSETS
from rgtg_fast.jobs.run import run_job

PROMPTS = [json.loads(line)["prompt"] for line in (ASSETS / "prompts.jsonl").open()]
SETTINGS = {"k": 10, "beta": 1.0, "do_sample": True, "top_k": 0}


def write_input(path, count):
    rows = ({"id": f"p{i}", "prompt": PROMPTS[i % len(PROMPTS)]} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def values_of(folder, name, options, **more):
    values = {"model": str(ASSETS / "lm"), "reward_model": str(ASSETS / "rm_partial")}
    values |= {"input": str(folder / "in.jsonl"), "output": str(folder / f"{name}.jsonl")}
    values |= {"max_new_tokens": options.new, "batch_size": options.batch}
    return SETTINGS | values | more


def command(values, launcher=("-m", "rgtg_fast")):
    given = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    return [sys.executable, *launcher, "generate", *given]


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def answers(*paths):
    """Tokens by id; each id must be there once."""
    rows = [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]
    found = {row["id"]: row["tokens"] for row in rows}
    require(len(found) == len(rows), "an id is there twice")
    return found


def killed(values, options):
    """Runs the job to its end, with kills on the way; the lines there were at each."""
    path, at = Path(values["output"]), []
    for stop in range(1, options.kills + 1):
        process = subprocess.Popen(command(values))
        while lines(path) < stop * options.prompts // (options.kills + 1):
            require(process.poll() is None, "the job has ended before it was killed")
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        at.append(lines(path))
    subprocess.run(command(values), check=True)
    return at


def differences(got, want, options):
    """How many answers are not those wanted; none may be without a near-tie."""
    require(got.keys() == want.keys(), f"{len(got)} answers, of {len(want)}")
    other = [int(name[1:]) for name in want if got[name] != want[name]]
    if not other:
        return 0
    lm = AutoModelForCausalLM.from_pretrained(ASSETS / "lm").eval()
    rm = AutoModelForSequenceClassification.from_pretrained(ASSETS / "rm_partial").eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "lm")
    for i in other:
        ids = tokenizer(PROMPTS[i % len(PROMPTS)], return_tensors="pt")["input_ids"]
        pair = got[f"p{i}"], want[f"p{i}"]
        at = next(t for t, tokens in enumerate(zip(*pair)) if tokens[0] != tokens[1])  # noqa: B905
        out = rgtg_fast.generate(
            lm, ids, reward_model=rm, seed=ops.split_seed(0, i + 1)[i:], max_new_tokens=options.new,
            return_dict_in_generate=True, output_candidates=True, **SETTINGS,
        )  # fmt: skip
        length = ids.shape[1]
        tokens = out.sequences[0, length:].tolist()
        require(tokens[:at] == pair[0][:at], f"p{i}: the answer alone differs before token {at}")
        one = next(answer[at] for answer in pair if answer[at] != tokens[at])
        tie = near_tie(out, at, i, one) or edge(lm, out, length + at)
        require(tie, f"p{i}, token {at}")
    return len(other)


def seconds_per_token(folder, options):
    """Seconds of the process for an answer's token: in batches, and one at a time."""
    write_input(folder / "in.jsonl", options.alone)
    least = {options.batch: float("inf"), 1: float("inf")}
    for _ in range(options.repeat):
        for size in least:
            values = values_of(folder, "pace", options, batch_size=size, overwrite=True)
            start = time.process_time()
            pace = run_job(values)
            least[size] = min(least[size], (time.process_time() - start) / pace.tokens)
    return least


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--new", type=int, default=72, help="tokens of an answer at most")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--alone", type=int, default=200, help="prompts that are timed")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="write bench/results/job.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_input(folder / "in.jsonl", options.prompts)
        whole = values_of(folder, "whole", options)
        subprocess.run(command(whole), check=True)
        want = answers(folder / "whole.jsonl")
        at = killed(values_of(folder, "killed", options), options)
        again = differences(answers(folder / "killed.jsonl"), want, options)
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        launcher += ("-m", "rgtg_fast")
        subprocess.run(command(values_of(folder, "shards", options), launcher), check=True)
        shards = sorted(folder.glob("shards-*.jsonl"))
        require(len(shards) == 2, f"{len(shards)} files of shards")
        sharded = differences(answers(*shards), want, options)
        seconds = seconds_per_token(folder, options)
    row = {
        "prompts": options.prompts,
        "tokens": sum(map(len, want.values())),
        "killed at": "/".join(map(str, at)),
        "near-ties": again,
        "near-ties sharded": sharded,
        "tokens/s": 1 / seconds[options.batch],
        "one at a time": 1 / seconds[1],
        "ratio": seconds[1] / seconds[options.batch],
    }
    report("job", [row], options)


if __name__ == "__main__":
    main()
