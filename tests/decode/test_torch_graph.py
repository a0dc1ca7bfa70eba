"""The order of calls in which CUDA graphs are made, and what of them is kept how long."""

import contextlib
import gc

import pytest
import torch
from graph_emulated import NotCapturable, install

from rgtg_fast.decode import graphs

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch):
    return install(monkeypatch)


@pytest.mark.parametrize("how", ["warm_up", "rehearse"])
def test_warm_up_runs_on_the_side_stream_in_order(cuda, how):
    graph = graphs.TorchGraph(CPU)
    getattr(graph, how)(lambda: cuda.log.append(f"step on {cuda.current}"))
    assert cuda.log == ["side waits for main", "step on side", "main waits for side"]
    assert cuda.current == "main"


def test_captures_share_a_pool_and_a_stream(cuda):
    graph = graphs.TorchGraph(CPU)
    for _ in range(2):
        graph.capture(lambda: cuda.log.append(f"step {cuda.current}"))
        graph.replay()
    once = ["capture into pool 0 on side, thread_local", "step capturing", "replay on main"]
    assert cuda.log == once * 2 and len(cuda.streams) == 1


def test_earlier_graphs_are_kept_as_long_as_the_object(cuda):
    """Else the workspace, on which the later one replays, would go with the earlier one."""
    graph, a = graphs.TorchGraph(CPU), torch.ones(2, 2)
    for _ in range(3):
        graph.capture(lambda: a @ a)
    gc.collect()
    graph.replay()
    assert cuda.pools == {"pool 0": 3}
    del graph
    assert cuda.pools == {"pool 0": 0}


def test_a_capture_that_was_dropped_keeps_the_workspace_of_those_before(cuda):
    graph, a = graphs.TorchGraph(CPU), torch.ones(2, 2)
    graph.capture(lambda: a @ a)

    def step():
        a @ a
        raise ValueError("not to do with the device")

    with pytest.raises(ValueError, match="not to do"):
        graph.capture(step)
    graph.replay()


def test_streams_are_handed_on_and_never_shared(cuda):
    a = torch.ones(2, 2)
    for _ in range(3):
        graph = graphs.TorchGraph(CPU)
        graph.capture(lambda: a @ a)
        graph.replay()
        del graph
    assert len(cuda.streams) == 1
    two = [graphs.TorchGraph(CPU), graphs.TorchGraph(CPU)]
    for graph in two:
        graph.capture(lambda: a @ a)
    del two[0], graph
    two[0].replay()
    assert len(cuda.streams) == 2


def test_a_stream_is_handed_on_after_its_graphs_have_gone(cuda, monkeypatch):
    seen = []

    class Free(list):
        def append(self, stream):
            seen.append(dict(cuda.pools))

    monkeypatch.setitem(graphs._streams, 0, Free())
    graph = graphs.TorchGraph(CPU)
    graph.capture(lambda: torch.ones(2))
    del graph
    assert seen == [{"pool 0": 0}]


@pytest.mark.parametrize("leaves_generator", [True, False])
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_capture_leaves_nothing(monkeypatch, error, breaks, leaves_generator):
    """torch 2.13 leaves the memory pool as it was in the capture, 2.12 the generator too."""
    cuda = install(monkeypatch, leaves_generator=leaves_generator)
    graph, x, fails = graphs.TorchGraph(CPU), torch.zeros(2), [False]

    def step():
        x.add_(1)
        if fails[0] and breaks:
            with contextlib.suppress(NotCapturable):
                bool(x.any())
        if fails[0]:
            raise error("the reason")

    graph.capture(step)
    fails[0] = True
    with pytest.raises(error, match="the reason"):
        graph.capture(step)
    assert cuda.current == "main"
    graph.replay()
    assert x.tolist() == [1, 1]
    with cuda.stream(cuda.main):
        torch.rand(2)
    fails[0] = False
    graph.capture(step)
    graph.replay()
    assert x.tolist() == [2, 2]
    del graph
    assert cuda.pools == {"pool 0": 0} and not cuda.allocating
