"""The emulation of CUDA graphs has their semantics: what it says of a step holds on a GPU."""

import pytest
import torch
from graph_emulated import EmulatedGraph, NotCapturable


def captured(step):
    graph = EmulatedGraph(torch.device("cpu"))
    graph.capture(step)
    return graph


def test_a_capture_changes_nothing_and_a_replay_does():
    x = torch.zeros(3)
    graph = captured(lambda: x.add_(1))
    assert x.tolist() == [0, 0, 0]
    graph.replay()
    graph.replay()
    assert x.tolist() == [2, 2, 2]


def test_a_number_of_the_host_stays_that_of_the_capture():
    x, count = torch.zeros(1), [0]

    def step():
        count[0] += 1
        x.add_(count[0])

    graph = captured(step)
    graph.replay()
    graph.replay()
    assert x.item() == 2 and count == [1]


def test_a_name_bound_anew_does_not_move_the_address():
    state = {"x": torch.zeros(1)}
    first = state["x"]

    def step():
        state["x"] = state["x"] + 1

    graph = captured(step)
    graph.replay()
    graph.replay()
    assert first.item() == 0 and state["x"].item() == 1


def test_results_are_rubbish_before_the_first_replay():
    held = []
    graph = captured(lambda: held.append(torch.ones(2) * 3))
    assert held[0].isnan().all()
    graph.replay()
    assert held[0].tolist() == [3, 3]


def test_views_and_slices_write_through():
    x, y = torch.zeros(2, 3), torch.arange(3.0)
    graph = captured(lambda: x[:, 1:].copy_(y.view(1, 3)[:, :2] * 2))
    y += 1
    graph.replay()
    assert x.tolist() == [[0, 2, 4], [0, 2, 4]]


def test_a_failed_capture_changes_nothing():
    x = torch.zeros(1)

    def step():
        x.add_(1)
        raise RuntimeError("odd")

    with pytest.raises(RuntimeError, match="odd"):
        captured(step)
    assert x.item() == 0


X = torch.arange(4.0)
WAITS = {
    "item": lambda: X.sum().item(),
    "bool": lambda: bool(X.any()),
    "int": lambda: int(X[0]),
    "nonzero": lambda: X.nonzero(),
    "mask": lambda: X[X > 1],
    "mask written": lambda: X.clone().index_put_((X > 1,), X[:2]),
    "unique": lambda: X.unique(),
    "equal": lambda: torch.equal(X, X),
    "repeats": lambda: torch.repeat_interleave(X, X.long()),
    "tensor": lambda: torch.tensor([1.0]),
    "large isin": lambda: torch.isin(X, torch.arange(50.0)),
    "random": lambda: torch.rand(2),
    "checked distribution": lambda: torch.distributions.Categorical(logits=X, validate_args=True),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_for_the_device_cannot_be_captured(what):
    with pytest.raises(NotCapturable, match="not permitted when stream is capturing"):
        captured(WAITS[what])
