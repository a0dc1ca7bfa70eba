"""`rgtg-fast generate --engine ray` on a cluster of this machine: the answers of one process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prompt_jobs import FLAGS, PROMPTS, Job, flags_of

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
MARK = "RGTG_TEST_KILLED"


def lengths(texts):
    """Rewards; the first actor that is asked kills its process, once."""
    place = Path(os.environ[MARK])
    try:
        place.touch(exist_ok=False)
    except FileExistsError:
        return [len(text) / 50 for text in texts]
    os.kill(os.getpid(), signal.SIGKILL)


def fails(texts):
    raise ValueError("the reward is on strike")


@pytest.fixture
def job(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *os.sys.path]))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = [{"id": f"p{i}", "prompt": PROMPTS[i % len(PROMPTS)]} for i in range(24)]
    rows[3]["beta"], rows[5]["prompt"] = 0.5, ""
    return Job(tmp_path, capsys).write(rows)


def tokens_of(answers):
    return {name: row.get("tokens", row.get("error")) for name, row in answers.items()}


def test_two_actors_give_the_answers_of_one_process_also_where_one_is_killed(job, monkeypatch):
    marked = job.folder / "killed"
    marked.touch()
    monkeypatch.setenv(MARK, str(marked))
    options = {"do_sample": True, "reward_model": "test_generate_ray:lengths"}
    assert job(**options) == 0, job.said
    want = tokens_of(job.answers())
    marked.unlink()
    out = job.folder / "ray.jsonl"
    assert job(**options, engine="ray", workers=2, output=out) == 0, job.said
    assert marked.exists()  # so one was killed
    job.output = out
    assert tokens_of(job.answers()) == want and len(want) == 24


def test_what_an_actor_raises_is_one_line_and_the_run_goes_on_after_it(job):
    # In a process of its own: Ray's log keeps the standard error of the first job in a process.
    files = {"input": job.input, "output": job.output, "engine": "ray"}
    options = FLAGS | files | {"reward_model": "test_generate_ray:fails"}
    command = [sys.executable, "-m", "rgtg_fast", "generate", *flags_of(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1
    assert "on strike" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
