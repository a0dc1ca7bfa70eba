import math

import pytest
import torch

import rgtg_fast
from rgtg_fast import _C, ops
from rgtg_fast.ops import crossover, dispatch, installation


def test_info_names_every_op_and_backend():
    facts = installation.info()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["simd"]["in use"] in facts["simd"]["available"]
    for op in ops.OPS:
        listed = facts["backends"][op]
        assert set(listed) == {"reference", "cpp", "triton", "cuda"}
        assert listed["reference"] is None
    assert facts["backends"]["topk_logprobs"]["cpp"] is None
    assert facts["backends"]["candidate_attention"]["cpp"] is None


def test_show_config_prints_a_reason_for_what_is_missing(capsys, monkeypatch):
    has_kernel = dispatch.has_kernel

    def all_but_one(op, backend):
        return op != "reward_head" and has_kernel(op, backend)

    monkeypatch.setattr(dispatch, "has_kernel", all_but_one)
    rgtg_fast.show_config()
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and _C.build_info()["compiler"] in printed
    assert "topk_logprobs (auto: cpp on cpu" in printed
    assert "no: there is no C++ kernel of reward_head" in printed
    assert "reward_head (auto: reference on cpu" in printed


def test_without_the_extension_auto_is_said_to_be_the_error_that_it_is(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "missing_extension", "it was never built")
    rgtg_fast.show_config()
    printed = capsys.readouterr().out
    assert "topk_logprobs (auto: an error on cpu" in printed and "it was never built" in printed
    with pytest.raises(ops.BackendUnavailable, match="it was never built"):
        rgtg_fast.ops.topk_logprobs(torch.randn(2, 50), 5)


@pytest.mark.parametrize("op", ops.OPS)
def test_an_absent_backend_is_an_error_with_a_reason(op, monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_reason", lambda op: "Triton is not here")
    with pytest.raises(ops.BackendUnavailable, match=r"Triton is not here; pass backend='refe"):
        dispatch.settle(op, "triton", "cuda", 1)


@pytest.mark.parametrize("op", ops.OPS)
def test_auto_is_torch_where_there_is_no_kernel_and_asking_for_one_is_an_error(op, monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda op, backend: f"no {backend} here")
    assert dispatch.settle(op, "auto", "cuda", 1) == "reference"
    assert dispatch.settle(op, "auto", "xpu", 1) == "reference"
    with pytest.raises(ops.BackendUnavailable, match="no cuda here"):
        dispatch.settle(op, "cuda", "cuda", 1)


@pytest.mark.parametrize(("there", "chosen"), [("cuda triton", "triton"), ("cuda", "cuda")])
def test_auto_on_cuda_is_the_faster_of_what_is_there(there, chosen, monkeypatch):
    table = {"reward_head": ((8, "triton"), (crossover.ANY, "cuda"))}
    monkeypatch.setattr(crossover, "FASTER", table)
    monkeypatch.setattr(dispatch, "_compiled_for", lambda op, device: there)
    assert dispatch.automatic("reward_head", "cuda", rows=8) == chosen
    assert dispatch.automatic("reward_head", "cuda", rows=9) == "cuda"


def test_crossover_has_an_answer_for_every_op():
    for op in ops.OPS:
        assert crossover.faster(op, 10**9) in ("cuda", "triton")


def test_a_backend_for_the_other_device_is_an_error():
    with pytest.raises(ops.BackendUnavailable, match="it runs on cpu tensors and these are on"):
        dispatch.settle("topk_logprobs", "cpp", "cuda", 1)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='c' is unknown; pass one of auto, reference"):
        ops.topk_logprobs(torch.zeros(1, 2), 1, backend="c")


def test_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv("RGTG_BACKEND", "cuda")
    with pytest.raises(ops.BackendUnavailable, match="cuda"):
        ops.topk_logprobs(torch.zeros(1, 2), 1)
    ops.topk_logprobs(torch.zeros(1, 2), 1, backend="cpp")
    monkeypatch.setenv("RGTG_BACKEND", "reference")
    logprobs, ids = ops.topk_logprobs(torch.zeros(1, 99), 99)  # more than the kernels take
    assert ids.tolist() == [list(range(99))]
    torch.testing.assert_close(logprobs, torch.full((1, 99), -math.log(99)))
    monkeypatch.setenv("RGTG_BACKEND", "fastest")
    with pytest.raises(ValueError, match="RGTG_BACKEND='fastest' is unknown; set it to one of"):
        ops.topk_logprobs(torch.zeros(1, 2), 1)


def test_simd_level_that_does_not_exist():
    with pytest.raises(
        ValueError, match="SIMD level 'mmx' is not available here; pass one of base"
    ):
        _C.set_simd_level("mmx")
