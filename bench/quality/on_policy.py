"""What rounds of on-policy refinement buy: gold at equal KL before and after each.

    nice -n 19 python bench/quality/on_policy.py run      # resumable: a file for each seed
    nice -n 19 python bench/quality/on_policy.py report   # bench/results/on_policy.json, a table

The tasks, pairs and language models are those of `study.py`. See `bench/quality/README.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

RESULTS = HERE.parent / "results"
KLS = (1.0, 2.0, 4.0)
ROUNDS, SAMPLES, BETA = 3, 4, 4.0
PROMPTS = {"recipe": 270, "support": 400}  # of a round
MARK = {"recipe": " sour :", "support": " agent :"}  # the end of a prompt
GRID = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def judge_of(task: Any) -> Any:
    """The gold reward of texts prompt + answer."""

    def gold(texts: list[str]) -> list[float]:
        parts = (text.partition(MARK[task.name]) for text in texts)
        return [task.gold(prompt + mark, answer, True) for prompt, mark, answer in parts]

    return gold


def config_of(task: Any, seed: int, folder: Path) -> dict[str, Any]:
    """The config of a seed's rounds; its models, pairs and prompts are written to `folder`."""
    from small_models import SCHEDULE
    from study_parts.training import initial_model, training_pairs

    begin, lm = folder / "begin", folder / "lm"
    if not (folder / "prompts.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for model, path in ((initial_model(task, "partial"), begin), (task.lm, lm)):
            model.save_pretrained(path)
            task.tokenizer.save_pretrained(path)
        write_rows(folder / "pairs.jsonl", training_pairs(task, seed))
        prompts = [{"prompt": prompt} for prompt in task.prompts["train"]]
        write_rows(folder / "prompts.jsonl", prompts)
    schedule = {n: v for n, v in SCHEDULE.items() if n != "save_strategy"}
    return schedule | {
        "model": str(begin),
        "train": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "rounds"),
        "learning_rate": task.learning_rate,
        "per_device_train_batch_size": task.sizes.batch,
        "num_train_epochs": task.sizes.epochs,
        "warmup_steps": 10,
        "seed": seed,
        "on_policy": {
            "lm": str(lm),
            "prompts": str(folder / "prompts.jsonl"),
            "prompts_per_round": PROMPTS[task.name],
            "judge": judge_of(task),
            "draw": True,  # as the labels of the given pairs were drawn
            "rounds": ROUNDS,
            "samples": SAMPLES,
            "beta": BETA,
            "k": 10,
            "max_new_tokens": task.max_new_tokens,
            "batch_size": 128,
        },
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def frontier(task: Any, guide: Any, seed: int, betas: tuple[float, ...] = GRID) -> list[dict]:
    """Mean gold and KL at each β, over the test prompts."""
    from study_parts.methods import guided

    prompts = [p for p in task.prompts["test"] for _ in range(task.sizes.draws)]
    points = []
    for beta in betas:
        answers = guided(task, guide, prompts, [beta] * len(prompts), seed=seed)
        points.append({"beta": beta, "gold": mean(answers.gold), "kl": mean(answers.kl)})
    return points


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def run_seed(task: Any, seed: int, folder: Path) -> dict[str, Any]:
    """Frontiers of the reward model on the given pairs, after each round, and of one trained on the
    given pairs and as many more from the same source as the last round has of its own."""
    import torch
    from study_parts.methods import base_samples
    from study_parts.training import make_pairs, train
    from transformers import LlamaForSequenceClassification

    from rgtg_fast.on_policy import train_on_policy

    begun = time.process_time()
    here = folder / task.name / f"seed{seed}"
    metrics = train_on_policy(config_of(task, seed, here))
    found: dict[str, Any] = {"rounds": metrics["rounds"], "frontier": {}}
    prompts = [p for p in task.prompts["test"] for _ in range(task.sizes.draws)]
    found["base"] = mean(base_samples(task, prompts, seed)[1])
    for number in range(ROUNDS + 1):
        path = here / "rounds" / f"round-{number}"
        model = LlamaForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
        found["frontier"][f"round {number}"] = frontier(task, model, seed)
    last = metrics["rounds"][-1]
    count = last["given"] + last["earlier"] + last["own"]
    more = make_pairs(task, task.prompts["train"], count, 1000 + seed)
    found["frontier"]["more pairs"] = frontier(task, train(task, "partial", more, seed), seed)
    found["seconds"] = time.process_time() - begun
    return found


def at_kl(points: list[dict], base: float, kl: float) -> float:
    """Gold at a KL between neighbouring points, of which the base policy is the first; NaN beyond
    the last."""
    import numpy as np

    ordered = sorted([(p["kl"], p["gold"]) for p in points])
    xs, ys = zip((0.0, base), *ordered, strict=True)
    return float(np.interp(kl, xs, ys, right=float("nan")))


def interval(values: list[float]) -> dict[str, float]:
    """Mean and the 95 % half-width of Student's distribution over seeds."""
    import numpy as np
    from scipy import stats

    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else float("nan")
    return {"mean": float(np.mean(values)), "ci95": float(half)}


def report(folder: Path, tasks: list[str], seeds: list[int]) -> dict[str, Any]:
    """Of each task: gold at equal KL, and its difference to that before the rounds."""
    figures: dict[str, Any] = {}
    for name in tasks:
        units = [json.loads((folder / name / f"seed{s}.json").read_text()) for s in seeds]
        first, rows = "round 0", {}
        for method in units[0]["frontier"]:
            gold = {kl: [at_kl(u["frontier"][method], u["base"], kl) for u in units] for kl in KLS}
            before = {kl: [at_kl(u["frontier"][first], u["base"], kl) for u in units] for kl in KLS}
            rows[method] = {
                f"{kl:g}": interval(gold[kl])
                | {"change": interval([a - b for a, b in zip(gold[kl], before[kl], strict=True)])}
                for kl in KLS
            }
            best = [max(p["gold"] for p in u["frontier"][method]) for u in units]
            rows[method]["best"] = interval(best)
        figures[name] = {
            "seeds": seeds,
            "gold": rows,
            "base": interval([u["base"] for u in units]),
            "rounds": [u["rounds"] for u in units],
            "seconds": [u["seconds"] for u in units],
        }
        print("\n".join(table(name, rows)))
    return figures


def table(name: str, rows: dict[str, Any]) -> list[str]:
    """Markdown."""
    head = [f"gold at {kl:g} nats (change)" for kl in KLS]
    lines = [f"| {name} | {' | '.join(head)} | own best β |", "| --- |" + " --- |" * (len(KLS) + 1)]
    for method, row in rows.items():
        cells = []
        for kl in KLS:
            value = row[f"{kl:g}"]
            change = f" ({pm(value['change'])})" if method != "round 0" else ""
            cells.append(f"{value['mean']:+.2f}{change}")
        lines.append(f"| {method} | {' | '.join(cells)} | {pm(row['best'])} |")
    return lines


def pm(value: dict[str, float]) -> str:
    return f"{value['mean']:+.2f} ± {value['ci95']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--folder", type=Path, default=Path("build/on_policy"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--task", choices=("recipe", "support"), action="append")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import transformers
    from study_parts import tasks

    names = args.task or ["recipe", "support"]
    if args.what == "report":
        figures = report(args.folder, names, args.seeds)
        (args.results / "on_policy.json").write_text(json.dumps(figures, indent=1) + "\n")
        return
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args.folder.mkdir(parents=True, exist_ok=True)
    make = {"recipe": lambda: tasks.recipe_task(args.folder), "support": tasks.support_task}
    for name in names:
        task = make[name]()
        for seed in args.seeds:
            path = args.folder / name / f"seed{seed}.json"
            if not path.exists():
                found = run_seed(task, seed, args.folder)
                path.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
