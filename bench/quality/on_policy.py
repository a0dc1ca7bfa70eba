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
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

RESULTS = HERE.parent / "results"
KLS = (1.0, 2.0, 4.0)
ROUNDS, SAMPLES, BETA = 3, 4, 4.0
PROMPTS = {"recipe": 270, "support": 400}  # of a round
MARK = {"recipe": " sour :", "support": " agent :"}  # the end of a prompt
COPG_BETAS, DISTILL_BETAS, TUNING_EPOCHS = (2.0, 1.0, 0.5, 0.25), (1.0, 2.0, 4.0), 4
GRID = {"recipe": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0), "support": (1.0, 2.0, 4.0, 8.0)}


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


def frontier(task: Any, guide: Any, seed: int) -> list[dict]:
    """Mean gold and KL at each β, over the test prompts."""
    from study_parts.methods import guided

    prompts = [p for p in task.prompts["test"] for _ in range(task.sizes.draws)]
    points = []
    for beta in GRID[task.name]:
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


def copg(task: Any, seed: int, folder: Path) -> dict[str, Any]:
    """Gold and KL of plain samples of the language model after CoPG on the scored pairs of all
    rounds, at each of COPG_BETAS."""
    rounds = folder / task.name / f"seed{seed}" / "rounds"
    rows = [
        json.loads(line)
        for number in range(1, ROUNDS + 1)
        for line in (rounds / f"round-{number}" / "own_pairs.jsonl").read_text().splitlines()
    ]
    return {
        f"{beta:g}": tuned(task, seed, rows, loss_type="copg", beta=beta) for beta in COPG_BETAS
    }


def distilled(task: Any, seed: int, folder: Path) -> dict[str, Any]:
    """The same of the language model distilled from the policy that the last round's reward model
    guides, at each of DISTILL_BETAS, on as many answers as the rounds have drawn."""
    import torch
    from transformers import LlamaForSequenceClassification

    from rgtg_fast.training import guided_rows

    path = folder / task.name / f"seed{seed}" / "rounds" / f"round-{ROUNDS}"
    rm = LlamaForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    prompts = task.prompts["train"]
    asked = [prompts[n % len(prompts)] for n in range(ROUNDS * SAMPLES * PROMPTS[task.name])]
    options = {"k": 10, "max_new_tokens": task.max_new_tokens, "batch_size": 256, "seed": seed}
    found = {}
    for beta in DISTILL_BETAS:
        rows = guided_rows(
            task.lm, asked, reward_model=rm, tokenizer=task.tokenizer, beta=beta, **options
        )
        found[f"{beta:g}"] = tuned(task, seed, list(rows), loss_type="distill")
    return found


def tuned(task: Any, seed: int, rows: list[dict], **options: Any) -> dict[str, float]:
    """Gold and KL of plain samples of a copy of the language model trained on `rows`."""
    import copy

    import torch
    from small_models import reward_trainer
    from study_parts.methods import base_samples

    torch.manual_seed(seed)
    lm = copy.deepcopy(task.lm)
    reward_trainer(
        lm,
        task.tokenizer,
        rows,
        learning_rate=1e-3,
        per_device_train_batch_size=64,
        num_train_epochs=TUNING_EPOCHS,
        seed=seed,
        **options,
    ).train()
    prompts = [p for p in task.prompts["test"] for _ in range(task.sizes.draws)]
    ids, gold, _ = base_samples(replace(task, lm=lm.eval()), prompts, seed)
    kl = mean((_logp(task, lm, prompts, ids) - _logp(task, task.lm, prompts, ids)).tolist())
    return {"gold": mean(gold), "kl": kl}


