"""Decoders of whole sequences on the enumerable task: gold reward over tokens and over divergence.

    python bench/quality/sequences.py     # bench/results/sequences.json and sequences.png

The reward that guides is the gold reward itself, of the text so far as if it were finished, so that
the optimum π*(y) ∝ π(y) exp(β gold(y)) is known exactly and nothing is due to a trained model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

RESULTS = HERE.parent / "results"
BETAS = (0.5, 1.0, 2.0, 4.0)
PARTICLES = (1, 4, 16, 64)


class Gold:
    """The gold rewards of texts, prompt and answer; and how many were asked for."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def __call__(self, texts: list[str]) -> list[float]:
        rewards = []
        for text in texts:
            prompt, reply = text.split(" :", 1)
            rewards.append(self.task.gold(prompt + " :", reply.strip(), True))
        return rewards


def methods(beta_of_cards: float) -> dict[str, dict[str, Any]]:
    """Name -> which call, and its options."""
    every: dict[str, dict[str, Any]] = {}
    for n in (1, 4, 16, 64):
        every[f"best of {n}"] = {"call": "best_of", "n": n, "best_of": n}
    for n in (4, 16):
        every[f"blockwise, {n} of 4 tokens"] = {"call": "blockwise_best_of", "n": n, "block": 4}
    for target in (0.0, 1.0, 2.0):
        every[f"CARDS, r* = {target:g}"] = {
            "call": "cards", "reward_target": target, "entropy_threshold": 1.0, "min_segment": 2,
            "max_segment": 8, "beta": beta_of_cards, "batch_size": 32,
        }  # fmt: skip
    for n in (16, 64):
        every[f"speculative rejection of {n}"] = {
            "call": "speculative_rejection", "n": n, "budget": 20 * n,
        }  # fmt: skip
        every[f"TreeBoN of {n}"] = {"call": "treebon", "n": n, "children": 4, "layers": 4}
    for n in PARTICLES:
        for beta in BETAS:
            every[f"SMC, {n} particles, beta {beta:g}"] = {
                "call": "twisted_smc", "n": n, "beta": beta, "k": 20,
            }  # fmt: skip
    return every


def best_of_exactly(tree: Any, n: int) -> tuple[float, float]:
    """Expected gold reward and KL from the base of best of n over the tree, ties to the first."""
    import torch

    base = tree.probability / tree.probability.sum()
    levels, which = tree.gold.unique(return_inverse=True)
    mass = torch.zeros(len(levels), dtype=base.dtype).index_add_(0, which, base)
    upto = mass.cumsum(0).clamp(max=1.0)
    below = upto - mass
    share = upto**n - below.clamp(min=0.0) ** n  # of each level; within it texts are as under π
    log_ratio = torch.where(share > 0, (share / mass).log(), 0.0)
    return float((share * levels).sum()), float((share * log_ratio).sum())


