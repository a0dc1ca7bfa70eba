"""`rgtg-fast serve` under many clients: `python bench/bench_vllm_serve.py --json`.

Needs vLLM: `make test-vllm` makes an environment for it, .venv-vllm. A tiny language model and
reward model (random weights, fp32) behind the server; clients that each send one request after the
other: prompts of 1 to 64 tokens, 4 to 48 new ones, a k of 1 to 12 and a beta of 0 to 4, greedy or
sampled, with a seed or without, 4 in 10 streamed, of which a quarter hang up in the middle. Half of
the requests come again and again, and what is greedy or seeded must get the same tokens each time.

RSS is that of all the server's processes, its slope a line through the samples behind the warm-up,
the first third; vLLM's cache is small, so that all of it has been written to by then. CPU seconds
are the server's own. Latencies are of whole answers.
"""

import argparse
import asyncio
import json
import random
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers
from vllm_server import Load, drawn, serving

import rgtg_fast
from rgtg_fast.cli.microbench import circumstances

RESULTS = Path(__file__).parent / "results" / "vllm_serve.json"
TOKENIZER = Path(rgtg_fast.__file__).parent / "demo" / "assets" / "lm"
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
WARM_UP = 1 / 3
BLOCKS = 160  # of 128 tokens


def folders(root):
    """Folders of a language model and a reward model, each with the tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPE, vocab_size=len(tokenizer), num_labels=1, initializer_range=0.3
    )
    found = []
    for name, kind in (("lm", "ForCausalLM"), ("rm", "ForSequenceClassification")):
        found.append(f"{root}/{name}")
        getattr(transformers, f"Llama{kind}")(config).save_pretrained(found[-1])
        tokenizer.save_pretrained(found[-1])
    return (*found, len(tokenizer))


def sampled(server, every, stop, samples):
    """Append (seconds, MiB) until told to stop."""
    begin = time.monotonic()
    while not stop.wait(every):
        samples.append((time.monotonic() - begin, server.rss_mib()))


def slope(samples):
    """MiB a minute, of a line by least squares through the samples behind the warm-up."""
    late = samples[int(len(samples) * WARM_UP) :]
    t = torch.tensor([each[0] / 60 for each in late], dtype=torch.float64)
    mib = torch.tensor([each[1] for each in late], dtype=torch.float64)
    t = t - t.mean()
    return float((t * mib).sum() / (t * t).sum())


def quantile(latencies, share):
    return sorted(latencies)[min(int(share * len(latencies)), len(latencies) - 1)]


def measured(server, name, clients, seconds, load, seed):
    """The figures of so many clients for so long."""
    stop, samples = threading.Event(), []
    watcher = threading.Thread(target=sampled, args=(server, seconds / 100, stop, samples))
    cpu = server.cpu_seconds()
    watcher.start()
    try:
        took = asyncio.run(load.run(server.url, clients, seconds, seed))
    finally:
        stop.set()
        watcher.join()
    cpu = server.cpu_seconds() - cpu
    row = {
        "load": name,
        "clients": clients,
        "seconds": took,
        "answers": len(load.latencies),
        "hung_up": load.hung_up,
        "errors": len(load.errors),
        "wrong": len(load.wrong),
        "tokens_per_s": load.tokens / took,
        "p50_s": quantile(load.latencies, 0.5),
        "p99_s": quantile(load.latencies, 0.99),
        "cpu_ms_per_token": 1e3 * cpu / load.tokens,
        "rss_mib": samples[-1][1],
        "rss_slope_mib_per_min": slope(samples),
    }
    print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    for error in load.errors[:3]:
        print("error:", error)
    for ask, got in load.wrong[:3]:
        print("wrong:", ask, got, "instead of", load.known.get(ask))
    return {**row, "rss_mib_over_time": [[round(t, 1), round(m, 1)] for t, m in samples]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300, help="of the load of all kinds")
    parser.add_argument("--beside", type=float, default=60, help="seconds of each of the others")
    parser.add_argument("--rows", type=int, default=64, help="requests that run at a time")
    parser.add_argument("--kv-gib", type=float, default=0.25)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        lm, rm, vocabulary = folders(root)
        pool = [drawn(random.Random(i), vocabulary, 0.75) for i in range(48)]
        reward = ["--reward-model", rm, "--kv-gib", str(args.kv_gib)]
        options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
        options += ["--max-num-seqs", str(args.rows), "--num-gpu-blocks-override", str(BLOCKS)]
        options += ["--block-size", "128"]
        rows = []
        with serving(lm, reward, options, Path(root) / "log") as server:
            loads = [
                ("one at a time, guided", 1, args.beside, Load(vocabulary, 1.0)),
                ("one at a time, unguided", 1, args.beside, Load(vocabulary, 0.0)),
                ("unguided", args.clients, args.beside, Load(vocabulary, 0.0)),
                ("guided", args.clients, args.beside, Load(vocabulary, 1.0)),
                ("all kinds", args.clients, args.seconds, Load(vocabulary, 0.75, pool=pool)),
            ]
            for seed, (name, clients, seconds, load) in enumerate(loads):
                rows.append(measured(server, name, clients, seconds, load, seed))
            log = server.log.read_text()
    failed = [line for line in log.splitlines() if "ERROR" in line or "Traceback" in line]
    print(*failed[:10], sep="\n")
    if args.json:
        record = {**circumstances(), "options": vars(args), "rows": rows}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    if failed or any(row["errors"] or row["wrong"] for row in rows):
        raise SystemExit("there were errors")


if __name__ == "__main__":
    main()
