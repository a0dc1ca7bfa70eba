"""The emulation of CUDA graphs has their semantics: what it says of a step holds on a GPU."""

import gc
import warnings

import pytest
import torch
from graph_emulated import Freed, NotCapturable, install

from rgtg_fast.decode import graphs, waits

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    return install(monkeypatch)


def captured(step):
    graph = graphs.TorchGraph(CPU)
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


@pytest.mark.parametrize("what", sorted(WAITS.keys() - {"random"}))
def test_what_waits_for_the_device_is_warned_of_in_the_debug_mode(cuda, what):
    with warnings.catch_warnings(record=True) as quiet, cuda.stream(cuda.main):
        warnings.simplefilter("always")
        WAITS[what]()
        assert not quiet
        cuda.set_sync_debug_mode("warn")
        WAITS[what]()
    assert str(quiet[0].message).startswith(waits.WAITED)


def test_after_an_error_a_capture_takes_nothing_and_its_end_raises(cuda):
    def step():
        with pytest.raises(NotCapturable):
            X.sum().item()
        X + 1

    with pytest.raises(NotCapturable, match="not permitted"):
        captured(step)


def test_a_capture_that_swallows_an_error_fails_at_its_end(cuda):
    def step():
        with pytest.raises(NotCapturable):
            X.sum().item()

    with pytest.raises(RuntimeError, match="Invalidated"):
        captured(step)


def test_memory_freed_since_the_capture_is_not_replayed_on():
    x = [torch.zeros(2), torch.ones(2)]
    graph = captured(lambda: x[0].add_(x[1]))
    graph.replay()
    assert x[0].tolist() == [1, 1]
    del x[1]
    with pytest.raises(Freed, match="freed since the capture"):
        graph.replay()


def test_memory_of_a_graph_that_has_gone_is_not_used(cuda):
    held = []
    graph = captured(lambda: held.append(X + 1))
    with cuda.stream(cuda.main):
        held[0] + 1
        del graph
        with pytest.raises(Freed, match="graph that has gone"):
            held[0] + 1
    with pytest.raises(Freed, match="graph that has gone"):
        captured(lambda: held[0] + 1)
    held.clear()
    captured(lambda: X + 1).replay()


def test_a_graph_takes_the_workspace_of_its_stream_with_it(cuda):
    """torch 2.12 and 2.13; as if two objects shared a stream."""
    a, stream = torch.ones(2, 2), cuda.Stream()
    recorded = [cuda.CUDAGraph(), cuda.CUDAGraph()]
    for graph in recorded:
        with cuda.stream(stream), cuda.graph(graph, cuda.graph_pool_handle(), stream, "global"):
            a @ a
    recorded[1].replay()
    del recorded[0], graph
    with pytest.raises(Freed, match="workspace"):
        recorded[0].replay()


@pytest.mark.parametrize("leaves_generator", [True, False])
def test_a_capture_that_fails_leaves_generator_and_pool(monkeypatch, leaves_generator):
    """Without what `TorchGraph` does about it."""
    cuda = install(monkeypatch, leaves_generator=leaves_generator)
    graph, pool, stream = cuda.CUDAGraph(), cuda.graph_pool_handle(), cuda.Stream()
    with pytest.raises(RuntimeError), cuda.stream(stream), cuda.graph(graph, pool, stream, ""):
        X.sum().item()
    if leaves_generator:
        with cuda.stream(cuda.main), pytest.raises(RuntimeError, match="Offset increment outside"):
            torch.rand(2)
    with pytest.raises(RuntimeError, match="already recording"):
        cuda.graph(cuda.CUDAGraph(), pool, stream, "").__enter__()
    del graph
    gc.collect()
    assert cuda.pools == {pool: 1}
