"""The command gpu-report: its report, what ends it, and what it refuses."""

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from report_steps import BAD, GOOD, SLEEPY, counting, record, step
from test_cli import ends

from rgtg_fast.cli import gpu_report, parser
from rgtg_fast.cli.gpu_report import page, runner, steps
from rgtg_fast.cli.gpu_report.steps import STEPS, chosen

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(monkeypatch):
    """`use(steps)` makes these the steps that there are."""

    def use(*wanted):
        monkeypatch.setattr(steps, "STEPS", wanted)
        monkeypatch.setattr(page, "STEPS", wanted)

    return use


def dry_run(out, *options):
    asked = ["gpu-report", "--dry-run", "--out", str(out), *options]
    gpu_report.run(parser().parse_args(asked))


def test_one_archive_holds_the_records_the_output_and_the_page(installed, tmp_path, capsys):
    installed(GOOD, step("figures", "open(folder + '/raw.json', 'w').write('{}')"))
    dry_run(tmp_path / "o")
    with tarfile.open(tmp_path / "o" / "gpu_report.tar.gz") as archive:
        names = {name.removeprefix("gpu_report/") for name in archive.getnames()}
    assert {"REPORT.md", "run.json", "steps/good/record.json", "steps/good/output.txt"} <= names
    assert "steps/figures/raw.json" in names and "gpu_report.tar.gz" not in names
    text = (tmp_path / "o" / "REPORT.md").read_text()
    assert "| good | ok |" in text and "| not run |" in text and "it measures nothing" in text
    assert capsys.readouterr().out.splitlines()[-1].endswith("gpu_report.tar.gz")


def test_steps_without_success_are_named_at_the_end_and_the_report_is_there(installed, tmp_path):
    installed(GOOD, BAD, SLEEPY)
    with pytest.raises(SystemExit, match="2 steps without success: bad, sleepy"):
        dry_run(tmp_path / "o")
    text = (tmp_path / "o" / "REPORT.md").read_text()
    assert "| bad | failed (3) |" in text and "| sleepy | timed out |" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_kills_the_step_and_leaves_a_report(installed, tmp_path, capsys, number):
    code = (
        f"import os, time; os.kill({os.getpid()}, {int(number)})\n"
        "time.sleep(20); open(folder + '/slept', 'w')"
    )
    installed(GOOD, step("stopped", code), BAD)
    out = tmp_path / "o"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it
    try:
        code, said = ends(capsys, "gpu-report", "--dry-run", "--out", str(out))
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and "--resume goes on" in said
    assert record(out, "stopped")["status"] == "interrupted"
    assert not (out / "steps" / "stopped" / "slept").exists()
    assert "| stopped | interrupted |" in (out / "REPORT.md").read_text()
    assert not (out / "steps" / "bad").exists()
    assert tarfile.is_tarfile(out / "gpu_report.tar.gz")
    installed(GOOD, step("stopped", "pass"))
    dry_run(out, "--resume")
    assert record(out, "stopped")["status"] == "ok"


def test_only_runs_its_steps_anew_and_leaves_the_others_records(installed, tmp_path):
    out = tmp_path / "o"
    installed(counting("a.x"), counting("a.y"), counting("b"))
    dry_run(out)
    dry_run(out, "--only", "a.y", "--resume")
    assert (out / "count").read_text() == "xxxx"
    dry_run(out, "--only", "a")
    assert (out / "count").read_text() == "x" * 6
    assert record(out, "b")["status"] == "ok"


def test_a_used_folder_is_not_overwritten_without_a_word(installed, tmp_path, capsys):
    installed(GOOD)
    out = tmp_path / "o"
    dry_run(out)
    code, said = ends(capsys, "gpu-report", "--dry-run", "--out", str(out))
    assert code == 2 and "holds an earlier run; pass --resume" in said and "\n" not in said
    (out / "run.json").write_text('{"dry": false}')
    code, said = ends(capsys, "gpu-report", "--dry-run", "--out", str(out), "--resume")
    assert code == 2 and "holds a run on a GPU; name another folder" in said


