"""`rgtg-fast generate` in processes of its own: killed, under torchrun, as in the README."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import rgtg_fast

ROOT = Path(rgtg_fast.__file__).parents[1]
pytestmark = pytest.mark.slow


def test_kills_and_two_ranks_change_no_answer():
    """What the benchmark requires, of fewer prompts."""
    few = ["--prompts=60", "--new=24", "--batch=8", "--alone=8", "--repeat=1"]
    command = [sys.executable, str(ROOT / "bench" / "bench_job.py"), *few]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heading, row = done.stdout.splitlines()[-2:]
    assert heading.split()[:2] == ["prompts", "tokens"] and row.split()[0] == "60"
    assert all(15 <= int(lines) < 60 for lines in row.split()[2].split("/"))


def test_the_example_of_the_readme_runs(tmp_path):
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```\n(MODELS=.*?)```", text, re.DOTALL)
    python = shlex.quote(sys.executable)
    script = example.replace("python -c", f"{python} -c")
    script = script.replace("rgtg-fast generate", f"{python} -m rgtg_fast generate")
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    assert {row["id"] for row in rows} == {"kettle", "camera"}
    assert all(list(row) == ["id", "text", "tokens", "reward", "kl"] for row in rows)
    assert (tmp_path / "report" / "report.png").is_file()
