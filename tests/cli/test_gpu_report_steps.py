"""The steps of gpu-report: processes of their own, with limits, a budget, and a record each."""

import json
import os
import time
from pathlib import Path

import pytest
from report_steps import BAD, GOOD, SLEEPY, alive, counting, record, step

from rgtg_fast.cli.gpu_report import runner, steps
from rgtg_fast.cli.gpu_report.runner import run_step, run_steps
from rgtg_fast.cli.gpu_report.steps import STEPS, Place, Step, chosen

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path):
    return runner.folder_of(tmp_path / "report", dry=True, keep=False)


def run_all(wanted, out, **options):
    common = {"tree": None, "dry": True, "resume": False, "timeout": None, "deadline": None}
    run_steps(wanted, out, **(common | options))


def test_the_steps_come_in_the_order_that_measures_most_before_time_is_up():
    groups = list(dict.fromkeys(s.group for s in STEPS))
    order = ["build", "environment", "precompile", "test_gpu", "microbench", "generate"]
    assert groups == [*order, "matrix", "sanitizer"]
    assert len({s.name for s in STEPS}) == len(STEPS)
    assert sum(s.expected for s in STEPS) < 3 * 600
    assert all(s.expected <= s.limit for s in STEPS)


def test_nothing_stops_at_a_failure_and_every_step_has_its_record(out, capsys):
    run_all([BAD, GOOD], out)
    assert record(out, "bad") | {"seconds": 0} == {
        "name": "bad",
        "status": "failed",
        "rc": 3,
        "seconds": 0,
        "command": record(out, "bad")["command"],
        "tail": "why not\n",
    }
    assert record(out, "good")["status"] == "ok" and record(out, "good")["tail"] == "done\n"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("[1/2] bad") and said[0].endswith("failed")
    assert said[1].startswith("[2/2] good") and said[1].endswith("ok")


CHILD = """import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])
open(folder + '/pid', 'w').write(str(child.pid))"""


def test_a_step_beyond_its_limit_is_killed_with_its_children_and_the_next_runs(out):
    code = f"{CHILD}; time.sleep(20); open(folder + '/slept', 'w')"
    run_all([step("family", code, limit=3.0), GOOD], out)
    found = record(out, "family")
    assert found["status"] == "timed out" and found["why"] == "killed after 3 s"
    assert "rc" not in found
    assert not (out / "steps" / "family" / "slept").exists()
    assert not alive(int((out / "steps" / "family" / "pid").read_text()))
    assert record(out, "good")["status"] == "ok"


def test_what_a_finished_step_left_running_is_killed(out):
    run_all([step("parent", CHILD)], out)
    pid = int((out / "steps" / "parent" / "pid").read_text())
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert record(out, "parent")["status"] == "ok" and not alive(pid)


def test_one_timeout_for_all_replaces_each_limit(out):
    run_all([SLEEPY], out, timeout=0.3)
    assert record(out, "sleepy")["why"] == "killed after 0 s"


def test_resume_keeps_what_has_ended_and_runs_the_rest(out):
    failing = counting("failing", "raise SystemExit(1)")
    run_all([counting(), failing, SLEEPY], out)
    count = out / "count"
    assert count.read_text() == "xx"
    now = step("sleepy", "print('awake')")
    run_all([counting(), failing, now], out, resume=True)
    assert count.read_text() == "xx"
    assert record(out, "sleepy")["status"] == "ok"
    run_all([counting()], out)
    assert count.read_text() == "xxx"


def test_a_record_that_was_cut_off_is_no_record(out):
    run_all([counting()], out)
    file = out / "steps" / "counted" / "record.json"
    file.write_text(file.read_text()[:20])
    run_all([counting()], out, resume=True)
    assert (out / "count").read_text() == "xx" and record(out, "counted")["status"] == "ok"


def test_figures_of_an_earlier_run_of_a_step_are_gone_when_it_runs_again(out):
    run_all([step("one", "open(folder + '/figures.json', 'w').write('1')")], out)
    run_all([step("one", "raise SystemExit(1)")], out)
    assert not (out / "steps" / "one" / "figures.json").exists()


def test_what_does_not_fit_the_budget_is_skipped_and_said(out, capsys):
    long = step("long", "", expected=9.0)
    run_all([long, GOOD], out, deadline=time.monotonic() + 6)
    assert record(out, "long")["status"] == "skipped"
    assert "9 s are expected" in record(out, "long")["why"]
    assert "s are left of --budget" in capsys.readouterr().out
    assert record(out, "good")["status"] == "ok"


