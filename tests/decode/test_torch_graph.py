"""The order of calls in which a CUDA graph is made, against a stand-in for torch.cuda."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from rgtg_fast.decode import graphs


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as far as graphs need it; `log` has the calls, `current` the current stream."""
    fake = SimpleNamespace(log=[], current="main")

    class Stream:
        def __repr__(self):
            return "side"

        def wait_stream(self, other):
            fake.log.append(f"side waits for {other}")

    class Outside:
        def __repr__(self):
            return "main"

        def wait_stream(self, other):
            fake.log.append(f"main waits for {other}")

    class Graph:
        def replay(self):
            fake.log.append(f"replay on {fake.current}")

    @contextmanager
    def stream(side):
        before, fake.current = fake.current, str(side)
        try:
            yield
        finally:
            fake.current = before

    class Recording:  # as torch.cuda.graph, whose end raises where the capture was broken
        def __init__(self, graph, pool, stream, capture_error_mode):
            fake.log.append(f"capture into {pool} on {stream}, {capture_error_mode}")

        def __enter__(self):
            self.before, fake.current = fake.current, "capturing"

        def __exit__(self, kind, *_):
            if kind is not None:
                raise RuntimeError("cudaErrorStreamCaptureInvalidated")
            fake.current = self.before

    @contextmanager
    def device(_):
        yield

    names = {"Stream": Stream, "CUDAGraph": Graph, "stream": stream, "graph": Recording}
    names |= {"device": device, "graph_pool_handle": lambda: "pool"}
    names |= {"current_stream": lambda _: Outside()}
    monkeypatch.setattr(graphs.torch, "cuda", SimpleNamespace(**names))
    return fake


def test_warm_up_runs_on_the_side_stream_in_order(cuda):
    graph = graphs.TorchGraph(torch.device("cuda:0"))
    graph.warm_up(lambda: cuda.log.append(f"step on {cuda.current}"))
    assert cuda.log == ["side waits for main", "step on side", "main waits for side"]
    assert cuda.current == "main"


def test_captures_share_a_pool_and_a_stream(cuda):
    graph = graphs.TorchGraph(torch.device("cuda:0"))
    for _ in range(2):
        graph.capture(lambda: cuda.log.append(f"step {cuda.current}"))
        graph.replay()
    once = ["capture into pool on side, thread_local", "step capturing", "replay on main"]
    assert cuda.log == once * 2


def test_a_failed_capture_gives_the_steps_error_and_the_stream_back(cuda):
    graph = graphs.TorchGraph(torch.device("cuda:0"))
    graph.capture(lambda: None)
    good = graph.graph

    def step():
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        graph.capture(step)
    assert cuda.current == "main" and graph.graph is good
