"""The study's value targets: samples judged by a reward model, and a twist learnt from them."""

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench" / "quality"))
    return lambda name: importlib.import_module(f"study_parts.{name}")


@pytest.fixture
def task(study, tmp_path):
    sizes = study("tasks").Sizes(2, 2, 2, 16, 4, 4, 1, 1, corpus=64, lm_epochs=1)
    return study("tasks").recipe_task(tmp_path, sizes)


def logprob(model, row):
    """log p of a whole answer, from a forward of it alone."""
    ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    answer = range(len(row["prompt_ids"]), ids.shape[1])
    return sum(logprobs[at - 1, ids[0, at]].item() for at in answer)


def test_samples_are_labelled_by_the_judges_reward_of_whole_answers(study, task):
    values = study("values")
    torch.manual_seed(3)
    judge = study("training").initial_model(task, "genarm")
    for parameter in judge.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    rows = values.judged_samples(task, judge, 1)
    assert len(rows) == 2 * task.sizes.pairs
    groups = [rows[i : i + values.GROUP] for i in range(0, len(rows), values.GROUP)]
    assert all(len({tuple(row["prompt_ids"]) for row in group}) == 1 for group in groups)
    assert len({tuple(row["answer_ids"]) for row in rows}) > values.GROUP
    with torch.no_grad():
        wanted = torch.tensor([values.JUDGE_SCALE * logprob(judge, row) for row in rows])
    got = torch.tensor([row["label"] for row in rows])
    torch.testing.assert_close(got, wanted - wanted.mean(), rtol=1e-4, atol=1e-4)
    assert values.judged_samples(task, judge, 1) == rows != values.judged_samples(task, judge, 2)


def test_a_twist_moves_towards_the_samples_of_high_reward(study, task):
    values = study("values")
    rows = values.judged_samples(task, task.lm, 1)
    liked = rows[0]["answer_ids"][0]
    for row in rows:
        row["label"] = 4.0 if row["answer_ids"][0] == liked else -4.0
    assert 0 < sum(row["label"] > 0 for row in rows) < len(rows)
    model = values.train_twist(task, rows, 0)
    gain = [logprob(model, row) - logprob(task.lm, row) for row in rows]
    by_label = {
        sign: [g for g, row in zip(gain, rows, strict=True) if row["label"] * sign > 0]
        for sign in (1, -1)
    }
    assert sum(by_label[1]) / len(by_label[1]) > sum(by_label[-1]) / len(by_label[-1])


def test_both_kinds_learn_from_the_judges_samples_and_not_from_the_pairs(
    study, task, tmp_path, monkeypatch
):
    models, seen = study("models"), {}

    def train(task, kind, data, seed, **options):
        seen[kind] = data
        return study("training").initial_model(task, kind)

    monkeypatch.setattr(models, "train", train)
    monkeypatch.setattr(
        models, "train_twist", lambda task, rows, seed: train(task, "twist", rows, seed)
    )
    for kind in ("soft_q", "twist"):
        models.model_of(task, kind, 1, tmp_path)
    assert {len(row) for row in seen["soft_q"]} == {4}  # prompt, answer, label, targets
    assert seen["soft_q"] == seen["twist"]
    assert len(seen["genarm"]) == task.sizes.pairs