def test_no_step_runs_beyond_the_budget(out):
    slow = step("slow", "import time; time.sleep(15)", limit=60.0, expected=0.5)
    run_all([slow, GOOD], out, deadline=time.monotonic() + 1.5)
    assert record(out, "slow")["status"] == "timed out"
    assert record(out, "good")["status"] == "skipped"


def test_a_step_that_needs_the_tree_says_so_where_there_is_none(out):
    (build,) = chosen(["build"])
    run_all([build], out)
    assert record(out, "build")["status"] == "skipped"
    assert "needs the source tree" in record(out, "build")["why"]


def test_a_missing_program_is_said_and_not_asked_for_in_a_dry_run(out, monkeypatch):
    checked = step("checked", "", program="no-such-sanitizer")
    run_all([checked], out, dry=False)
    assert record(out, "checked")["why"] == "no-such-sanitizer is not installed"
    run_all([checked], out)
    assert record(out, "checked")["status"] == "ok"
    gone = Step("gone", lambda place: ["/no/such/program"], 5.0, 1.0, tree=False)
    run_all([gone, GOOD], out)
    assert record(out, "gone")["status"] == "failed" and record(out, "good")["status"] == "ok"


def test_a_step_has_an_environment_of_its_own(out, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-x")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    one = step("one", code, environment={"OWN": "1"})
    place = out / "steps" / "one"

    def seen(dry):
        assert run_step(one, Place(place, ROOT, dry), 60)["status"] == "ok"
        return json.loads((place / "output.txt").read_text())

    dry = seen(True)
    assert dry["TRITON_INTERPRET"] == dry["OWN"] == dry["HF_HUB_OFFLINE"] == "1"
    assert "PYTEST_ADDOPTS" not in dry and dry["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert "TRITON_INTERPRET" not in seen(False)


def test_the_tests_of_a_step_are_counted(out):
    xml = (
        '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10">'
        "</testsuite></testsuites>"
    )
    run_all([step("tests", f"open(folder + '/tests.xml', 'w').write({xml!r})")], out)
    assert record(out, "tests")["tests"] == {"passed": 4, "failed": 3, "skipped": 3}


def test_output_that_is_no_text_and_very_long_does_not_break_the_record(out):
    code = "import sys; sys.stdout.buffer.write(b'\\xff' * 100_000 + b'end')"
    run_all([step("loud", code)], out)
    assert len(record(out, "loud")["tail"]) == 4000 and record(out, "loud")["tail"].endswith("end")


def test_the_tree_is_that_of_the_package_or_the_current_folder(monkeypatch, tmp_path):
    assert runner.source_tree() == ROOT
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "a" / "b" / "c" / "d" / "runner.py"))
    monkeypatch.chdir(tmp_path)
    assert runner.source_tree() is None
    for part in ("tests", "bench", "kernels", "rgtg_fast"):
        (tmp_path / part).mkdir()
    (tmp_path / "setup.py").touch()
    assert runner.source_tree() == tmp_path
    assert (tmp_path / "rgtg_fast" / "kernels").samefile(tmp_path / "kernels")


def test_the_commands_for_a_gpu_ask_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "program", lambda name: f"/cuda/bin/{name}")
    for one in STEPS:
        argv = one.argv(Place(tmp_path, ROOT, dry=False))
        if one.group in ("microbench", "generate"):
            assert argv[argv.index("--device") + 1] == "cuda"
        if one.group in ("test_gpu", "matrix", "sanitizer"):
            assert argv[argv.index("-m", argv.index("pytest")) + 1] == "gpu"
            assert any((ROOT / word).exists() for word in argv if word.startswith("tests/"))
        if one.group == "sanitizer":
            tool = one.name.split(".")[1]
            assert argv[:3] == ["/cuda/bin/compute-sanitizer", "--tool", tool]


def test_the_options_of_the_generation_benchmark_are_its_own(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_generate

    for one in chosen(["generate"]):
        for dry in (False, True):
            argv = one.argv(Place(tmp_path, ROOT, dry))
            asked = bench_generate.parse_args(argv[argv.index("bench/bench_generate.py") + 1 :])
            assert asked.shape == "llama-8b" and asked.json.parent == tmp_path
            assert asked.device == ("cpu" if dry else "cuda") and "auto" in asked.contenders
