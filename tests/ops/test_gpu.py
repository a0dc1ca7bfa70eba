"""What only a GPU can show: graph capture and replay, side streams, other devices, full sizes."""

import pytest
import torch
from op_cases import Size, arguments
from parity import BACKENDS, CHECKS, IN_CUDA, carry

pytestmark = pytest.mark.gpu
COMPILED = [b for b in BACKENDS if b.name in ("triton-gpu", "cuda-gpu")]
CASES = [
    pytest.param(backend, op, id=f"{op}-{backend.name}")
    for backend in COMPILED
    for op in backend.ops
]


# What a decoding step and a training batch have.
SIZES = {"rows": 5, "k": 10, "width": 2048, "vocab": 128_003}
REAL = Size(torch.bfloat16, **SIZES, head=128, prefix=3000, heads=(32, 8))


def arguments_of(op):
    return arguments(op, REAL)[0]


def results(outputs):
    return outputs if isinstance(outputs, (tuple, list)) else (outputs,)


def same(got, want):
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(results(got), results(want), strict=True)
    )


@pytest.mark.parametrize(("backend", "op"), CASES)
def test_real_sizes(backend, op):
    CHECKS[op](backend, *arguments_of(op))


@pytest.mark.parametrize(("backend", "op"), CASES)
def test_graph_capture_and_replay(backend, op):
    call = backend.load()[op]
    given = [carry(a, "cuda") for a in arguments_of(op)]
    want = call(*given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(*given)
    for tensor in results(got):
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(got, want)


@pytest.mark.parametrize(("backend", "op"), CASES)
def test_side_stream(backend, op):
    """Inputs are written late on the same side stream: a launch elsewhere would read zeros."""
    call = backend.load()[op]
    given = [carry(a, "cuda") for a in arguments_of(op)]
    want = call(*given)
    late = [torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in given]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for a, b in zip(late, given, strict=True):
            if isinstance(a, torch.Tensor):
                a.copy_(b)
        got = call(*late)
    stream.synchronize()
    assert same(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize(("backend", "op"), CASES)
def test_second_device(backend, op):
    given = [carry(a, "cuda:1") for a in arguments_of(op)]
    got = results(backend.load()[op](*given))
    assert all(tensor.device.index == 1 for tensor in got)
    want = results(backend.load()[op](*(carry(a, "cuda:0") for a in arguments_of(op))))
    assert same([t.cpu() for t in got], [t.cpu() for t in want])


@pytest.mark.parametrize("op", IN_CUDA)
def test_no_host_synchronisation(op):
    given = [carry(a, "cuda") for a in arguments_of(op)]
    for backend in COMPILED:
        if op not in backend.ops:
            continue
        call = backend.load()[op]
        call(*given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