def test_two_reports_do_not_write_one_folder(installed, tmp_path, capsys):
    installed(GOOD)
    out = runner.folder_of(tmp_path / "o", dry=True, keep=False)
    with runner.locked(out):
        code, said = ends(capsys, "gpu-report", "--dry-run", "--out", str(out))
    assert code == 2 and "is being written by another gpu-report" in said


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("micorbench", "did you mean microbench?"),
        ("microbench.topk", "did you mean microbench.topk_logprobs?"),
        ("sanitizer.memchek", "did you mean sanitizer.memcheck?"),
        ("../../etc/passwd", "there are build, environment"),
        ("", "there are build, environment"),
        ("\x00\n", "there are build, environment"),
        ("x" * 10_000, "there are build, environment"),
    ],
)
def test_a_step_that_does_not_exist_is_named_with_the_nearest(capsys, tmp_path, name, hint):
    code, said = ends(
        capsys, "gpu-report", "--dry-run", "--out", str(tmp_path / "o"), "--only", name
    )
    assert code == 2 and "--only: no step" in said and hint in said
    assert "\n" not in said and len(said) < 400 and not (tmp_path / "o").exists()


def test_without_a_gpu_it_says_what_can_be_tried(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, said = ends(capsys, "gpu-report", "--out", str(tmp_path / "o"))
    assert code == 2 and "pass --dry-run" in said and not (tmp_path / "o").exists()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "soon"])
def test_limits_are_above_zero(capsys, tmp_path, text):
    for option in ("--timeout", "--budget"):
        code, said = ends(capsys, "gpu-report", "--out", str(tmp_path), option, text)
        assert code == 2 and option in said


def test_an_out_folder_that_cannot_be_written_is_one_line(capsys, tmp_path, installed):
    installed(GOOD)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        code, said = ends(capsys, "gpu-report", "--dry-run", "--out", str(place))
        assert code == 2 and f"--out={str(place)!r} cannot be written" in said and "\n" not in said


def test_a_full_disk_is_one_line_and_says_how_to_go_on(capsys, tmp_path, installed, monkeypatch):
    installed(GOOD)
    right = Path.write_text

    def write_text(self, *arguments, **options):
        if self.name == "record.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return right(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    code, said = ends(capsys, "gpu-report", "--dry-run", "--out", str(tmp_path / "o"))
    assert code == 1 and "no space left on the disk" in said and "--resume goes on" in said
    assert "\n" not in said


@pytest.mark.slow
def test_a_dry_run_of_every_step_gives_a_full_report(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-m", "rgtg_fast", "gpu-report", "--dry-run", "--out"]
    out = tmp_path / "o"
    done = subprocess.run(
        [*command, str(out)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    states = {one.name: record(out, one.name) for one in STEPS}
    bad = {name: r["tail"][-1500:] for name, r in states.items() if r["status"] != "ok"}
    assert bad == {} and done.returncode == 0, done.stderr
    for name in ("test_gpu", "matrix", *(f"sanitizer.{tool}" for tool in steps.SANITIZERS)):
        assert states[name]["tests"]["passed"] > 0 and states[name]["tests"]["failed"] == 0
    with tarfile.open(out / "gpu_report.tar.gz") as archive:
        archive.extractall(tmp_path / "x", filter="data")
    got = tmp_path / "x" / "gpu_report"
    for one in chosen(["microbench"]):
        op = one.name.split(".")[1]
        raw = json.loads((got / "steps" / one.name / f"{op}_gpu.json").read_text())
        assert {row["implementation"] for row in raw["rows"]} >= {"cpp", "torch"}
        assert raw["empty launch"]["us"] > 0 and raw["copy GB/s"] > 0
    for one in chosen(["generate"]):
        (file,) = (got / "steps" / one.name).glob("generate_b*_gpu.json")
        raw = json.loads(file.read_text())
        names = {row["name"] for cell in raw["cells"] for row in cell["rows"]}
        assert {"plain", "auto"} <= names
    facts = json.loads((got / "steps" / "environment" / "environment.json").read_text())
    assert facts["versions"]["torch"] and facts["gpu"] is None
    compiled = (got / "steps" / "precompile" / "output.txt").read_text()
    assert compiled.count('"seconds"') >= 6 and "failed" not in compiled
    text = (got / "REPORT.md").read_text()
    assert all(f"| {one.name} | ok |" in text for one in STEPS)
    assert " 0 met, 0 missed, 0 stated, " in text
