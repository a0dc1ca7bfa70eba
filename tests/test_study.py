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


def small_tree(study):
    return study("exact").Tree(
        [(5, 1), (6, 7, 1), (6, 8, 1)],
        torch.tensor([0.5, 0.3, 0.2]).double(),
        torch.tensor([0.0, 1.0, -1.0]).double(),
    )


def test_optimal_policies_and_prefix_values_of_a_tree_by_hand(study):
    exact, tree = study("exact"), small_tree(study)
    assert exact.optimal_policy(tree, 0.0) == pytest.approx((0.1, 0.0))
    tilted = np.array([0.5, 0.3 * np.e**2, 0.2 / np.e**2])
    q = tilted / tilted.sum()
    kl = (q * np.log(q / np.array([0.5, 0.3, 0.2]))).sum()
    assert exact.optimal_policy(tree, 2.0) == pytest.approx((q[1] - q[2], kl))
    values = exact.prefix_values(tree)
    assert values[(6,)] == pytest.approx(0.2)
    assert values[(6, 8)] == pytest.approx(-1.0)


def test_the_best_value_of_a_prefix_is_that_of_its_best_answer(study):
    best = study("exact").best_values(small_tree(study))
    assert best == {(5,): 0, (5, 1): 0, (6,): 1, (6, 7): 1, (6, 7, 1): 1, (6, 8): -1, (6, 8, 1): -1}


def test_the_policy_guided_by_best_values_by_hand(study):
    exact, tree = study("exact"), small_tree(study)
    base, guided = exact.guided_frontier(tree, exact.best_values(tree), (0.0, 2.0))
    assert base == pytest.approx((0.1, 0.0))
    first = np.e**2 / (1 + np.e**2)  # both first tokens have probability 0.5
    second = 0.6 * np.e**2 / (0.6 * np.e**2 + 0.4 / np.e**2)
    q = np.array([1 - first, first * second, first * (1 - second)])
    kl = (q * np.log(q / np.array([0.5, 0.3, 0.2]))).sum()
    assert guided == pytest.approx((q[1] - q[2], kl))


def test_guiding_by_soft_values_is_the_optimal_policy(study):
    exact, tree, beta = study("exact"), small_tree(study), 1.5
    whole = tree.probability.sum()
    cut = exact.Tree(tree.answers, tree.probability * 0.9 / whole, tree.gold)  # mass is missing
    exped = exact.Tree(tree.answers, cut.probability, (beta * tree.gold).exp())
    soft = {prefix: np.log(v) / beta for prefix, v in exact.prefix_values(exped).items()}
    assert exact.guided_frontier(cut, soft, (beta,)) == [
        pytest.approx(exact.optimal_policy(cut, beta))
    ]


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
    sizes = tasks.Sizes(2, 2, 8, 4, 4, 1, 1, corpus=64, lm_epochs=1)
    task = tasks.recipe_task(tmp_path, sizes)
    task = replace(task, max_new_tokens=4, betas={name: (1.0, 4.0) for name in task.betas})
    units.run_all([task], range(1), tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("recipe/*.json")}
    assert len(written) == 6  # five reward models and the exact values
    exact = json.loads((tmp_path / "recipe" / "exact.json").read_text())
    of_ends, best = (
        np.array([v[-1] for v in exact[name]], dtype=float) for name in ("values", "best_values")
    )
    assert len(best) == 4 and np.allclose(of_ends, best, equal_nan=True)  # whole: both are gold
    assert len(exact["guided_by_value"]) == len(exact["guided_by_best"]) == len(exact["frontier"])
    units.run_all([task], range(1), tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.glob("recipe/*.json")}
    report.write(tmp_path, tmp_path / "out", ["recipe"], 1)
    found = json.loads((tmp_path / "out" / "study.json").read_text())["tasks"]["recipe"]
    assert set(found["over_beta"]) == set(study("methods").KIND)
    assert set(found["findings"]) == {"prefix_accuracy", "guidance"}
    assert (tmp_path / "out" / "study_frontier.png").stat().st_size > 1000
