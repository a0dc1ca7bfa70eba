"""The study's units of work: one reward model of one seed, trained, measured and decoded with.

Each writes one JSON file of raw figures, so that a study that was stopped goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from study_parts import methods
from study_parts.exact import exact_values
from study_parts.methods import CANDIDATES, KIND, PER_TOKEN, SMALLER, Answers
from study_parts.models import model_of
from study_parts.selection import compare_selections
from study_parts.tasks import MODELS, Task
from study_parts.training import JUDGED, KINDS, PENALTIES, eval_pairs, margins

Kinds = tuple[str, ...]
BEST_OF = (4, 16)
TOP_K = (2, 5, 10)
# One group after the other: some models are made with those of an earlier one.
GROUPS: tuple[Kinds, ...] = (
    ("exact", "base", "partial", "full"),
    tuple(kind for kind in KINDS if kind not in ("partial", "full")),
    (*JUDGED, "abc", "credit", "head", "cream", "select"),
    tuple(PENALTIES),
)


# What a report on some of the models needs beside them.
BESIDE = ("exact", "base")


def groups_of(kinds: Kinds | None, task: str) -> tuple[Kinds, ...]:
    """The groups of a run of these models alone; None: of all that the task is studied with."""
    kinds = MODELS.get(task) if kinds is None else kinds
    if kinds is None:
        return GROUPS
    return tuple(tuple(k for k in group if k in (*kinds, *BESIDE)) for group in GROUPS)


def run_unit(task: Task, kind: str, seed: int, folder: Path) -> None:
    """Train `kind`, measure its accuracy by prefix length, decode with it, write its file."""
    path, started = unit_path(folder, task.name, seed, kind), time.process_time()
    if kind == "exact":
        write_json(path, exact_values(task) | _seconds(started, started))
        return
    if kind == "select":
        write_json(path, {"select": compare_selections(task, seed)} | _seconds(started, started))
        return
    if kind == "base":
        gold = _base_samples(task, seed)[1]
        write_json(path, {"gold": gold} | _seconds(started, started))
        return
    model = model_of(task, kind, seed, folder)
    trained = time.process_time()
    raw: dict[str, Any] = {}
    if kind != "credit":  # its model is that of "full", measured there
        by_decile = margins(task, kind, model, eval_pairs(task))
        count = task.sizes.eval_pairs
        raw["margins"] = [
            [row[i : i + count] for i in range(0, len(row), count)] for row in by_decile
        ]
    guide = methods.guide_of(task, kind, model)
    raw["methods"] = {
        name: _over_beta(task, name, guide, seed)
        for name, of in (KIND | SMALLER).items()
        if of == kind
    }
    if kind == "full":
        raw |= _unguided(task, model, seed)
    if kind == "cream":
        raw["consistency"] = model.config.consistency
    write_json(path, raw | _seconds(started, trained))


def _seconds(started: float, trained: float) -> dict[str, Any]:
    rest = time.process_time() - trained
    return {"seconds": {"train": round(trained - started, 2), "decode": round(rest, 2)}}


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(rounded(value), separators=(",", ":")))
    partial.rename(path)


def rounded(value: Any) -> Any:
    """Floats to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def _over_beta(task: Task, name: str, guide: Any, seed: int) -> dict[str, Any]:
    """Answers at every β of the method's grid: to the `beta` prompts (`tuning`) and `draws` times
    to the `test` prompts; and at other k, at the β that was best on the `beta` prompts."""
    betas = task.betas[name]
    greedy = name.endswith("-G")
    tune, test = task.prompts["beta"], task.prompts["test"]
    # More draws make a sampled policy's mean sharper; a greedy one would say the same again.
    draws = 1 if greedy else task.sizes.draws
    if name in SMALLER:
        draws = max(draws // 2, 1)
    prompts = tune * draws + test * draws
    options: dict[str, Any] = {"greedy": greedy, "cumulative": name in PER_TOKEN, "seed": seed}
    options |= CANDIDATES.get(name, {})
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
            one = methods.guided(task, guide, test * draws, weights, **options | {"k": k})
            result["k"][k] = asdict(one)
    return result


def _base_samples(task: Task, seed: int) -> tuple[Any, list[float], list]:
    """The seed's samples of the language model itself, several rounds of the test prompts."""
    return methods.base_samples(task, task.prompts["test"] * max(BEST_OF), 10_000 + seed)


def _unguided(task: Task, rm: Any, seed: int) -> dict[str, Any]:
    """Base, top-k sampling, and best of n by the full-sequence reward model."""
    test, most = task.prompts["test"], max(BEST_OF)
    ids, gold, tokens = _base_samples(task, seed)
    proxy = methods.whole_rewards(task, rm, test * most, ids)
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


def run_all(
    tasks: list[Task],
    seeds: list[int],
    folder: Path,
    jobs: int = 1,
    kinds: Kinds | None = None,
) -> None:
    """Every unit whose file is missing, by `jobs` processes, each group once the one before it is
    complete; the models of the two findings come first. `kinds`: these models alone."""
    by_name = {task.name: task for task in tasks}
    for group in range(len(GROUPS)):
        units = [
            (task.name, kind, seed)
            for task, seed in itertools.product(tasks, seeds)
            for kind in groups_of(kinds, task.name)[group]
            if kind != "exact" or (task.enumerable and seed == seeds[0])
            if not unit_path(folder, task.name, seed, kind).exists()
        ]
        if jobs == 1 or not units:
            for name, kind, seed in units:
                _reported(by_name[name], kind, seed, folder)
            continue
        with ProcessPoolExecutor(
            jobs,
            mp_context=get_context("spawn"),
            initializer=_begin,
            initargs=(by_name, folder, torch.get_num_threads()),
        ) as pool:
            list(pool.map(_run_here, units))


_here: dict[str, Any] = {}  # tasks and folder of a worker process


def _begin(tasks: dict[str, Task], folder: Path, threads: int) -> None:
    disable_progress_bar()
    torch.set_num_threads(threads)
    _here.update(tasks=tasks, folder=folder)


def _run_here(unit: tuple[str, str, int]) -> None:
    name, kind, seed = unit
    _reported(_here["tasks"][name], kind, seed, _here["folder"])


def _reported(task: Task, kind: str, seed: int, folder: Path) -> None:
    run_unit(task, kind, seed, folder)
    took = json.loads(unit_path(folder, task.name, seed, kind).read_text())["seconds"]
    print(f"{task.name}, seed {seed}, {kind}: {took}", flush=True)


def unit_path(folder: Path, task: str, seed: int, kind: str) -> Path:
    return folder / task / ("exact.json" if kind == "exact" else f"seed{seed}_{kind}.json")
