"""The quality study: its second task, its exact values, its verdicts, and one run in small."""

import importlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def study(monkeypatch):
    """The modules of the quality study, by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench" / "quality"))
    return lambda name: importlib.import_module(f"study_parts.{name}")


PROMPT = "plums for anna , some sweet and much sour :"  # begins with (1, 1), wants (2, 4)


@pytest.mark.parametrize(
    ("reply", "gold"),
    [
        ("add lemon boil down taste it serve warm", 2 + 0.25),  # (1, 2), then (2, 4)
        ("add lemon boil down pour water serve warm", 2 - 0.5 * 2),  # (2, 4), then (1, 3)
        ("add honey boil down serve warm", 2 - 0.5 * 4 - 0.5),  # (4, 2), honey boiled
        ("add vinegar serve warm", 2 - 0.5 * 2 - 0.5),  # (1, 3), vinegar raw
        ("taste it add lemon leave it", 2 - 0.5 * 3 - 1),  # (1, 2), tasted too early
        ("add warm serve warm", 2 - 0.5 * 4 - 2 * 0.5),  # (1, 1), two words of no step
    ],
)
def test_the_gold_reward_of_a_recipe_by_hand(study, reply, gold):
    assert study("recipe").gold_reward(PROMPT, reply) == pytest.approx(gold)


def test_every_recipe_of_the_grammar_is_parsed_without_a_slip(study):
    recipe, rng = study("recipe"), random.Random(0)
    prompts = recipe.all_prompts()
    assert all(
        recipe.parse(recipe.sample_reply(rng.choice(prompts), rng))[1] == 0 for _ in range(300)
    )


def test_optimal_policies_and_prefix_values_of_a_tree_by_hand(study):
    exact = study("exact")
    tree = exact.Tree(
        [(5, 1), (6, 7, 1), (6, 8, 1)],
        torch.tensor([0.5, 0.3, 0.2]).double(),
        torch.tensor([0.0, 1.0, -1.0]).double(),
    )
    assert exact.optimal_policy(tree, 0.0) == pytest.approx((0.1, 0.0))
    tilted = np.array([0.5, 0.3 * np.e**2, 0.2 / np.e**2])
    q = tilted / tilted.sum()
    kl = (q * np.log(q / np.array([0.5, 0.3, 0.2]))).sum()
    assert exact.optimal_policy(tree, 2.0) == pytest.approx((q[1] - q[2], kl))
    values = exact.prefix_values(tree)
    assert values[(6,)] == pytest.approx(0.2)
    assert values[(6, 8)] == pytest.approx(-1.0)


def test_gold_at_a_kl_lies_between_the_neighbours_of_the_frontier(study):
    curve = object.__new__(study("figures").Curve)
    curve.seeds = 1
    curve.gold = np.array([[[1.0, 3.0], [5.0, 5.0]]])
    curve.kl = np.array([[[1.0, 1.0], [2.0, 2.0]]])
    base = np.array([[0.0, 1.0]])
    assert curve.at_kl(base, np.array([0.5])).tolist() == [[0.5, 2.0]]
    assert curve.at_kl(base, np.array([1.25])).tolist() == [[2.0, 3.5]]
    assert np.isnan(curve.at_kl(base, np.array([2.5]))).all()


def test_the_error_of_a_mean_counts_seeds_and_prompts(study):
    crossed = study("figures").crossed
    by_prompt = np.tile(np.array([0.0, 1.0, 2.0, 3.0]), (5, 1))
    assert crossed(by_prompt)["se"] == pytest.approx(np.std([0, 1, 2, 3], ddof=1) / 2)
    assert crossed(by_prompt.T)["se"] == pytest.approx(np.std([0, 1, 2, 3], ddof=1) / 2)


@pytest.mark.parametrize(("gap", "passed"), [(1.0, True), (0.0, False)])
def test_the_verdict_on_guidance_asks_for_three_standard_errors(study, gap, passed):
    findings, rng = study("findings"), np.random.default_rng(0)
    assert findings._verdict(gap + 0.5 * rng.standard_normal((5, 40)))["passed"] is passed


def test_a_study_in_small_runs_goes_on_and_reports(study, tmp_path, monkeypatch):
    tasks, units, report = study("tasks"), study("units"), study("report")
    monkeypatch.setattr(study("exact"), "LEAST", 0.02)
    monkeypatch.setattr(study("selection"), "COUNTS", (4, 8))
    # Two models of four steps each need not agree on half of the rankings.
    monkeypatch.setattr(study("models"), "reward_consistency", lambda *_, **__: 0.9)
    sizes = tasks.Sizes(2, 2, 2, 16, 4, 4, 1, 1, corpus=64, lm_epochs=1)
    task = tasks.recipe_task(tmp_path, sizes)
    task = replace(task, max_new_tokens=4, betas={name: (1.0, 4.0) for name in task.betas})
    units.run_all([task], [0], tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("recipe/*.json")}
    # Five reward models, six of the smaller methods, the choice of pairs, and the exact values.
    assert len(written) == 13
    units.run_all([task], [0], tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.glob("recipe/*.json")}
    report.write(tmp_path, tmp_path / "out", ["recipe"], [0])
    found = json.loads((tmp_path / "out" / "study.json").read_text())["tasks"]["recipe"]
    assert set(found["over_beta"]) == set(study("methods").KIND)
    assert set(found["findings"]) == {"prefix_accuracy", "guidance"}
    assert (tmp_path / "out" / "study_frontier.png").stat().st_size > 1000
