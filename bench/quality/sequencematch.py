"""What SequenceMatch changes: the language model of `recipe` trained on, with and without a token
that undoes one, decoded unguided and guided.

    nice -n 10 python bench/quality/sequencematch.py run      # resumable: a file for each seed
    nice -n 10 python bench/quality/sequencematch.py report   # bench/results/sequencematch.json

Task, language model and reward models are those of `study.py`. See `bench/quality/README.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

RESULTS = HERE.parent / "results"
ROWS, EPOCHS, BATCH, RATE = 6000, 6, 64, 3e-3  # settled on seed 0
SLIPS = 0.3
ARMS: dict[str, dict[str, Any]] = {
    "likelihood": {"slip_rate": 0.0, "match_share": 0.0},
    "likelihood, slips": {"slip_rate": SLIPS, "match_share": 0.0},
    "SequenceMatch": {"slip_rate": SLIPS, "match_share": 0.5, "gamma": 0.99, "alpha": 0.1},
}
TEMPERATURES = (1.0, 1.5)
BETAS = (0.5, 1.0, 2.0, 4.0, 8.0)
DRAWS = 4


def answers(task: Any, seed: int) -> list[dict[str, list[int]]]:
    """Replies of the grammar to imitate, each with one of the language model to the same prompt."""
    from study_parts.methods import base_samples

    rng = random.Random(5000 + seed)
    prompts = [rng.choice(task.prompts["train"]) for _ in range(ROWS)]
    ids, *_ = base_samples(task, prompts, 5000 + seed)
    pad, eos = task.tokenizer.pad_token_id, task.tokenizer.eos_token_id
    rows = []
    for prompt, own in zip(prompts, ids.tolist(), strict=True):
        reply = task.sample_reply(prompt, rng)
        start, answer = task.tokenizer([prompt, reply])["input_ids"]
        own = [token for token in own if token != pad]
        rows.append({"prompt_ids": start, "answer_ids": [*answer, eos], "own_ids": own})
    return rows


def trained(task: Any, arm: str, rows: list[dict], seed: int) -> tuple[Any, Any]:
    """The language model trained on in this way, and its tokenizer."""
    import small_models
    import torch

    from rgtg_fast.training import add_backspace

    torch.manual_seed(seed)
    model, tokenizer = copy.deepcopy(task.lm), copy.deepcopy(task.tokenizer)
    add_backspace(model, tokenizer)
    if not ARMS[arm]["match_share"]:  # own answers have no part in the likelihood
        rows = [{k: v for k, v in row.items() if k != "own_ids"} for row in rows]
    small_models.reward_trainer(
        model,
        tokenizer,
        rows,
        loss_type="sequencematch",
        learning_rate=RATE,
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        seed=seed,
        **ARMS[arm],
    ).train()
    return model.eval(), tokenizer


def undoing(task: Any, model: Any, seed: int) -> dict[str, float]:
    """Mean probability of the backspace behind a wrong token put into a grammar's reply to a test
    prompt, and behind the right ones, and how often it is above a half; and -log π of a reply's
    tokens."""
    import torch

    rng = random.Random(seed)
    back = model.config.backspace_token_id
    found: dict[str, list[float]] = {"wrong": [], "right": [], "nll": []}
    for prompt in task.prompts["test"]:
        start, answer = task.tokenizer([prompt, task.sample_reply(prompt, rng)])["input_ids"]
        answer = [*answer, task.tokenizer.eos_token_id]
        for at in range(len(answer)):
            right = answer[at]
            others = set(range(3, back)) - {right}  # of pad, EOS and unknown none is a slip
            both = torch.tensor([[*start, *answer[:at], t] for t in (right, rng.choice([*others]))])
            with torch.no_grad():
                logp = model(both).logits.log_softmax(-1)
            found["nll"].append(-float(logp[0, -2, right]))
            if right != task.tokenizer.eos_token_id:  # an answer ends with it
                found["right"].append(float(logp[0, -1, back].exp()))
                found["wrong"].append(float(logp[1, -1, back].exp()))
    shares = {f"{k} undone": float(sum(p > 0.5 for p in v) / len(v)) for k, v in found.items()}
    means = {k: sum(v) / len(v) for k, v in found.items()}
    return means | {k: v for k, v in shares.items() if not k.startswith("nll")}


def decoded(
    task: Any, model: Any, tokenizer: Any, split: str, seed: int, **options: Any
) -> dict[str, float]:
    """Means over the answers to the split's prompts: gold reward, words that belong to no step,
    tokens taken back, and draws for each token."""
    from study_parts.recipe import parse

    import rgtg_fast

    prompts = task.prompts[split] * DRAWS
    rows = []
    for answer in rgtg_fast.backtracking(
        model,
        prompts,
        backspace_token_id=model.config.backspace_token_id,
        tokenizer=tokenizer,
        max_new_tokens=task.max_new_tokens,
        batch_size=64,
        seed=seed,
        **options,
    ):
        assert answer.error is None, answer.error
        finished = answer.tokens[-1:] == [task.tokenizer.eos_token_id]
        text = task.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        rows.append(
            {
                "gold": task.gold(prompts[answer.index], text, finished),
                "slips": parse(text)[1],
                "undone": answer.undone,
                "draws": answer.steps / max(len(answer.tokens), 1),
            }
        )
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def run_seed(task: Any, seed: int, folder: Path) -> dict[str, Any]:
    """Every arm of a seed: what is undone, and what is decoded unguided and guided."""
    from study_parts.models import model_of

    rows, out = answers(task, seed), {}
    guide = model_of(task, "partial", seed, folder)
    for arm in ARMS:
        started = time.process_time()
        model, tokenizer = trained(task, arm, rows, seed)
        seconds = {"train": time.process_time() - started}
        figures: dict[str, Any] = {"undoing": undoing(task, model, seed)}
        for temperature in TEMPERATURES:
            options = {"temperature": temperature, "k": None}
            figures[f"unguided, T = {temperature:g}"] = decoded(
                task, model, tokenizer, "test", seed, **options
            )
        guided: dict[str, Any] = {"beta": {}, "test": {}}
        for split in guided:
            for beta in BETAS:
                guided[split][f"{beta:g}"] = decoded(
                    task, model, tokenizer, split, seed, reward_model=guide, k=10, beta=beta
                )
        best = max(guided["beta"], key=lambda beta: guided["beta"][beta]["gold"])
        figures |= {"guided": guided["test"], "best": best}
        seconds["decode"] = time.process_time() - started - seconds["train"]
        out[arm] = figures | {"seconds": seconds}
        print(seed, arm, json.dumps(figures), flush=True)
    return out


def figures_of(unit: dict[str, Any]) -> dict[str, float]:
    """One seed's figures of one arm by name."""
    named = {f"undoing: {key}": value for key, value in unit["undoing"].items()}
    for name, values in unit.items():
        if name.startswith("unguided"):
            named |= {f"{name}: {key}": value for key, value in values.items()}
    for beta, values in unit["guided"].items():
        named |= {f"guided, beta {beta}: {key}": value for key, value in values.items()}
    best = unit["guided"][unit["best"]]
    return named | {f"guided, own best beta: {key}": value for key, value in best.items()}


