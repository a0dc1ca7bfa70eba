"""Decoders of whole sequences with the study's reward models: gold reward over tokens.

    python bench/quality/decoders.py run       # resumable: a file for each task and seed
    python bench/quality/decoders.py report    # into bench/results/study.json and study_cost.png

Tasks, seeds and models are those of `study.py`, which has to be run before. All decoders are guided
by the same model of a seed, the partial-sequence one. See `bench/quality/README.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

RESULTS = HERE.parent / "results"
# Answers of support are four times as long as recipes: less of everything.
PROMPTS = {"recipe": 60, "support": 30}  # of the test prompts
BETAS = {"recipe": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0), "support": (1.0, 2.0, 4.0, 8.0)}
SIZES = {"recipe": (4, 16, 64), "support": (4, 16)}
PARTICLES = {"recipe": (4, 16), "support": (16,)}
BLOCK = {"recipe": 4, "support": 8}  # tokens
K = 10


def methods(task: Any, rewards: Any) -> dict[str, dict[str, Any]]:
    """Name -> which call of `rgtg_fast`, and its options; `rewards` [N] are those of samples of the
    language model, by which CARDS' target and temperature are set: their upper tenth, and half
    their standard deviation."""
    sizes, block = SIZES[task.name], BLOCK[task.name]
    every: dict[str, dict[str, Any]] = {}
    for n in sizes:
        every[f"best of {n}"] = {"call": "best_of", "n": n}
    for n in sizes[:2]:
        every[f"blockwise, {n}"] = {"call": "blockwise_best_of", "n": n, "block": block}
    every["CARDS"] = {
        "call": "cards",
        "reward_target": float(rewards.quantile(0.9)),
        "beta": float(rewards.std()) / 2,
        "entropy_threshold": 1.0,
        "min_segment": block // 2,
        "max_segment": 2 * block,
    }
    for n in sizes[1:]:
        # The first checkpoint is about half way through the answers.
        budget = n * (prompt_length(task) + task.max_new_tokens // 3)
        every[f"speculative rejection, {n}"] = {
            "call": "speculative_rejection",
            "n": n,
            "budget": budget,
        }
        every[f"TreeBoN, {n}"] = {"call": "treebon", "n": n, "children": 4, "layers": 4}
    for n in PARTICLES[task.name]:
        for beta in BETAS[task.name]:
            every[f"SMC, {n}, beta {beta:g}"] = {
                "call": "twisted_smc",
                "n": n,
                "beta": beta,
                "k": K,
            }
    return every


def prompt_length(task: Any) -> int:
    return len(task.tokenizer(task.prompts["test"][0])["input_ids"])


def answers(
    task: Any, model: Any, prompts: list[str], options: dict[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    """One answer to each prompt: its gold reward, KL (where a bound is known), and the tokens of
    both models without the prompt's."""
    import rgtg_fast

    own = {name: value for name, value in options.items() if name != "call"}
    call = getattr(rgtg_fast, options["call"])
    got = call(
        task.lm,
        prompts,
        reward_model=model,
        tokenizer=task.tokenizer,
        max_new_tokens=task.max_new_tokens,
        seed=seed,
        **own,
    )
    for answer in sorted(got, key=lambda one: one.index):
        assert answer.error is None, answer.error
        prompt = prompts[answer.index]
        start = len(task.tokenizer(prompt)["input_ids"])
        row = {
            "gold": gold_of(task, prompt, answer.tokens),
            "proxy": answer.reward,
            "lm": answer.cost.lm_tokens - start,
            "rm": answer.cost.reward_tokens - start,
        }
        if answer.log_z is not None:
            weighed = math.fsum(c.weight * c.reward for c in answer.candidates if c.weight)
            row["kl"] = own["beta"] * weighed - answer.log_z
        yield row


def gold_of(task: Any, prompt: str, tokens: list[int]) -> float:
    text = task.tokenizer.decode(tokens, skip_special_tokens=True)
    return task.gold(prompt, text, task.tokenizer.eos_token_id in tokens)


def sampled(
    task: Any, model: Any, prompts: list[str], beta: float, seed: int
) -> Iterator[dict[str, Any]]:
    """The same of the ratio policy, token by token."""
    from study_parts.methods import guided

    got = guided(task, model, prompts, [beta] * len(prompts), seed=seed)
    for gold, kl, proxy, length in zip(got.gold, got.kl, got.proxy, got.tokens, strict=True):
        yield {"gold": gold, "proxy": proxy, "kl": kl, "lm": length, "rm": K * length}


