"""Two processes train as one with the double batch; a killed run goes on where it was."""

import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing import forkserver

import pytest
import torch
import training_processes as children
from training import close


@pytest.fixture(scope="module")
def spawn():
    """Processes forked from one that has the imports done; Python 3.11's finds them by PYTHONPATH
    only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_processes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()
    return lambda target, *args: context.Process(target=target, args=args)


def run(*processes):
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that hangs is a failure, and is not left behind
    return codes


@pytest.mark.slow  # an interrupted run is continued in test_output_folder.py
@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_a_run_killed_in_its_second_epoch_ends_as_an_uninterrupted_one(tmp_path, spawn, sampling):
    whole = children.resumable(tmp_path / "whole", train_sampling_strategy=sampling)
    whole.train()
    path, out = tmp_path / "killed", tmp_path / "resumed.pt"
    assert run(spawn(children.train_until_killed, path, sampling)) == [-signal.SIGKILL]
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert run(spawn(children.resume, path, sampling, out)) == [0]
    losses, weights = torch.load(out)
    expected_losses, expected_weights = children.outcome(whole)
    assert losses == expected_losses
    close(weights, expected_weights, 0.0)


def test_two_processes_equal_one_with_the_double_batch(tmp_path, spawn):
    one = children.parallel_trainer(tmp_path / "one", 4)
    one.train()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "two.pt"
    ranks = [spawn(children.data_parallel, rank, port, tmp_path / "two", out) for rank in range(2)]
    assert run(*ranks) == [0, 0]
    losses, weights, metrics = torch.load(out)
    expected_losses, expected_weights = children.outcome(one)
    assert losses == pytest.approx(expected_losses, rel=1e-6, abs=1e-4)
    close(weights, expected_weights, 1e-10)
    expected = one.evaluate()
    for name in ("eval_accuracy", "eval_prefix_accuracy", "eval_accuracy_decile_30"):
        assert metrics[name] == pytest.approx(expected[name])