def report(units: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Each arm's figures over seeds, and their changes from the likelihood, paired by seed."""
    from study_parts.figures import over_seeds

    every = {arm: [figures_of(unit[arm]) for unit in units.values()] for arm in ARMS}
    before = every[next(iter(ARMS))]
    found: dict[str, Any] = {"seeds": list(units), "settings": ARMS, "raw": units, "arms": {}}
    for arm, rows in every.items():
        found["arms"][arm] = {
            name: over_seeds([row[name] for row in rows])
            | {"change": over_seeds([r[name] - s[name] for r, s in zip(rows, before, strict=True)])}
            for name in rows[0]
        }
    return found


def table(found: dict[str, Any]) -> list[str]:
    """Markdown: a row for each figure."""
    arms = found["arms"]
    lines = [f"| | {' | '.join(arms)} |", "| --- |" + " --- |" * len(arms)]
    for name in next(iter(arms.values())):
        cells = [pm(rows[name]) for rows in arms.values()]
        changes = [f" ({pm(rows[name]['change'], '+')})" for rows in arms.values()]
        changes[0] = ""
        cells = [cell + change for cell, change in zip(cells, changes, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def pm(value: dict[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} ± {value['ci95']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--folder", type=Path, default=Path("build/sequencematch"))
    parser.add_argument("--study", type=Path, default=Path("build/study"), help="of the models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    paths = {seed: args.folder / f"seed{seed}.json" for seed in args.seeds}
    if args.what == "report":
        found = report({seed: json.loads(path.read_text()) for seed, path in paths.items()})
        (args.results / "sequencematch.json").write_text(json.dumps(found, indent=1) + "\n")
        print("\n".join(table(found)))
        return
    import torch
    import transformers
    from study_parts import tasks
    from study_parts.units import write_json

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task = tasks.recipe_task(args.study)
    for seed, path in paths.items():
        if not path.exists():
            write_json(path, run_seed(task, seed, args.study))


if __name__ == "__main__":
    main()
