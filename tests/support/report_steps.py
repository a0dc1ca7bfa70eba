"""Steps of a report made of a line of Python, and what became of them."""

import json
import sys
from pathlib import Path

from rgtg_fast.cli.gpu_report.steps import Step


def step(name, code, limit=60.0, **options):
    """One that runs Python `code`, where `folder` is its own."""

    def argv(place):
        return [sys.executable, "-S", "-c", f"folder = {str(place.folder)!r}\n{code}"]

    return Step(name, argv, limit, options.pop("expected", 1.0), tree=False, **options)


GOOD = step("good", "print('done')")
BAD = step("bad", "print('why not'); raise SystemExit(3)")
SLEEPY = step("sleepy", "import time; print('begun', flush=True); time.sleep(60)", limit=1.0)


def record(out, name):
    return json.loads((out / "steps" / name / "record.json").read_text())


def alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def counting(name="counted", code=""):
    return step(name, f"open(folder + '/../../count', 'a').write('x'); {code}")
