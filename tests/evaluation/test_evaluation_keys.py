"""Kept rows of an evaluation: what they depend on changes their key."""

import copy

import pytest

from rgtg_fast.evaluation.prepared import Evaluation
from rgtg_fast.evaluation.prompts import Prompt
from rgtg_fast.evaluation.settings import check_settings


@pytest.fixture
def keys(tmp_path):
    """The keys of the run "guided" for a config with some values changed, by kind of row."""
    folders = {name: tmp_path / name for name in ("lm", "guide", "selector", "judge", "other")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    prompt = Prompt(source="hello", text="hello", ids=[1, 2])
    values = {
        "model": str(folders["lm"]),
        "prompts": "prompts.jsonl",
        "judge": str(folders["judge"]),
        "output_dir": "out",
        "baseline": "base",
        "win_judge": {"url": "http://localhost:1/v1", "model": "m", "max_tokens": 8},
        "runs": [
            {"name": "base"},
            {"name": "guided", "reward_model": str(folders["guide"])},
            {"name": "best", "best_of": 2, "select_by": str(folders["selector"])},
        ],
    }

    def of(change=lambda values: None, run="guided"):
        changed = copy.deepcopy(values)
        change(changed)
        settings = check_settings(changed)
        evaluation = Evaluation(settings, None, [prompt], tmp_path, None)
        spec = next(r for r in settings.runs if r.name == run)
        kinds = ("answers", "rewards", "wins")
        return {kind: getattr(evaluation, f"{kind}_key")(spec, 0) for kind in kinds}

    return of, folders


def changed(before, after):
    return {kind for kind in before if before[kind] != after[kind]}


def test_the_same_config_has_the_same_keys(keys):
    of, _ = keys
    assert not changed(of(), of())


def test_another_judge_changes_rewards_only(keys):
    of, folders = keys
    assert changed(of(), of(lambda v: v.update(judge=str(folders["other"])))) == {"rewards"}


def test_another_baseline_changes_wins_only(keys):
    of, _ = keys
    assert changed(of(), of(lambda v: v.update(baseline="best"))) == {"wins"}


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", 9), ("model", "n"), ("url", "http://localhost:2/v1")]
)
def test_what_the_win_judge_is_asked_changes_wins_only(keys, name, value):
    of, _ = keys
    assert changed(of(), of(lambda v: v["win_judge"].update({name: value}))) == {"wins"}


@pytest.mark.parametrize(("run", "folder"), [("guided", "guide"), ("best", "selector")])
def test_new_files_under_an_old_name_change_everything(keys, run, folder):
    of, folders = keys
    before = of(run=run)
    (folders[folder] / "config.json").write_text('{"new": true}')
    assert changed(before, of(run=run)) == {"answers", "rewards", "wins"}


def test_new_files_of_the_judge_change_rewards_only(keys):
    of, folders = keys
    before = of()
    (folders["judge"] / "config.json").write_text('{"new": true}')
    assert changed(before, of()) == {"rewards"}