def runs(task: Any, prompts: list[str], draws: int, seed: int) -> Iterator[tuple[str, list[dict]]]:
    """Each method's answers: gold reward, cost, and where it is known (a bound of) the KL."""
    import rgtg_fast

    gold = Gold(task)
    repeated = [prompt for prompt in prompts for _ in range(draws)]
    common = {"reward_model": gold, "tokenizer": task.tokenizer, "seed": seed}
    common["max_new_tokens"] = task.max_new_tokens
    for name, options in methods(0.5).items():
        own = {key: value for key, value in options.items() if key not in ("call", "best_of")}
        call: Callable[..., Any] = getattr(rgtg_fast, options["call"])
        rows = []
        for answer in call(task.lm, repeated, **common, **own):
            assert answer.error is None, answer.error
            row = {"prompt": answer.index // draws, "gold": answer.reward} | vars(answer.cost)
            if answer.log_z is not None:
                weighed = sum(c.weight * c.reward for c in answer.candidates)
                row |= {"log_z": answer.log_z, "mean": weighed}
                # E of it bounds KL(q | π): by the extended space of the particle filter.
                row["kl"] = own["beta"] * weighed - answer.log_z
            rows.append(row)
        yield name, rows
    for beta in BETAS:
        rows = []
        for answer in rgtg_fast.generate_many(
            task.lm, repeated, k=20, beta=beta, batch_size=64, do_sample=True, top_k=0, **common
        ):
            assert answer.error is None, answer.error
            rows.append(
                {
                    "prompt": answer.index // draws,
                    "gold": gold([repeated[answer.index] + " " + answer.text])[0],
                    "kl": math.fsum(answer.kl),
                    "lm_tokens": len(task.tokenizer(repeated[0])["input_ids"])
                    + len(answer.tokens) - 1,
                    "rewards": 20 * len(answer.tokens),
                }
            )  # fmt: skip
        yield f"ratio policy, beta {beta:g}", rows


def summary(rows: list[dict]) -> dict[str, Any]:
    """Means over the prompts, with 95 % intervals of gold."""
    import numpy as np

    count = 1 + max(row["prompt"] for row in rows)
    out: dict[str, Any] = {}
    for key in ("gold", "kl", "lm_tokens", "rewards", "cache_bytes", "log_z", "mean"):
        if key in rows[0]:
            of = [[row[key] for row in rows if row["prompt"] == i] for i in range(count)]
            means = np.array([np.mean(values) for values in of])
            out[key] = float(means.mean())
            if key == "gold":  # of the draws: the prompts are what they are
                error = np.sqrt(np.mean([np.var(v, ddof=1) / len(v) for v in of]) / count)
                out["interval"] = float(1.96 * error)
    return out


def measure(task: Any, count: int, draws: int, seed: int) -> dict[str, Any]:
    import numpy as np
    import torch
    from study_parts.exact import OPTIMAL_BETAS, enumerate_tree, optimal_policy

    prompts = task.prompts["test"][:count]
    trees = [enumerate_tree(task, prompt) for prompt in prompts]
    optimum = np.array([[optimal_policy(tree, b) for b in OPTIMAL_BETAS] for tree in trees])
    lines, errors = {}, {}
    exact_z = {
        beta: [float((tree.probability.log() + beta * tree.gold).logsumexp(0)) for tree in trees]
        for beta in BETAS
    }
    for name, rows in runs(task, prompts, draws, seed):
        lines[name] = summary(rows)
        if "log_z" in rows[0]:
            beta = float(name.split()[-1])
            mean = [optimal_policy(tree, beta)[0] for tree in trees]
            off_z = [row["log_z"] - exact_z[beta][row["prompt"]] for row in rows]
            off = [row["mean"] - mean[row["prompt"]] for row in rows]
            errors[name] = {
                "log_z": float(torch.tensor(off_z).square().mean().sqrt()),
                "gold": float(torch.tensor(off).square().mean().sqrt()),
            }
        print(name, {key: round(value, 3) for key, value in lines[name].items()}, flush=True)
    best = np.array([[best_of_exactly(tree, n) for n in (1, 4, 16, 64)] for tree in trees])
    return {
        "task": task.name,
        "prompts": count,
        "draws": draws,
        "seed": seed,
        "mass": float(np.mean([float(tree.probability.sum()) for tree in trees])),
        "optimum": {
            "beta": list(OPTIMAL_BETAS),
            "gold": optimum[:, :, 0].mean(0).tolist(),
            "kl": optimum[:, :, 1].mean(0).tolist(),
        },
        "best_of_exactly": {
            str(n): {"gold": float(g), "kl": float(kl)}
            for n, (g, kl) in zip((1, 4, 16, 64), best.mean(0), strict=True)
        },
        "methods": lines,
        "smc_errors": errors,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (tokens, divergence, errors) = plt.subplots(1, 3, figsize=(16, 4.8))
    families = {
        "best of": "C0o-", "blockwise": "C1s-", "CARDS": "C2^-", "speculative rejection": "C3v-",
        "TreeBoN": "C4D-", "SMC, 16": "C5P-", "ratio policy": "C6x-",
    }  # fmt: skip
    for family, style in families.items():
        lines = [v for name, v in result["methods"].items() if name.startswith(family)]
        gold, spread = [x["gold"] for x in lines], [x["interval"] for x in lines]
        tokens.errorbar([x["lm_tokens"] for x in lines], gold, spread, fmt=style, label=family)
        if "kl" in lines[0]:
            divergence.errorbar([x["kl"] for x in lines], gold, spread, fmt=style, label=family)
    exactly = result["best_of_exactly"].values()
    divergence.plot(
        [x["kl"] for x in exactly], [x["gold"] for x in exactly], "C0o-", label="best of"
    )
    divergence.plot(result["optimum"]["kl"], result["optimum"]["gold"], "k--", label="optimum")
    tokens.set_xscale("log", base=2)
    tokens.set(xlabel="tokens of the language model", ylabel="gold reward")
    divergence.set(xlabel="KL from the base, nats (of SMC a bound)", ylabel="gold reward")
    for i, beta in enumerate(BETAS):
        for key, style in (("log_z", f"C{i}-"), ("gold", f"C{i}--")):
            values = [
                result["smc_errors"][f"SMC, {n} particles, beta {beta:g}"][key] for n in PARTICLES
            ]
            errors.plot(PARTICLES, values, style, label=f"{key}, beta {beta:g}")
    errors.set(xscale="log", yscale="log", xlabel="particles", ylabel="RMS error against the tree")
    for axis in (tokens, divergence, errors):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/study"), help="of the models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--draws", type=int, default=8, help="of each prompt")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch
    from study_parts import tasks

    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    result = measure(tasks.recipe_task(args.folder), args.prompts, args.draws, args.seed)
    (args.results / "sequences.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.results / "sequences.png")


if __name__ == "__main__":
    main()
