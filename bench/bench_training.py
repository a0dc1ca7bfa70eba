"""A training step on all prefixes of N pairs in one pass, against the published row per prefix.

GPT-2's shape (124M, random weights, fp32), AdamW; the prefixes of 64 answer tokens behind a prompt.
The exploded step runs all its 2·N·64 rows, sorted by length and in micro-batches of 32, so it pads
next to nothing; its loss and gradient norm must be those of the one pass. Then the peak memory of
the prefix step beside that of ordinary Bradley-Terry on whole answers through the public forward,
each in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from _common import report, require
from transformers import GPT2Config, GPT2ForSequenceClassification

from rgtg_fast.training import PreferenceDataset, PrefixRewardConfig, PrefixRewardTrainer

ANSWER = 64
MICRO_BATCH = 32
MIB = 2**20


def make_model() -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(GPT2Config(num_labels=1, pad_token_id=0))


def make_pairs(n: int, prompt: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 50_000, (length,), generator=generator).tolist()

    names = {"prompt_ids": prompt, "chosen_ids": ANSWER, "rejected_ids": ANSWER}
    return [{name: ids(length) for name, length in names.items()} for _ in range(n)]


def one_pass(model: torch.nn.Module, pairs: list[dict]):
    args = PrefixRewardConfig(tempfile.mkdtemp(), report_to="none", use_cpu=True)
    trainer = PrefixRewardTrainer(model, args, train_dataset=PreferenceDataset(pairs))
    batch = trainer.data_collator(pairs)
    model.train()

    def backward() -> float:
        loss = trainer.score(model, batch, 0).loss
        loss.backward()
        return loss.item()

    return backward


def exploded(model: torch.nn.Module, pairs: list[dict]):
    rows = [
        [pair["prompt_ids"] + pair[side][:i] for side in ("chosen_ids", "rejected_ids")]
        for i in range(1, ANSWER + 1)
        for pair in pairs
    ]
    model.train()

    def reward(texts: list[list[int]]) -> torch.Tensor:
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for n, text in enumerate(texts):
            ids[n, : len(text)], mask[n, : len(text)] = torch.tensor(text), 1
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]

    def backward() -> float:
        total = 0.0
        for at in range(0, len(rows), MICRO_BATCH // 2):
            part = rows[at : at + MICRO_BATCH // 2]
            chosen, rejected = reward([r[0] for r in part] + [r[1] for r in part]).chunk(2)
            loss = -F.logsigmoid(chosen - rejected).sum() / len(rows)
            loss.backward()
            total += loss.item()
        return total

    return backward


def full_sequence(model: torch.nn.Module, pairs: list[dict]):
    texts = [p["prompt_ids"] + p[side] for side in ("chosen_ids", "rejected_ids") for p in pairs]
    ids = torch.tensor(texts)
    model.train()

    def backward() -> float:
        chosen, rejected = model(input_ids=ids, use_cache=False).logits[:, 0].chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        loss.backward()
        return loss.item()

    return backward


def step(backward, optimiser) -> tuple[float, float, float]:
    """Loss and gradient norm of one optimiser step, and its CPU seconds (over all threads), which a
    busy machine does not stretch."""
    optimiser.zero_grad(set_to_none=True)
    start = time.process_time()
    loss = backward()
    middle = time.process_time()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    norm = float(sum((p.grad**2).sum() for p in parameters) ** 0.5)
    resumed = time.process_time()
    optimiser.step()
    return loss, norm, time.process_time() - resumed + middle - start


def speed(pairs: list[dict], turns: int) -> dict:
    """One step each way, in turns; the learning rate is so small that the weights stay the same."""
    model = make_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    functions = {"one pass": one_pass(model, pairs), "exploded": exploded(model, pairs)}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-12, weight_decay=0.0)
    best = dict.fromkeys(functions, float("inf"))
    step(functions["one pass"], optimiser)  # the optimiser's state
    for _ in range(turns):
        seen = []
        for name in ("one pass", "exploded", "one pass"):
            *result, seconds = step(functions[name], optimiser)
            best[name] = min(best[name], seconds)
            seen.append(result)
        for mine, theirs in zip(seen[0], seen[1], strict=True):
            require(abs(mine - theirs) <= 1e-3 * abs(theirs), f"loss and gradient norm {seen}")
    return {
        "pairs": len(pairs),
        "prompt": len(pairs[0]["prompt_ids"]),
        "rows": 2 * len(pairs) * ANSWER,
        "one pass CPU s": best["one pass"],
        "exploded CPU s": best["exploded"],
        "ratio": best["exploded"] / best["one pass"],
    }


def peak(kind: str, pairs: list[dict]) -> tuple[float, float]:
    """Peak resident MiB of two steps, and by how much that is above the model alone."""
    model = make_model()
    make = one_pass if kind == "prefix" else full_sequence
    backward = make(model, pairs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for _ in range(2):
        step(backward, optimiser)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return after / MIB, (after - before) / MIB


def memory(n: int, prompt: int, threads: int) -> dict:
    figures = {}
    for kind in ("prefix", "full"):
        command = [sys.executable, __file__, "--peak", kind, "--pairs", str(n)]
        command += ["--prompt", str(prompt), "--threads", str(threads)]
        output = subprocess.check_output(command, text=True, env={**os.environ})
        figures[kind] = [float(x) for x in output.split()[-2:]]
    prefix, full = figures["prefix"], figures["full"]
    return {
        "pairs": n,
        "prompt": prompt,
        "prefix MiB": prefix[0],
        "full MiB": full[0],
        "ratio": prefix[0] / full[0],
        "prefix step MiB": prefix[1],
        "full step MiB": full[1],
        "ratio step": prefix[1] / full[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--memory-pairs", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16, help="tokens before the answers")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="also write bench/results/")
    parser.add_argument("--peak", choices=["prefix", "full"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(*peak(options.peak, make_pairs(options.pairs, options.prompt)))
        return
    report(
        "training_memory", [memory(options.memory_pairs, options.prompt, options.threads)], options
    )
    report("training", [speed(make_pairs(options.pairs, options.prompt), options.turns)], options)


if __name__ == "__main__":
    main()
