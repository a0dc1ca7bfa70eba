"""The study's figures by hand: which way differences go, what is compared with what."""

import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench" / "quality"))
    return lambda name: importlib.import_module(f"study_parts.{name}")


SEEDS, PROMPTS = 5, 30


def curve(study, name, gold, kl, best):
    """A method's frontier with the same KL and, up to a little noise, gold for all prompts."""
    made = object.__new__(study("figures").Curve)
    made.name, made.seeds, made.best = name, SEEDS, [best] * SEEDS
    made.betas = [float(2**n) for n in range(len(gold))]
    noise = 1e-3 * np.random.default_rng(0).standard_normal((SEEDS, len(gold), PROMPTS))
    made.gold, made.kl = np.array(gold)[:, None] + noise, np.array(kl)[:, None] + 0 * noise
    made.proxy = made.tokens = made.gold
    return made


@pytest.fixture
def curves(study):
    return {
        "PARGS": curve(study, "PARGS", [0.5, 1.0, 0.6], [1.0, 2.0, 6.0], best=1),
        "ARGS": curve(study, "ARGS", [0.2, 0.4, 0.1], [1.0, 3.0, 6.0], best=1),
    }


BASE = np.zeros((SEEDS, PROMPTS))


def test_guidance_compares_pargs_with_args_and_the_base(study, curves):
    found = study("findings").guidance(curves, BASE)
    means = {k: row["mean"] for k, row in {**found["tests"], **found["beside"]}.items()}
    wanted = {
        "PARGS - base, own best beta": 1.0,
        "PARGS - ARGS, own best beta": 1.0 - 0.4,
        "PARGS - ARGS, at the KL of ARGS": 0.9 - 0.4,
        "PARGS - ARGS, at the KL of PARGS": 1.0 - 0.3,
        "PARGS - the best ARGS within the KL of PARGS": 1.0 - 0.2,
    }
    assert means == {name: pytest.approx(mean, abs=2e-3) for name, mean in wanted.items()}
    assert found["passed"]


def test_a_worse_guide_does_not_pass(study, curves):
    swapped = {"PARGS": curves["ARGS"], "ARGS": curves["PARGS"]}
    found = study("findings").guidance(swapped, BASE)
    passed = {name: row["passed"] for name, row in found["tests"].items()}
    assert passed.pop("PARGS - base, own best beta")
    assert not any(passed.values()) and not found["passed"]


def test_prefix_accuracy_passes_where_partial_is_above_full_before_the_end(study):
    def raw(partial):  # a margin for each of two pairs of four prompts, at each decile
        full = [[[1.0, -1.0]] * 4] * 10
        return {k: [{"margins": partial if k == "partial" else full}] * 5 for k in KINDS}

    KINDS = study("training").KINDS
    better = [[[1.0, 1.0]] * 4] * 9 + [[[-1.0, -1.0]] * 4]
    accuracy = study("figures").accuracy(raw(better))
    assert [g["mean"] for g in accuracy["partial - full"]] == [0.5] * 9 + [-0.5]
    assert study("findings").prefix_accuracy(accuracy)["passed"]
    worse_once = [better[-1], *better[1:]]
    accuracy = study("figures").accuracy(raw(worse_once))
    assert not study("findings").prefix_accuracy(accuracy)["passed"]


def test_changes_are_the_smaller_methods_less_their_counterparts(study, monkeypatch):
    smaller, methods = study("smaller"), study("methods")
    names = [*methods.KIND, *methods.SMALLER]
    gold = {name: float(n) for n, name in enumerate(names)}
    monkeypatch.setattr(
        smaller, "_figures", lambda raw, curve, base: {"gold": np.full((5, 3), gold[curve.name])}
    )
    curves = {name: curve(study, name, [0.0, 1.0], [1.0, 2.0], best=0) for name in names}
    ways = {
        f"{w}, {k} labels": [x] * 3
        for w, x in (("random", 0.6), ("d-optimal", 0.5))
        for k in ("drawn", "exact")
    }
    raw = {"cream": [{"consistency": 0.8}] * 5, "select": [{"select": {"30": ways}}] * 5}
    found = smaller.figures_of(raw, curves, BASE)
    for row in found["changes"]:
        assert row["gold"]["mean"] == gold[row["method"]] - gold[row["against"]]
    for kind in ("drawn", "exact"):
        change = found["selection"]["30"][f"d-optimal - random, {kind} labels"]
        assert change["mean"] == pytest.approx(-0.1)


def test_exact_labels_turn_round_pairs_whose_loser_has_more_gold(study):
    task = SimpleNamespace(
        tokenizer=SimpleNamespace(decode=lambda ids: ids[0] if ids else None),
        gold=lambda prompt, reply, finished: float(reply),
    )
    pairs = [
        {"prompt_ids": [9], "chosen_ids": [a, 0], "rejected_ids": [b, 0]}
        for a, b in ((2, 1), (1, 2), (1, 1))
    ]
    assert study("selection")._exact_labels(task, pairs).tolist() == [1.0, -1.0, 1.0]


def test_an_autoregressive_guides_reward_is_the_sum_of_its_tokens(study, monkeypatch):
    methods = study("methods")
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, math.nan]])
    ids = torch.tensor([[7, 5, 5, 1], [7, 5, 1, 0]])  # EOS is 1, padding 0
    out = SimpleNamespace(sequences=ids, rewards=rewards, kl=torch.zeros(2, 3))
    monkeypatch.setattr(methods.rgtg_fast, "generate", lambda *_, **__: out)
    tokenizer = SimpleNamespace(
        eos_token_id=1, pad_token_id=0, batch_decode=lambda ids, **_: ["", ""]
    )
    called = type(
        "Tokenizer", (SimpleNamespace,), {"__call__": lambda *_, **__: {"input_ids": ids[:, :1]}}
    )
    task = SimpleNamespace(
        name="recipe",
        tokenizer=called(**vars(tokenizer)),
        lm=None,
        max_new_tokens=3,
        gold=lambda *_: 0.0,
    )
    for cumulative, wanted in ((True, [7.0, 3.0]), (False, [4.0, 2.0])):
        got = methods.guided(task, None, ["a", "b"], [1.0, 1.0], cumulative=cumulative, seed=0)
        assert got.proxy == wanted
        assert got.tokens == [3, 2]


def test_over_optimisation_shows_the_best_and_the_largest_beta(study, curves):
    points = study("figures").over_beta(curves["PARGS"])
    row = study("report")._over_beta({"over_beta": {"PARGS": points}})[-1]
    best, largest = row.split(" | ")[1:]
    assert best.startswith("2: +1.00 ±") and best.endswith("(+1.00, 2.0)")
    assert largest.startswith("4: +0.60 ±") and largest.endswith("(+0.60, 6.0) |")
