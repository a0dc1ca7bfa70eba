"""kill -9 at any time in any round: nothing that was written is lost, and the models are those of a
run that nothing stopped, bit for bit."""

import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver

import on_policy
import pytest
import torch
from on_policy import config
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def spawn():
    """Processes forked from one that has the imports done; Python 3.11's finds them by PYTHONPATH
    only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["on_policy"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()

    def run(*args):
        process = context.Process(target=on_policy.run_until_killed, args=args)
        process.start()
        process.join(300)
        code = process.exitcode
        process.kill()  # one that hangs is a failure, and is not left behind
        return code

    return run


def written(folder):
    """The rows of answers and scores, and the pairs, as they stand; a torn last line is none."""
    return {
        path: [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]
        for pattern in ("round-*/*.answers.*", "round-*/*.rewards.*", "round-*/*pairs.jsonl")
        for path in folder.glob(pattern)
    }


# Where, and at the how-manieth time in that process. What has been done is not done again, so a
# later process comes to the next round.
KILLS = [
    ("in training", 3),  # round 0, behind its checkpoint
    ("within a row", 1),
    ("between rows", 1),  # the second half of the answers is missing
    ("between rows", 3),  # in the scores
    ("scored_pairs", 1),
    ("in training", 1),  # before a checkpoint
    ("in training", 3),
    ("between rows", 2),  # round 2
    ("within a row", 2),
    ("in training", 2),
    ("write_figures", 1),
]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(folder, spawn, monkeypatch):
    # So that the answers of a round are written in several goes.
    options = {"own": {"samples": 6, "batch_size": 1}}
    whole, killed = config(folder, "whole", **options), config(folder, "killed", **options)
    assert spawn(whole) == 0
    before = {}
    for where, count in KILLS:
        assert spawn(killed, where, count) == -signal.SIGKILL, (where, count)
        now = written(folder / "killed")
        for path, lines in before.items():
            kept = now[path][: len(lines)]
            if ".answers." in path.name:  # a run of answers that was cut short is made anew
                kept, lines = kept[: len(lines) // 16 * 16], lines[: len(lines) // 16 * 16]
            assert kept == lines, (where, count, path)
        before = now
    assert spawn(killed) == 0
    for number in (0, 1, 2):
        one, other = (
            load_file(folder / name / f"round-{number}" / "model.safetensors")
            for name in ("whole", "killed")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), number
    for path, lines in written(folder / "whole").items():
        assert (
            written(folder / "killed")[folder / "killed" / path.relative_to(folder / "whole")]
            == lines
        )
