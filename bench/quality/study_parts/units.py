"""The study's units of work: one reward model of one seed, trained, measured and decoded with.

Each writes one JSON file of raw figures, so that a study that was stopped goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from study_parts import methods
from study_parts.exact import write_exact
from study_parts.methods import KIND, Answers
from study_parts.tasks import Task
from study_parts.training import KINDS, make_pairs, margins, right_by_decile, train

BEST_OF = (4, 16)
TOP_K = (2, 5, 10)
EVAL_SEED = 7


def run_unit(task: Task, kind: str, seed: int, path: Path) -> None:
    """Train `kind`, measure its accuracy by prefix length, decode with it, write `path`."""
    started = time.process_time()
    model = train(task, kind, seed)
    trained = time.process_time()
    pairs = make_pairs(task, task.prompts["eval"], task.sizes.eval_pairs, EVAL_SEED, noisy=False)
    margin, labels = margins(task, kind, model, pairs)
    raw: dict[str, Any] = {"right": right_by_decile(margin, labels)}
    if task.enumerable:
        raw["margins"] = [[round(float(v), 4) for v in row] for row in margin]
    guide = methods.guide_of(kind, model)
    raw["methods"] = {
        name: _over_beta(task, name, guide, seed) for name, of in KIND.items() if of == kind
    }
    if kind == "full":
        raw |= _unguided(task, model, seed)
    raw["seconds"] = {
        "train": round(trained - started, 2),
        "decode": round(time.process_time() - trained, 2),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(_rounded(raw)))
    partial.rename(path)


def _over_beta(task: Task, name: str, guide: Any, seed: int) -> dict[str, Any]:
    """Answers at every β of the method's grid: to the `beta` prompts (`tuning`) and `draws` times
    to the `test` prompts; and at other k, at the β that was best on the `beta` prompts."""
    betas = task.betas[name]
    greedy = name.endswith("-G")
    tune, test = task.prompts["beta"], task.prompts["test"]
    # More draws make a sampled policy's mean sharper; a greedy one would say the same again.
    draws = 1 if greedy else task.sizes.draws
    prompts = tune * draws + test * draws
    options: dict[str, Any] = {"greedy": greedy, "cumulative": name == "GenARM", "seed": seed}
    rows = [b for b in betas for _ in prompts]
    got = methods.guided(task, guide, prompts * len(betas), rows, **options)
    tuning, tested = {}, {}
    for i, beta in enumerate(betas):
        at, middle = i * len(prompts), i * len(prompts) + len(tune) * draws
        tuning[beta] = asdict(got.part(slice(at, middle)))
        tested[beta] = asdict(got.part(slice(middle, at + len(prompts))))
    best = max(betas, key=lambda b: sum(tuning[b]["gold"]))
    result: dict[str, Any] = {"tuning": tuning, "test": tested, "best": best}
    if name in ("ARGS", "PARGS"):
        result["k"] = {}
        for k in task.ks:
            weights = [best] * len(test) * draws
            one = methods.guided(task, guide, test * draws, weights, k=k, **options)
            result["k"][k] = asdict(one)
    return result


def _unguided(task: Task, rm: Any, seed: int) -> dict[str, Any]:
    """Base, top-k sampling, and best of n by the full-sequence reward model."""
    test, most = task.prompts["test"], max(BEST_OF)
    prompts = test * most
    ids, gold, tokens = methods.base_samples(task, prompts, 10_000 + seed)
    proxy = methods.whole_rewards(task, rm, prompts, ids)
    shape = (most, len(test))
    table, ranked = torch.tensor(gold).view(shape), proxy.view(shape)
    length = torch.tensor(tokens).view(shape)
    result: dict[str, Any] = {
        "base": asdict(Answers(gold, [0.0] * len(gold), proxy.tolist(), tokens))
    }
    for n in BEST_OF:
        win = ranked[:n].argmax(0, keepdim=True)
        picked = [t[:n].gather(0, win)[0].tolist() for t in (table, ranked, length)]
        # The usual figure, an upper bound on the KL of the best of n samples.
        kl = [math.log(n) - (n - 1) / n] * len(test)
        result[f"best-of-{n}"] = asdict(Answers(picked[0], kl, picked[1], picked[2]))
    zero = [0.0] * len(test)
    result["top-k"] = {
        k: asdict(methods.guided(task, rm, test, zero, k=k, seed=seed + 500)) for k in TOP_K
    }
    return {"unguided": result}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def run_all(tasks: list[Task], seeds: range, folder: Path) -> None:
    """Every unit whose file is missing; the models of the two findings come first."""
    for task in tasks:
        if task.enumerable and not (folder / task.name / "exact.json").exists():
            write_exact(task, folder / task.name / "exact.json")
    rest = tuple(kind for kind in KINDS if kind not in ("partial", "full"))
    for group, task in itertools.product((("partial", "full"), rest), tasks):
        for seed, kind in itertools.product(seeds, group):
            path = unit_path(folder, task.name, seed, kind)
            if not path.exists():
                run_unit(task, kind, seed, path)
                took = json.loads(path.read_text())["seconds"]
                print(f"{task.name}, seed {seed}, {kind}: {took}", flush=True)


def unit_path(folder: Path, task: str, seed: int, kind: str) -> Path:
    return folder / task / f"seed{seed}_{kind}.json"
