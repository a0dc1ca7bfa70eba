"""The study of whole-sequence decoders: what is compared at which KL, and a run in small."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench" / "quality"))
    return importlib.import_module


@pytest.fixture
def decoders(study):
    return study("decoders")


def unit(decoders, gold, kl, method, own_gold, own_kl):
    """A seed's PARGS at the grid of beta, the same of both prompts, and another method."""
    points = zip(decoders.BETAS["recipe"], gold, kl, strict=True)
    made = {f"PARGS, beta {b:g}": {"gold": [g, g], "kl": [k, k]} for b, g, k in points}
    return made | {method: {"gold": [own_gold, own_gold + 1], "kl": [own_kl, own_kl]}}


def test_the_comparison_at_equal_kl_is_by_seed_and_between_neighbours(decoders):
    gold, kl = [0.0, 1.0, 2.0, 2.5, 2.6, 2.7], [0.1, 1.0, 2.0, 3.0, 4.0, 5.0]
    first = unit(decoders, gold, kl, "SMC", 2.0, 1.5)  # PARGS: 1.5; mean of the method: 2.5
    second = unit(decoders, gold, kl, "SMC", 2.5, 2.5)  # PARGS: 2.25; mean of the method: 3.0
    gap = decoders.at_equal_kl([first, second], "SMC")
    assert gap["mean"] == pytest.approx((1.0 + 0.75) / 2)
    assert decoders.at_equal_kl([first], "SMC")["mean"] == pytest.approx(1.0)


@pytest.mark.parametrize("kl", [0.05, 6.0])
def test_nothing_is_said_where_pargs_has_no_such_kl(decoders, kl):
    row = unit(decoders, [0.0] * 6, [0.1, 1.0, 2.0, 3.0, 4.0, 5.0], "SMC", 2.0, kl)
    assert decoders.at_equal_kl([row], "SMC") is None


def test_a_run_in_small_counts_the_answers_own_tokens(study, decoders, monkeypatch, tmp_path):
    import torch

    tasks = study("study_parts.tasks")
    sizes = tasks.Sizes(2, 2, 2, 16, 4, 4, 1, 1, corpus=64, lm_epochs=1)
    task = replace(tasks.recipe_task(tmp_path, sizes), max_new_tokens=4)
    monkeypatch.setitem(decoders.SIZES, "recipe", (4, 8))
    monkeypatch.setitem(decoders.BETAS, "recipe", (1.0, 4.0))
    found = decoders.run_seed(task, 1, tmp_path)["methods"]
    assert {len(column) for rows in found.values() for column in rows.values()} == {2}
    for n in (4, 8):  # each text's last token is never run, whatever its length
        rows = found[f"best of {n}"]
        assert all(0 < lm <= 3 * n for lm in rows["lm"])
        assert all(lm + n == rm for lm, rm in zip(rows["lm"], rows["rm"], strict=True))
    assert np.mean(found["PARGS, beta 4"]["kl"]) > np.mean(found["PARGS, beta 1"]["kl"]) > 0
    target = decoders.methods(task, torch.arange(11.0))["CARDS"]["reward_target"]
    assert target == pytest.approx(9.0)
    study("study_parts.units").write_json(
        decoders.unit_path(tmp_path, "recipe", 1), {"methods": found}
    )
    rows = decoders.report(tmp_path, "recipe", [1])
    assert rows["best of 8"]["gold"]["mean"] == pytest.approx(np.mean(found["best of 8"]["gold"]))
    assert len(decoders.markdown("recipe", json.loads(json.dumps(rows)))) == 2 + len(rows)


def test_the_cost_plot_has_each_decoder_once_at_its_best_beta(study):
    names = ("best of 4", "SMC, 4, beta 1", "SMC, 4, beta 2", "SMC, 16, beta 1", "PARGS, beta 2")
    gold = (1.0, 0.5, 0.7, 0.9, 2.0)
    rows = {n: {"gold": {"mean": g}} for n, g in zip(names, gold, strict=True)}
    best = study("study_parts.plots")._best_decoders(rows)
    assert {name: row["gold"]["mean"] for name, row in best.items()} == {
        "best of 4": 1.0,
        "SMC, 4": 0.7,
        "SMC, 16": 0.9,
    }