def run_seed(task: Any, seed: int, folder: Path) -> dict[str, Any]:
    """Of each method the rows of all prompts, in columns."""
    from study_parts.methods import base_samples, whole_rewards
    from study_parts.models import model_of

    begun = time.process_time()
    model = model_of(task, "partial", seed, folder)
    tuning = task.prompts["beta"] * 4
    rewards = whole_rewards(task, model, tuning, base_samples(task, tuning, 20_000 + seed)[0])
    prompts = task.prompts["test"][: PROMPTS[task.name]]
    columns = {}
    for name, options in methods(task, rewards).items():
        columns[name] = in_columns(answers(task, model, prompts, options, seed))
    for beta in BETAS[task.name]:
        columns[f"PARGS, beta {beta:g}"] = in_columns(sampled(task, model, prompts, beta, seed))
    return {"methods": columns, "seconds": time.process_time() - begun}


def in_columns(rows: Iterator[dict[str, Any]]) -> dict[str, list[float]]:
    every = list(rows)
    return {name: [row[name] for row in every] for name in every[0]}


def report(folder: Path, name: str, seeds: list[int]) -> dict[str, Any]:
    """Of each method gold with its interval over seeds and prompts, KL and tokens."""
    import numpy as np
    from study_parts.figures import crossed

    units = [json.loads(unit_path(folder, name, seed).read_text())["methods"] for seed in seeds]
    rows = {}
    for method in units[0]:
        column = {key: np.array([unit[method][key] for unit in units]) for key in units[0][method]}
        rows[method] = {
            "gold": crossed(column["gold"]),
            "proxy": crossed(column["proxy"]),
            "forward_tokens": {key: float(column[key].mean()) for key in ("lm", "rm")},
        }
        if "kl" in column:
            rows[method]["kl"] = float(column["kl"].mean())
        if method.startswith("SMC"):
            rows[method]["less PARGS at its KL"] = at_equal_kl(units, method)
    return rows


def at_equal_kl(units: list[dict[str, Any]], method: str) -> dict[str, float] | None:
    """Gold of `method` less that of PARGS, interpolated by seed where its KL is the method's (a
    bound of it, which favours PARGS); None where a seed's PARGS does not reach it."""
    import numpy as np
    from study_parts.figures import between, crossed

    gaps = []
    for unit in units:
        points = [rows for name, rows in unit.items() if name.startswith("PARGS")]
        spent = np.array([np.mean(point["kl"]) for point in points])
        kl = float(np.mean(unit[method]["kl"]))
        if not spent[0] < kl <= spent[-1]:
            return None
        gold = np.array([point["gold"] for point in points])
        gaps.append(np.array(unit[method]["gold"]) - between(gold, spent, kl))
    return crossed(gaps)


def markdown(name: str, rows: dict[str, Any]) -> list[str]:
    lines = [f"| {name} | gold | KL (nats) | LM + RM tokens | less PARGS at its KL |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for method, row in rows.items():
        kl = f"{row['kl']:.2f}" if "kl" in row else "-"
        gap = row.get("less PARGS at its KL")
        shown = "-" if gap is None else f"{gap['mean']:+.2f} ± {gap['ci95']:.2f}"
        cost = row["forward_tokens"]
        lines.append(
            f"| {method} | {row['gold']['mean']:+.2f} ± {row['gold']['ci95']:.2f} | {kl} "
            f"| {cost['lm']:.0f} + {cost['rm']:.0f} | {shown} |"
        )
    return lines


def unit_path(folder: Path, name: str, seed: int) -> Path:
    return folder / name / f"seed{seed}_decoders.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--folder", type=Path, default=Path("build/study"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--task", choices=("recipe", "support"), action="append")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from study_parts import tasks
    from study_parts.plots import cost_plot
    from study_parts.units import rounded, write_json
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()
    names = args.task or ["recipe", "support"]
    if args.what == "report":
        record = json.loads((args.results / "study.json").read_text())
        for name in names:
            rows = rounded(report(args.folder, name, args.seeds))
            record["tasks"][name]["decoders"] = rows
            print("\n".join([*markdown(name, rows), ""]))
        (args.results / "study.json").write_text(json.dumps(record, indent=1) + "\n")
        cost_plot(record["tasks"], args.results / "study_cost.png")
        return
    make = {"recipe": lambda: tasks.recipe_task(args.folder), "support": tasks.support_task}
    for name in names:
        task = make[name]()
        for seed in args.seeds:
            path = unit_path(args.folder, name, seed)
            if not path.exists():
                found = run_seed(task, seed, args.folder)
                write_json(path, found)
                print(f"{name}, seed {seed}: {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
