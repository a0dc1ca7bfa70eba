"""`rgtg-fast serve` starts `vllm serve` with the plug-in set up, or says what is wrong."""

import importlib.machinery
import importlib.util
import json
import os
import sys

import pytest

from rgtg_fast.cli import main
from rgtg_fast.demo.run import ASSETS

RM, LM = str(ASSETS / "rm_partial"), str(ASSETS / "lm")


@pytest.fixture
def started(monkeypatch):
    """What is executed in the place of the process."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda path, argv: commands.append((path, argv)))
    spec = importlib.machinery.ModuleSpec("vllm", None, origin="vllm/__init__.py")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "vllm" else real(name)
    )
    return commands


def test_vllm_serve_is_started_with_the_plug_in(started):
    main(
        [
            "serve",
            "lm",
            "--reward-model",
            RM,
            "--k",
            "4",
            "--beta",
            "2",
            "--kv-gib",
            "1",
            "--vllm",
            "--port",
            "8000",
        ]
    )
    ((path, argv),) = started
    assert path == argv[0] == sys.executable
    assert argv[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "lm"]
    assert argv[5:7] == ["--logits-processors", "rgtg_fast.vllm:RewardGuided"]
    own = {"k": 4, "beta": 2.0, "kv_gib": 1.0, "reward_model": RM}
    assert argv[7] == "--additional-config" and json.loads(argv[8]) == {"rgtg": own}
    assert argv[9:] == ["--port", "8000"]


def test_two_reward_models_are_policy_and_reference(started):
    main(["serve", "lm", "--reward-model", LM, LM, "--on-request"])
    found = json.loads(started[0][1][8])["rgtg"]
    assert found == {"reward_model": [LM, LM], "guide": False}


def test_a_sum_of_rewards_and_a_preset_are_json(started):
    reward = {"parts": [{"model": RM, "weight": 0.5}, {"model": RM, "clamp": [-1, 1]}]}
    preset = {"name": "rad", "beta": 3.0}
    argv = ["serve", "lm", "--reward-model", json.dumps(reward), "--preset", json.dumps(preset)]
    main(argv)
    assert json.loads(started[0][1][8])["rgtg"] == {"reward_model": reward, "preset": preset}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (f"lm --reward-model {RM} --vllm --additional-config {{}}", "--additional-config is set"),
        (f"lm --reward-model {RM} --vllm --logits-processors=x", "--logits-processors is set by"),
        ("lm --reward-model a b c", "reward_model="),
        ("lm --reward-model ./nowhere", "no model at './nowhere'"),
        ("lm --reward-model {parts", "--reward-model is no JSON"),
        (f"lm --reward-model {RM} --preset parks", "preset='parks'"),
        (f"lm --reward-model {RM} --reward-kind rad", "reward_kind='rad'"),
        (f"lm --reward-model {RM} --k 65", "65"),
        ("lm", "--reward-model"),
    ],
)
def test_what_cannot_be_served_is_said_before_it_starts(started, capsys, argv, said):
    with pytest.raises(SystemExit) as stop:
        main(["serve", *argv.split()])
    assert said in f"{stop.value.code} {capsys.readouterr().err}" and not started


def test_without_vllm_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["serve", "lm", "--reward-model", "rm"])
    assert "pip install vllm" in f"{stop.value.code} {capsys.readouterr().err}"
