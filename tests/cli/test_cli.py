"""The command line: mistakes end with one line and a code, for every command."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rgtg_fast
from rgtg_fast import cli
from rgtg_fast.cli import COMMANDS, main
from rgtg_fast.demo.run import ASSETS

LM, GUIDE = str(ASSETS / "lm"), str(ASSETS / "rm_partial")
BY_CONFIG = ("train", "eval", "select-pairs")


def ends(capsys, *argv):
    """The code with which a command ends, and what it says to stderr."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required"),
        (["evl"], "invalid choice: 'evl'"),
        (["info", "more"], "unrecognized arguments: more"),
        (["demo", "--prompts", "0"], "--prompts: '0' is no int of at least 1 and at most 200"),
        (["demo", "--prompts", "many"], "'many' is no int"),
        (["demo", "--seed", "-1"], "'-1' is no int of at least 0"),
        (["demo", "--seed", str(2**63)], "is no int of at least 0"),
        (["bench", "ratio_smaple"], "invalid choice: 'ratio_smaple'"),
        (["bench", "--backend", "gpu"], "invalid choice: 'gpu'"),
        (["bench", "reward_head", "--repeat", "1"], "'1' is no int of at least 2"),
        (["bench", "--k", "65"], "'65' is no int of at least 1 and at most 64"),
        (["bench", "--k", "2.5"], "'2.5' is no int"),
        (["bench", "--new-tokens", "0"], "'0' is no int of at least 1"),
        (["bench", "--beta", "nan"], "'nan' is no finite number"),
        (["bench", "--beta", "1e999"], "'1e999' is no finite number"),
        (["bench", "--device", "gpu"], "torch has no device 'gpu' here"),
        *(([name], "--config") for name in BY_CONFIG),
        *(([name, "cfg.yaml"], "--config") for name in BY_CONFIG),
    ],
    ids=" ".join,
)
def test_arguments_that_cannot_be_parsed_end_with_2(capsys, argv, message):
    code, said = ends(capsys, *argv)
    assert code == 2 and message in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lm", "missing", "--reward-model", GUIDE], "--lm='missing' cannot be loaded by"),
        (["--lm", LM, "--reward-model", "missing"], "--reward-model='missing' cannot be loaded by"),
        (["--lm", LM], "--lm without --reward-model"),
        (["--text", ""], "--text='' has no tokens; pass a text"),
        (["--new-tokens", "300"], "pass max_new_tokens<="),
        (["reward_head", "--json", f"{ASSETS}/prompts.jsonl/x.json"], "name a file, in a folder"),
        (["reward_head", "--backend", "cuda"], "backend='cuda' cannot run reward_head"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_bench_names_what_is_wrong_in_one_line(capsys, argv, message):
    code, said = ends(capsys, "bench", "--repeat", "2", "--device", "cpu", *argv)
    assert code == 2 and said.startswith("bench: ") and message in said and "\n" not in said


def test_a_classifier_that_lacks_a_vocabulary_is_no_language_model(capsys):
    code, said = ends(capsys, "bench", "--lm", GUIDE, "--reward-model", LM, "--new-tokens", "2")
    assert code == 2 and said.startswith("bench: ") and "\n" not in said


@pytest.mark.parametrize("command", BY_CONFIG)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config file at"),
        (b"", "holds NoneType; write `key: value` lines"),
        (b"- a\n- b\n", "holds list"),
        (b"a: [1\nb: {", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"a: \x07", "is not YAML"),
        (b"a: !!python/object:os.system x", "is not YAML"),
        (b"modle: x\n", "unknown key modle: did you mean model?"),
        (b"5: x\n", "unknown key 5"),
        (b"model: x\n", "the config lacks"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line_and_2(capsys, tmp_path, command, text, message):
    path = tmp_path / "cfg.yaml"
    if text is not None:
        path.write_bytes(text)
    code, said = ends(capsys, command, "--config", str(path))
    assert code == 2 and said.startswith(f"{command}: ") and message in said and "\n" not in said


@pytest.mark.parametrize("command", BY_CONFIG)
def test_an_override_without_a_value_is_one_line(capsys, tmp_path, command):
    (tmp_path / "cfg.yaml").write_text("model: m\n")
    code, said = ends(capsys, command, "--config", str(tmp_path / "cfg.yaml"), "limit")
    assert code == 2 and "override 'limit'; write key=value" in said


MINIMAL = {
    "model": LM,
    "prompts": str(ASSETS / "prompts.jsonl"),
    "judge": str(ASSETS / "rm_full"),
    "output_dir": "o",
    "runs": [{"name": "base"}],
}
WRONG_VALUES = (5, -1, 2.5, True, "", "x", [], [1], {}, {"a": 1}, [[]], [{}], [{"name": 5}], "\x00")


@pytest.mark.parametrize("key", [*MINIMAL, "seeds", "tokenizer", "limit", "win_judge", "dtype"])
def test_no_value_of_a_wrong_kind_is_a_traceback(capsys, tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rgtg_fast.evaluation.run.generate_all", lambda evaluation: 1 / 0)
    for value in WRONG_VALUES:
        Path("cfg.yaml").write_text(json.dumps(MINIMAL | {key: value}))
        try:
            code, said = ends(capsys, "eval", "--config", "cfg.yaml")
        except ZeroDivisionError:  # it is allowed, and the work would begin
            continue
        assert code == 2 and said.startswith("eval: ") and "\n" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_ends_with_130_and_says_how_to_go_on(capsys, tmp_path, monkeypatch, command):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS[command], "run", interrupted)
    argv = ["--config", "x"] if command in BY_CONFIG else []
    own = {"gpu-report": "--out x", "plan": "--model x", "serve": "x --reward-model y"}
    argv = own[command].split() if command in own else argv
    code, said = ends(capsys, command, *argv)
    assert code == 130
    assert said.strip() == f"{command}: stopped. {COMMANDS[command].STOPPED}"
    assert "same command" in said and "Traceback" not in said


def test_a_full_disk_is_named(capsys, monkeypatch):
    def full(args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    monkeypatch.setattr(COMMANDS["train"], "run", full)
    code, said = ends(capsys, "train", "--config", "x")
    assert code == 1 and "no space left on the disk for model.safetensors; make room" in said


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def broken(args):
        raise AttributeError("ours")

    monkeypatch.setattr(COMMANDS["info"], "run", broken)
    with pytest.raises(AttributeError, match="ours"):
        main(["info"])


def test_a_reader_that_has_ended_is_no_traceback():
    """As in `rgtg-fast info | true`."""
    command = [sys.executable, "-m", "rgtg_fast", "info"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


def test_the_console_script_is_the_same_command_line():
    toml = (Path(rgtg_fast.__file__).parents[1] / "pyproject.toml").read_text()
    assert '\n[project.scripts]\nrgtg-fast = "rgtg_fast.cli:main"\n' in toml
    assert callable(cli.main) and cli.parser().prog == "rgtg-fast"
