"""D-optimal choice of pairs: gains, order and the command."""

import itertools
import json

import pytest
import torch
from tiny import gpt2_lm, tokenizer
from training import normal, text_pairs, write_rows

from rgtg_fast.cli import main
from rgtg_fast.training import PreferenceDataset, pair_features
from rgtg_fast.training.experimental import d_optimal
from rgtg_fast.training.experimental.pessimistic import gram
from rgtg_fast.training.experimental.select_pairs import check


def log_det(features, l2):
    return float(torch.linalg.slogdet(gram(features, l2))[1])


@pytest.mark.parametrize("l2", [1.0, 1e-6])
def test_each_gain_is_the_rise_of_the_log_determinant(l2):
    x = normal(60, 8) * torch.linspace(0.01, 10, 8)
    chosen = d_optimal(x, 40, l2=l2)
    assert len(set(chosen.index.tolist())) == 40
    for n in range(1, 41):
        rise = log_det(x[chosen.index[:n]], l2) - log_det(x[chosen.index[: n - 1]], l2)
        tolerance = 1e-15 * float((x**2).sum(-1).max()) / l2  # as the docstring has it
        assert float(chosen.gain[n - 1]) == pytest.approx(rise, abs=1e-11 + tolerance)


def test_every_step_takes_the_best_by_brute_force():
    x, known = normal(25, 5), normal(4, 5, seed=1)
    chosen = d_optimal(x, 10, l2=0.5, labelled=known).index.tolist()
    taken = []
    for index in chosen:
        rest = [i for i in range(25) if i not in taken]
        best = max(rest, key=lambda i: log_det(torch.cat([known, x[[*taken, i]]]), 0.5))
        assert index == best
        taken.append(index)


def test_greedy_comes_near_the_best_set():
    x = normal(10, 3)
    rises = [log_det(x[list(s)], 1.0) for s in itertools.combinations(range(10), 4)]
    rise = float(d_optimal(x, 4).gain.sum())
    assert (1 - 1 / torch.e) * max(rises) <= rise <= max(rises) + 1e-9
    assert rise > sorted(rises)[int(0.95 * len(rises))]


def test_lazy_evaluation_spares_most_gains_and_changes_no_choice(monkeypatch):
    x = normal(3000, 6) * torch.rand(3000, 1, generator=torch.Generator().manual_seed(1))
    lazy = d_optimal(x, 30)
    assert lazy.evaluations < 0.25 * 30 * len(x)
    monkeypatch.setattr("rgtg_fast.training.experimental.design._BLOCK", len(x))
    assert d_optimal(x, 30).index.tolist() == lazy.index.tolist()


def test_equal_rows_end_and_all_can_be_chosen():
    x = torch.ones(300, 2)
    assert sorted(d_optimal(x, 300).index.tolist()) == list(range(300))


@pytest.mark.parametrize(
    ("features", "count", "message"),
    [
        (torch.ones(3, 2), 4, "count=4 of 3 rows"),
        (torch.ones(3), 1, r"pass a float tensor \[M, H\]"),
        (torch.tensor([[1.0], [torch.nan]]), 1, "row 1 is not finite"),
        (torch.tensor([[1e7], [1.0]]), 1, "l2=1.0 is lost beside features of squared norm 1e.14"),
    ],
)
def test_bad_features_are_named(features, count, message):
    with pytest.raises(ValueError, match=message):
        d_optimal(features, count)


@pytest.fixture
def select(tmp_path):
    """Runs the command on a language model and 21 pairs, two of whose answers are equal; gives the
    rows that it writes."""
    gpt2_lm().save_pretrained(tmp_path / "lm")
    tokenizer().save_pretrained(tmp_path / "lm")
    rows = [
        {"id": n, "prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]]}
        for n, r in enumerate(text_pairs(20))
    ]
    rows.insert(3, {"id": -1, "prompt": "same", "responses": [" no", " no"]})
    write_rows(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "cfg.yaml").write_text(
        f"model: {tmp_path / 'lm'}\ncandidates: {tmp_path / 'pairs.jsonl'}\n"
        f"count: 6\nout: {tmp_path / 'out.jsonl'}\ninvalid: drop\ndevice: cpu\n"
    )

    def run(*overrides):
        main(["select-pairs", "--config", str(tmp_path / "cfg.yaml"), *overrides])
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return run


def test_the_command_writes_the_rows_that_the_function_chooses(select, capsys):
    rows = select()
    data = PreferenceDataset(text_pairs(20), tokenizer())
    expected = d_optimal(pair_features(gpt2_lm(), data, full=True).differences, 6)
    assert [row["id"] for row in rows] == expected.index.tolist()
    assert [row["gain"] for row in rows] == pytest.approx(expected.gain.tolist(), rel=1e-4)
    assert all(row["row"] == row["id"] + (row["id"] >= 3) for row in rows)
    assert "20 of 21 rows kept" in capsys.readouterr().out


def test_pairs_that_have_labels_count_from_the_start(select, tmp_path):
    first = select()
    labelled = []
    for row in first:
        chosen, rejected = row["responses"]
        labelled.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    write_rows(tmp_path / "done.jsonl", labelled)
    then = select(f"labelled={tmp_path / 'done.jsonl'}")
    assert then[0]["gain"] < first[-1]["gain"] + 1e-6
    assert not {r["id"] for r in then} & {r["id"] for r in first}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("count=21", "count=21 of 20 candidates"),
        ("invalid=error", "1 with two equal answers"),
        ("cout=3", "unknown key cout: did you mean count?"),
        ("out=no/such/folder.jsonl", "folder that does not exist"),
    ],
)
def test_the_command_ends_with_the_mistake(select, override, message):
    with pytest.raises(SystemExit, match=message.replace("?", r"\?")):
        select(override)


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="lacks candidates, count, out"):
        check({"model": "m"})
