"""A run of `rgtg-fast eval` that cannot go on: broken guides and judges, Ctrl-C, a full disk."""

import errno
import math
import os
import shutil
import weakref
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_evaluation import GUIDE, PROMPTS, RUNS, config, rows
from tiny import gpt2_rm
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgtg_fast.cli import main
from rgtg_fast.demo.run import ASSETS
from rgtg_fast.evaluation import answers
from rgtg_fast.evaluation import models as prepared_models


@pytest.fixture
def copy_of(tmp_path):
    """Copies one of the embedded models, and changes the tensors in its file by a function."""

    def copy(name, change):
        shutil.copytree(ASSETS / name, tmp_path / "changed")
        file = tmp_path / "changed" / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})
        return str(tmp_path / "changed")

    return copy


def without_head(weights):
    del weights["score.weight"]


def of_nan(weights):
    weights["score.weight"].fill_(math.nan)


def truncated(weights):
    pass


@pytest.mark.parametrize("place", ["reward_model", "select_by", "judge"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_head, "lacks 1 of the weights of .*score.weight.*would be random"),
        (of_nan, "nan|NaN"),
        (truncated, "safetensors|header|incomplete"),
    ],
)
def test_a_broken_model_is_found_before_the_first_answer(
    tmp_path, copy_of, monkeypatch, place, change, message
):
    broken = copy_of("rm_partial", change)
    if change is truncated:
        os.truncate(f"{broken}/model.safetensors", 5000)
    last = {"name": "last", place: broken}
    last |= {"best_of": 2} if place == "select_by" else {}
    judge = {} if place != "judge" else {"judge": broken}
    runs = [{"name": "base"}, *([] if judge else [last])]
    monkeypatch.setattr(answers.Answerer, "batch", None)
    path = config(tmp_path, runs=runs, limit=2, win_judge=None, **judge)
    with pytest.raises(SystemExit, match=f"eval: .*({message})") as error:
        main(["eval", "--config", path])
    assert "\n" not in str(error.value)


def test_one_guide_is_in_memory_at_a_time_and_each_is_tried_first(tmp_path, monkeypatch):
    other = str(shutil.copytree(GUIDE, tmp_path / "other"))
    events = []
    load, batch = prepared_models.load_classifier, answers.Answerer.batch

    def loads(name, settings):
        model = load(name, settings)
        alive = [ref for ref in loads.alive if ref() is not None]
        loads.alive = [*alive, weakref.ref(model)]
        events.append(("load", Path(name).name, len(alive)))
        return model

    def batches(self, *args):
        events.append(("batch", self.run.name))
        return batch(self, *args)

    loads.alive = []
    monkeypatch.setattr(prepared_models, "load_classifier", loads)
    monkeypatch.setattr(answers.Answerer, "batch", batches)
    runs = [
        {"name": "one", "reward_model": GUIDE},
        {"name": "two", "reward_model": other},
        {"name": "three", "reward_model": GUIDE, "beta": 3.0},
    ]
    path = config(tmp_path, runs=runs, limit=2, seeds=1, max_new_tokens=2, win_judge=None)
    main(["eval", "--config", path, "plots=false"])
    assert events == [
        ("load", "rm_full", 0),  # the judge
        ("load", "other", 0),
        ("load", "rm_partial", 0),
        ("batch", "one"),
        ("load", "other", 0),
        ("batch", "two"),
        ("load", "rm_partial", 0),
        ("batch", "three"),
        ("load", "rm_full", 0),
    ]


def test_a_guide_that_cannot_hold_the_longest_answer_is_found_first(tmp_path, monkeypatch):
    gpt2_rm(n_positions=16, vocab_size=loaded_vocabulary()).save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(ASSETS / "lm").save_pretrained(tmp_path / "short")
    monkeypatch.setattr(answers.Answerer, "batch", None)
    runs = [{"name": "base"}, {"name": "short", "reward_model": str(tmp_path / "short")}]
    with pytest.raises(SystemExit, match="reward_model has 16 positions"):
        main(["eval", "--config", config(tmp_path, runs=runs, win_judge=None)])


def loaded_vocabulary():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "lm").config.vocab_size


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(tmp_path, monkeypatch, capsys):
    path = config(tmp_path, runs=RUNS[:1], seeds=1, win_judge=None, plots=False)
    batch, numbers = answers.Answerer.batch, []

    def interrupted(self, prompts, own, of_prompts):
        numbers.append(list(own))
        if len(numbers) == 2:
            raise KeyboardInterrupt
        return batch(self, prompts, own, of_prompts)

    monkeypatch.setattr(answers.Answerer, "batch", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--config", path])
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert "eval: stopped. What is done is kept in output_dir: the same command goes on" in said
    assert "Traceback" not in said
    main(["eval", "--config", path])
    assert numbers == [[0, 1, 2, 3, 4], [5, 6, 7], [5, 6, 7]]


def test_a_full_disk_is_named_and_what_was_kept_stays(tmp_path, monkeypatch):
    path = config(tmp_path, runs=RUNS[:1], seeds=1, win_judge=None, plots=False)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # the key, a batch, and this one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr("rgtg_fast.evaluation.store.os.fsync", full)
    message = r"eval: no space left on the disk for .*base\.0\.answers.*the same command goes on"
    with pytest.raises(SystemExit, match=message):
        main(["eval", "--config", path])
    main(["eval", "--config", path])
    assert [row["i"] for row in rows(tmp_path, "base.0.answers")[1]] == list(range(PROMPTS))


def test_a_language_model_in_a_classifiers_place_is_told_to_say_its_kind(tmp_path):
    arm = str(ASSETS / "rm_genarm_prefix")
    path = config(tmp_path, runs=[{"name": "base"}, {"name": "arm", "reward_model": arm}])
    with pytest.raises(SystemExit, match=r"or say its kind \(autoregressive, vocab, rewriting\)"):
        main(["eval", "--config", path])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "customer : my lamp leaks . agent :"}\n')
    command = ["generate", "--model", str(ASSETS / "lm"), "--reward-model", arm]
    command += ["--input", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit, match="was saved as LlamaForCausalLM: say its kind"):
        main(command)
