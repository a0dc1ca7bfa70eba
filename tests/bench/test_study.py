"""The quality study: its second task, its exact values, its verdicts, and one run in small."""

import importlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats


@pytest.fixture
def study(monkeypatch):
    """The modules of the quality study, by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench" / "quality"))
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


def test_the_interval_of_few_seeds_is_students(study):
    values = np.tile(np.array([0.0, 1.0, 2.0, 3.0, 4.0])[:, None], (1, 50))  # seeds differ only
    got = study("figures").crossed(values)
    ends = stats.t.interval(0.95, 4, loc=2.0, scale=np.std(range(5), ddof=1) / 5**0.5)
    assert got["mean"] - got["ci95"] == pytest.approx(ends[0])


def test_pairs_count_as_one_figure_of_their_prompt(study):
    decile = [[1.5, 0.0, None], [-1.0, -2.0, 3.0], [None, None, None]]  # three prompts
    got = study("figures").right({"margins": [decile]})
    np.testing.assert_allclose(got, [[0.75, 1 / 3, np.nan]])


def test_accuracy_by_true_values_leaves_out_pairs_of_equal_or_unknown_value(study):
    figures = study("figures")
    units = {kind: [{"margins": [[[1.0, -1.0, 1.0, 1.0]]] * 10}] for kind in figures.KINDS}
    got = figures.true_value_accuracy(units, [[[0.5, 0.5, 0.0, None]]] * 10)
    assert got["full"][0]["mean"] == 0.5  # of two pairs
    assert got["ceiling"][0]["mean"] == 1.0


def test_value_gaps_hold_the_shorter_answer_at_its_end(study):
    known = {(5,): 1.0, (6,): 0.25, (6, 7): 0.5}
    gaps = study("exact")._value_gaps({"chosen_ids": [5], "rejected_ids": [6, 7]}, known)
    assert gaps == [0.75] * 5 + [0.5] * 5


def test_a_study_that_is_not_complete_is_not_reported(study, tmp_path):
    with pytest.raises(ValueError, match=r"lacks .* such as seed3_base"):
        study("figures").load(tmp_path, "recipe", [3], study("units").GROUPS)


@pytest.mark.parametrize(("gap", "passed"), [(1.0, True), (0.0, False)])
def test_the_verdict_on_guidance_asks_for_three_standard_errors(study, gap, passed):
    findings, rng = study("findings"), np.random.default_rng(0)
    assert findings._verdict(gap + 0.5 * rng.standard_normal((5, 40)))["passed"] is passed


@pytest.fixture
def small_task(study, tmp_path, monkeypatch):
    tasks = study("tasks")
    monkeypatch.setattr(study("exact"), "LEAST", 0.02)
    monkeypatch.setattr(study("selection"), "COUNTS", (4, 8))
    # Two models of four steps each need not agree on half of the rankings.
    monkeypatch.setattr(study("models"), "reward_consistency", lambda *_, **__: 0.9)
    sizes = tasks.Sizes(2, 2, 2, 16, 4, 4, 1, 1, corpus=64, lm_epochs=1)
    task = tasks.recipe_task(tmp_path, sizes)
    return replace(task, max_new_tokens=4, betas={name: (1.0, 4.0) for name in task.betas})


def test_the_reference_of_pessimism_is_the_mean_over_answer_tokens(study, small_task):
    pairs = study("training").training_pairs(small_task, 0)[:3]
    hidden = [
        small_task.lm.model(torch.tensor([p["prompt_ids"] + p[side]])).last_hidden_state[
            0, len(p["prompt_ids"]) :
        ]
        for p in pairs
        for side in ("chosen_ids", "rejected_ids")
    ]
    got = study("models").mean_feature(small_task, pairs)
    torch.testing.assert_close(got, torch.cat(hidden).mean(0))


def test_cream_asks_models_of_disjoint_halves(study, small_task, tmp_path, monkeypatch):
    models, seen = study("models"), []

    def train(task, kind, data, seed, **options):
        seen.append((kind, data, options))
        return study("training").initial_model(task, kind)

    monkeypatch.setattr(models, "train", train)
    assert models.model_of(small_task, "cream", 1, tmp_path).config.consistency == 0.9
    (one, two, both), pairs = [data for _, data, _ in seen], seen[-1][1]
    assert len(one) == len(two) == len(pairs) / 2
    assert sorted(map(str, one + two)) == sorted(map(str, both))
    assert [kind for kind, *_ in seen] == ["partial"] * 3
    assert seen[-1][2] == {"consistency": 0.9}


def first_tokens_differ(pair):
    """Whether the first tenth of the longer answer is another in the two answers."""
    sides = pair["chosen_ids"], pair["rejected_ids"]
    end = int(np.ceil(max(map(len, sides)) / 10))
    return sides[0][:end] != sides[1][:end]


def test_a_study_in_small_runs_goes_on_and_reports(study, small_task, tmp_path):
    units, report = study("units"), study("report")
    units.run_all([small_task], [1], tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("recipe/*.json")}
    # Nine reward models, six of the smaller methods, the choice of pairs, the language model's own
    # samples and the exact values.
    assert len(written) == 18
    exact = json.loads((tmp_path / "recipe" / "exact.json").read_text())
    whole = [np.array(exact[name][-1], dtype=float) for name in ("value_gaps", "best_gaps")]
    np.testing.assert_allclose(*whole)  # both are gold
    full = json.loads((tmp_path / "recipe" / "seed1_full.json").read_text())
    bound = np.log(4) - 3 / 4
    assert full["unguided"]["best-of-4"]["kl"] == pytest.approx([bound] * 2, abs=1e-4)
    known = [margin is not None for row in full["margins"][0] for margin in row]
    assert known == [first_tokens_differ(p) for p in study("training").eval_pairs(small_task)]
    units.run_all([small_task], [1], tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.glob("recipe/*.json")}
    report.write(tmp_path, tmp_path / "out", ["recipe"], [1])
    found = json.loads((tmp_path / "out" / "study.json").read_text())["tasks"]["recipe"]
    assert set(found["over_beta"]) == set(study("methods").KIND)
    assert set(found["findings"]) == {"prefix_accuracy", "guidance"}
    assert {row["method"] for row in found["smaller"]["changes"]} == set(study("methods").SMALLER)
    assert (tmp_path / "out" / "study_frontier.png").stat().st_size > 1000
    renew_some(study, tmp_path, found)


def renew_some(study, tmp_path, found):
    """New runs of some models replace their figures, and theirs alone."""
    path, report = tmp_path / "out" / "study.json", study("report")

    def changed(**base):
        record = json.loads(path.read_text())
        for name in ("FaRMA", "PARGS"):
            record["tasks"]["recipe"]["methods"][name]["kl"] = 99.0
        record["tasks"]["recipe"]["gaps_at_equal_kl"]["twist - PARGS"] = {}
        record["tasks"]["recipe"]["methods"]["base"]["gold"] |= base
        path.write_text(json.dumps(record))

    changed()
    report.write(tmp_path, tmp_path / "out", ["recipe"], [1], ("farma", "twist"))
    record = json.loads(path.read_text())
    got = record["tasks"]["recipe"]
    assert got["methods"]["PARGS"]["kl"] == 99.0
    assert list(record["renewed"]) == ["farma", "twist"]
    got["methods"]["PARGS"]["kl"] = found["methods"]["PARGS"]["kl"]
    assert got == found
    changed(mean=7.0)
    with pytest.raises(ValueError, match="other seeds, prompts or samples of the base policy"):
        report.write(tmp_path, tmp_path / "out", ["recipe"], [1], ("farma",))


def test_a_run_of_some_models_keeps_their_order_and_what_they_are_compared_with(study):
    groups = study("units").groups_of(("genarm", "cream"), "recipe")
    assert groups == (("exact", "base"), ("genarm",), ("cream",), ())
    assert study("units").groups_of(None, "recipe") == study("units").GROUPS
    some = study("units").groups_of(None, "prose")
    assert some == (("exact", "base", "partial", "full"), ("genarm", "genarm_prefix"), (), ())


def test_published_decoders_choose_among_the_candidates_of_their_own(
    study, small_task, monkeypatch
):
    methods, seen = study("methods"), {}
    real = methods.rgtg_fast.generate

    def generate(*args, **options):
        seen[type(options["reward_model"]).__name__] = options.get("k"), options.get("candidates")
        return real(*args, **options)

    monkeypatch.setattr(methods.rgtg_fast, "generate", generate)
    lm, units = small_task.lm, study("units")
    for name in ("GenARM", "GenARM-prefix", "twist", "FaRMA", "seq2seq"):
        guide = methods.guide_of(small_task, methods.KIND[name], lm)
        units._over_beta(small_task, name, guide, 0)
    wanted = {"AutoregressiveScorer": (None, None), "RewriteScorer": (None, None)}
    assert seen == wanted | {"VocabRewardScorer": (10, "sum")}


def test_the_share_of_the_optimums_gain_is_paired_by_seed_and_prompt(study):
    figures, report = study("figures"), study("report")
    curve, other = (object.__new__(figures.Curve) for _ in range(2))
    base = np.array([[0.0, 1.0], [0.0, 1.0]])
    for method, gold in ((curve, 3.0), (other, 2.0)):
        method.seeds = 2
        method.gold = (base + gold)[:, None]
        method.kl = np.full((2, 1, 2), 2.0)
    shares = report.share_of_gain({"A": curve}, base, {"1": 2.5, "2": 4.5, "4": None})["A"]
    assert shares["1"]["mean"] == pytest.approx(1.5 / 2)  # half of the way to a KL of 2
    assert shares["2"] == {"mean": pytest.approx(3 / 4), "se": 0.0, "ci95": 0.0}
    assert shares["4"] is None
    gap = report.gap_at(curve, other, base, 2.0)
    assert gap == {"mean": pytest.approx(1.0), "se": 0.0, "ci95": 0.0}
    assert report.gap_at(curve, other, base, 4.0) is None


@pytest.mark.slow
def test_two_processes_find_what_one_finds(study, small_task, tmp_path):
    units = study("units")
    paths = [units.unit_path(tmp_path, "recipe", seed, "head") for seed in (1, 2)]

    def figures(jobs):
        units.run_all([small_task], [1, 2], tmp_path, jobs, ("head",))
        found = [json.loads(path.read_text()) | {"seconds": None} for path in paths]
        for path in paths:
            path.unlink()
        return found

    assert figures(2) == figures(1)
