"""The study of SequenceMatch: what its report makes of the seeds' files."""

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench" / "quality"))
    import sequencematch

    return sequencematch


def unit(gold, undone):
    """One arm of one seed, whose gold at β = 2 on the prompts that β is chosen on is the best."""
    values = {"gold": gold, "undone": undone}
    return {
        "undoing": {"wrong": undone},
        "unguided, T = 1": values,
        "guided": {"1": values, "2": {"gold": gold + 1, "undone": 0.0}},
        "best": "2",
        "seconds": {"train": 1.0},
    }


def test_changes_are_paired_by_seed_and_the_best_beta_is_that_of_other_prompts(
    study, tmp_path, monkeypatch, capsys
):
    golds = {1: (0.0, 0.2, 0.5), 2: (1.0, 1.2, 1.3)}
    for seed, of_arms in golds.items():
        arms = dict(zip(study.ARMS, (unit(gold, gold / 2) for gold in of_arms), strict=True))
        (tmp_path / f"seed{seed}.json").write_text(json.dumps(arms))
    options = ["--folder", str(tmp_path), "--results", str(tmp_path), "--seeds", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["sequencematch.py", "report", *options])
    study.main()
    found = json.loads((tmp_path / "sequencematch.json").read_text())
    row = found["arms"]["SequenceMatch"]["guided, own best beta: gold"]
    assert row["mean"] == pytest.approx(1.9) and row["change"]["mean"] == pytest.approx(0.4)
    # Student's t of one degree of freedom, 12.706, times the standard error of 0.5 and 0.3.
    assert row["change"]["ci95"] == pytest.approx(12.706 * 0.1, rel=1e-4)
    even = found["arms"]["likelihood, slips"]["guided, own best beta: gold"]["change"]
    assert even == pytest.approx({"mean": 0.2, "ci95": 0.0, "seeds": 2}, abs=1e-9)
    said = capsys.readouterr().out
    assert "| undoing: wrong | 0.250 ± 3.177 |" in said