def _logp(task: Any, lm: Any, prompts: list[str], ids: Any) -> Any:
    """log π(y) [N] of answers [N, T], padded behind their EOS."""
    import torch

    inputs = task.tokenizer(prompts, return_tensors="pt", padding=True)
    width, pad = inputs["input_ids"].shape[1], task.tokenizer.pad_token_id
    whole = torch.cat([inputs["input_ids"], ids], 1)
    mask = torch.cat([inputs["attention_mask"], (ids != pad).long()], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = lm(whole, attention_mask=mask, position_ids=places).logits[:, width - 1 : -1]
    picked = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return (picked * (ids != pad)).sum(1)


def at_kl(points: list[dict], base: float, kl: float) -> float:
    """Gold at a KL between neighbouring points, of which the base policy is the first; NaN beyond
    the last."""
    import numpy as np

    ordered = sorted([(p["kl"], p["gold"]) for p in points])
    xs, ys = zip((0.0, base), *ordered, strict=True)
    return float(np.interp(kl, xs, ys, right=float("nan")))


def report(folder: Path, tasks: list[str], seeds: list[int]) -> dict[str, Any]:
    """Of each task: gold at equal KL, and its difference to that before the rounds; of the seeds
    that have been run."""
    from study_parts.figures import over_seeds

    figures: dict[str, Any] = {}
    for name in tasks:
        paths = {seed: folder / name / f"seed{seed}.json" for seed in seeds}
        there = {
            seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()
        }
        if not there:
            raise SystemExit(f"{folder / name} holds no runs; make them with `on_policy.py run`")
        units = list(there.values())
        first, rows = "round 0", {}
        for method in units[0]["frontier"]:
            gold = {kl: [at_kl(u["frontier"][method], u["base"], kl) for u in units] for kl in KLS}
            before = {kl: [at_kl(u["frontier"][first], u["base"], kl) for u in units] for kl in KLS}
            rows[method] = {
                f"{kl:g}": over_seeds(gold[kl])
                | {"change": over_seeds([a - b for a, b in zip(gold[kl], before[kl], strict=True)])}
                for kl in KLS
            }
            best = [max(p["gold"] for p in u["frontier"][method]) for u in units]
            rows[method]["best"] = over_seeds(best)
        figures[name] = {
            "seeds": list(there),
            "gold": rows,
            "base": over_seeds([u["base"] for u in units]),
            "rounds": [u["rounds"] for u in units],
            "seconds": [u["seconds"] for u in units],
        }
        print("\n".join(table(name, rows)))
        for what in (copg, distilled):
            found = against_decoder(folder / name, what.__name__, there)
            figures[name][what.__name__] = found
            print("\n".join(["", *tuned_table(what.__name__, found)]))
    return figures


def against_decoder(folder: Path, what: str, units: dict[int, dict]) -> dict[str, Any]:
    """Of the language model tuned at each β: gold, KL, and gold less that of the decoder, guided by
    the last round's reward model, at the same KL; of the seeds that have been run."""
    from study_parts.figures import over_seeds

    paths = {seed: folder / f"seed{seed}.{what}.json" for seed in units}
    found = {s: json.loads(path.read_text()) for s, path in paths.items() if path.exists()}
    rows = {}
    for beta in next(iter(found.values()), {}):
        own = {seed: tuned_unit[beta] for seed, tuned_unit in found.items()}
        decoder = {
            s: at_kl(units[s]["frontier"][f"round {ROUNDS}"], units[s]["base"], o["kl"])
            for s, o in own.items()
        }
        rows[beta] = {
            "gold": over_seeds([o["gold"] for o in own.values()]),
            "kl": over_seeds([o["kl"] for o in own.values()]),
            "less decoder": over_seeds([o["gold"] - decoder[s] for s, o in own.items()]),
        }
    return rows


def tuned_table(what: str, rows: dict[str, Any]) -> list[str]:
    """Markdown."""
    head = f"| {what}, β | KL (nats) | gold | less the decoder's at that KL |"
    lines = [head, "| --- | --- | --- | --- |"]
    for beta, row in rows.items():
        cells = " | ".join(pm(row[key]) for key in ("kl", "gold", "less decoder"))
        lines.append(f"| {beta} | {cells} |")
    return lines


def table(name: str, rows: dict[str, Any]) -> list[str]:
    """Markdown."""
    head = [f"gold at {kl:g} nats (change)" for kl in KLS]
    lines = [f"| {name} | {' | '.join(head)} | own best β |", "| --- |" + " --- |" * (len(KLS) + 1)]
    for method, row in rows.items():
        cells = []
        for kl in KLS:
            value = row[f"{kl:g}"]
            change = f" ({pm(value['change'])})" if method != "round 0" else ""
            shown = "-" if value["mean"] is None else f"{value['mean']:+.2f}{change}"
            cells.append(shown)
        lines.append(f"| {method} | {' | '.join(cells)} | {pm(row['best'])} |")
    return lines


def pm(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    spread = "" if value["ci95"] is None else f" ± {value['ci95']:.2f}"
    return f"{value['mean']:+.2f}{spread}"


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
        path = args.results / "on_policy.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        figures = known | report(args.folder, names, args.seeds)
        path.write_text(json.dumps(figures, indent=1) + "\n")
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
            for what in (copg, distilled):
                path = args.folder / name / f"seed{seed}.{what.__name__}.json"
                if not path.exists():
                    path.write_text(json.dumps(what(task, seed, args.folder)) + "\n")


if __name__ == "__main__":
    main()
