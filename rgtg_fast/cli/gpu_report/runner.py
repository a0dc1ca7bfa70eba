"""Runs steps, each in a process of its own with a time limit, and keeps a record of each.

OUT/run.json                      whether it is a dry run
OUT/steps/<name>/record.json      status, exit status, seconds, the end of the output
OUT/steps/<name>/output.txt, ...  the output, and what the step itself wrote
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from filelock import FileLock, Timeout

from .steps import TESTS, Place, Step, program

ENDED = ("ok", "failed")  # by itself: --resume does not run it again
TAIL = 4000  # characters of the output in the record
DRY_LIMIT, DRY_EXPECTED = 120.0, 10.0


def folder_of(out: Path, dry: bool, keep: bool) -> Path:
    """`out`, made and written to; `keep` says that earlier records in it are wanted.

    Raises:
        ValueError: if it cannot be used, or holds the records of another run.
    """
    out = out.absolute()
    try:
        (out / "steps").mkdir(parents=True, exist_ok=True)
        run = out / "run.json"
        earlier = read_json(run)
        if earlier is not None and bool(earlier.get("dry")) != dry:
            kind = "a dry run" if earlier.get("dry") else "a run on a GPU"
            raise ValueError(f"--out={str(out)!r} holds {kind}; name another folder")
        if not keep and any((out / "steps").iterdir()):
            raise ValueError(
                f"--out={str(out)!r} holds an earlier run; pass --resume to go on with it, --only "
                "to run steps of it again, or name another folder"
            )
        run.write_text(json.dumps({"dry": dry}) + "\n")
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise ValueError(f"--out={str(out)!r} cannot be written: {error.strerror}") from None
    return out


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second report out of the folder."""
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"--out={str(out)!r} is being written by another gpu-report") from None


def source_tree() -> Path | None:
    """The checkout that this package lies in, or else the current folder if it is one."""
    for root in (Path(__file__).parents[3], Path.cwd()):
        if all((root / part).exists() for part in ("setup.py", "tests", "bench", "kernels")):
            link = root / "rgtg_fast" / "kernels"
            if not link.exists():  # an installed package has it, a bare checkout does not
                link.symlink_to("../kernels")
            return root.absolute()
    return None


def read_json(file: Path) -> Any:
    """Its content; None where it is missing or cut off."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def run_steps(
    steps: Sequence[Step],
    out: Path,
    tree: Path | None,
    dry: bool,
    *,
    resume: bool,
    timeout: float | None,
    deadline: float | None,
) -> None:
    """Runs `steps` in order, whatever becomes of each, and says how it went.

    `timeout` replaces the limit of every step; what is expected to end behind `deadline` (of
    `time.monotonic`) is skipped, and no step runs beyond it. On an interrupt the step that runs is
    killed, its record kept, and the interrupt goes on.
    """
    for number, step in enumerate(steps, start=1):
        place = Place(out / "steps" / step.name, tree, dry)
        kept = read_json(place.folder / "record.json")
        if resume and kept and kept["status"] in ENDED:
            record = kept | {"status": f"{kept['status']}, kept"}
        else:
            record = _run_or_skip(step, place, timeout, deadline)
        why = f": {record['why']}" if record.get("why") else ""
        seconds = f"{record['seconds']:7.1f} s"
        print(
            f"[{number}/{len(steps)}] {step.name:28} {seconds}  {record['status']}{why}", flush=True
        )


def _run_or_skip(
    step: Step, place: Place, timeout: float | None, deadline: float | None
) -> dict[str, Any]:
    left = float("inf") if deadline is None else deadline - time.monotonic()
    expected = min(step.expected, DRY_EXPECTED) if place.dry else step.expected
    limit = timeout or (min(step.limit, DRY_LIMIT) if place.dry else step.limit)
    why = None
    if step.tree and place.tree is None:
        why = "it needs the source tree; run it in a checkout"
    elif step.program and not place.dry and program(step.program) is None:
        why = f"{step.program} is not installed"
    elif min(expected, limit) > left:
        why = f"{expected:.0f} s are expected, {max(0.0, left):.0f} s are left of --budget"
    if why is None:
        return run_step(step, place, min(limit, left))
    place.folder.mkdir(parents=True, exist_ok=True)
    return _keep(place, {"name": step.name, "status": "skipped", "seconds": 0.0, "why": why})


def run_step(step: Step, place: Place, limit: float) -> dict[str, Any]:
    """Runs one step for at most `limit` seconds and gives its record, which is on the disk too."""
    shutil.rmtree(place.folder, ignore_errors=True)  # figures of an earlier run would be read
    place.folder.mkdir(parents=True)
    argv = step.argv(place)
    record: dict[str, Any] = {"name": step.name, "status": "interrupted", "seconds": 0.0}
    words = (word.replace(str(place.folder), ".") for word in argv)
    record["command"] = " ".join("python" if word == sys.executable else word for word in words)
    begin = time.monotonic()
    try:
        with (place.folder / "output.txt").open("wb") as output:
            process = subprocess.Popen(
                argv, cwd=place.tree or place.folder, env=_environment(step, place),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                record["rc"] = process.wait(limit)
                record["status"] = "ok" if record["rc"] == 0 else "failed"
            except subprocess.TimeoutExpired:
                record |= {"status": "timed out", "why": f"killed after {limit:.0f} s"}
            finally:
                _end(process)
    except OSError as error:  # there is no such program
        record |= {"status": "failed", "why": str(error)}
    finally:
        record["seconds"] = round(time.monotonic() - begin, 1)
        _keep(place, record | _found(place))
    return record


def _end(process: subprocess.Popen) -> None:
    """Kills what the step started, itself included: a child left behind would hold the GPU."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _found(place: Place) -> dict[str, Any]:
    """The end of the output, and pytest's counts where there are some."""
    output = place.folder / "output.txt"
    text = output.read_text(errors="replace") if output.exists() else ""
    found: dict[str, Any] = {"tail": text[-TAIL:]}
    with suppress(OSError, ElementTree.ParseError):
        suite = next(ElementTree.parse(place.folder / TESTS).iter("testsuite"))
        counts = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
        bad = counts["failures"] + counts["errors"]
        found["tests"] = {"passed": counts["tests"] - bad - counts["skipped"], "failed": bad}
        found["tests"]["skipped"] = counts["skipped"]
    return found


def _keep(place: Place, record: dict[str, Any]) -> dict[str, Any]:
    (place.folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _environment(step: Step, place: Place) -> dict[str, str]:
    """The caller's, with the tree's package first; Triton interpreted in a dry run alone."""
    dropped = ("PYTEST_", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    if place.tree is not None:
        paths = [str(place.tree), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if place.dry:
        environment["TRITON_INTERPRET"] = "1"
    return environment | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"} | step.environment
