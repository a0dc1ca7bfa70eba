"""Whose kernels run a call: `backend=` and RGTG_BACKEND say the same, in the same way."""

import functools

import pytest
import tiny
import torch
from calls import guided

from rgtg_fast import _C, ops
from rgtg_fast.models.attention import attention_kernel
from rgtg_fast.ops import dispatch

CPU = torch.device("cpu")
WAYS = ("argument", "environment")


def asked(backend, way, monkeypatch):
    """The keyword arguments of a call that asks for `backend` in one of two ways."""
    if way == "argument":
        return {"backend": backend}
    monkeypatch.setenv("RGTG_BACKEND", backend)
    return {}


def without(monkeypatch, backend, *missing):
    """Have `backend` of this version lack the kernels of some ops."""
    has_kernel = dispatch.has_kernel
    monkeypatch.setattr(
        dispatch,
        "has_kernel",
        lambda op, name: (op, name) not in [(m, backend) for m in missing] and has_kernel(op, name),
    )


@functools.cache
def models():
    return tiny.llama_lm(), tiny.llama_rm()


def answer(**options):
    """Tokens of a call that prunes, as lists."""
    options = {"k": 4, "max_new_tokens": 5, "seed": 3, "do_sample": True} | options
    return guided(*models(), **tiny.prompts(4, 7), reward_range=(-9.0, 9.0), **options).tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "backend", ["reference", "cpp", pytest.param("triton", marks=pytest.mark.slow)]
)
def test_a_call_gives_the_same_tokens_on_every_backend(backend, way, monkeypatch):
    size = {"k": 2, "max_new_tokens": 2} if backend == "triton" else {}  # it is interpreted
    expected = answer(**size)
    assert answer(**size, **asked(backend, way, monkeypatch)) == expected


@pytest.mark.parametrize("way", WAYS)
def test_a_backend_without_a_kernel_of_attention_leaves_that_to_auto(way, monkeypatch):
    """As CUDA C++ and Triton have none of `ratio_keep`; the rest is on the backend asked for."""
    expected = answer()
    without(monkeypatch, "cpp", "candidate_attention", "ratio_keep")
    monkeypatch.setattr("rgtg_fast.models.attention._kernels", {})
    options = asked("cpp", way, monkeypatch)
    assert attention_kernel(options.get("backend", "auto"), CPU) is None  # masks in its place
    assert answer(**options) == expected
    with pytest.raises(ops.BackendUnavailable, match=r"no C\+\+ kernel of candidate_attention"):
        ops.kernel("candidate_attention", "cpp", CPU)


@pytest.mark.skipif(_C.build_info()["cuda_archs"] is None, reason="built without nvcc")
@pytest.mark.parametrize("way", WAYS)
def test_attention_that_only_another_backend_has_runs_on_that(way, monkeypatch):
    """On a GPU, where Triton alone has it and CUDA C++ is asked for."""
    pytest.importorskip("rgtg_fast.kernels.library")
    without(monkeypatch, "cuda", "candidate_attention")
    monkeypatch.setattr(dispatch, "_compiled_for", lambda op, device: "triton")
    monkeypatch.setattr(dispatch, "_check_available", lambda op, backend, device: None)
    monkeypatch.setattr("rgtg_fast.models.attention._kernels", {})
    backend = asked("cuda", way, monkeypatch).get("backend", "auto")
    found = attention_kernel(backend, torch.device("cuda"))
    assert found is torch.ops.rgtg_fast_triton.candidate_attention.default
    topk = ops.kernel_or_auto("topk_logprobs", backend, torch.device("cuda"))
    assert topk is torch.ops.rgtg_fast.topk_logprobs.default


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
@pytest.mark.parametrize("way", WAYS)
def test_a_backend_that_cannot_run_here_is_an_error_by_its_name(way, monkeypatch):
    options = asked("cuda", way, monkeypatch)
    with pytest.raises(ops.BackendUnavailable, match=r"^backend='cuda' cannot run \w+: "):
        answer(**options)


def test_an_argument_stands_before_the_environment(monkeypatch):
    expected = answer()
    monkeypatch.setenv("RGTG_BACKEND", "cuda")
    assert answer(backend="cpp") == expected


def test_without_triton_asking_for_it_says_so(monkeypatch):
    def absent(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(dispatch.importlib, "import_module", absent)
    with pytest.raises(ops.BackendUnavailable, match=r"Triton cannot be imported.*install triton"):
        ops.kernel_or_auto("candidate_attention", "triton", CPU)
