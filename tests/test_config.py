import pytest
import torch

import rgtg_fast
from rgtg_fast import _C, config, ops


def test_info_names_every_op_and_backend():
    facts = config.info()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["simd"]["in use"] in facts["simd"]["available"]
    for op in ops.OPS:
        backends = facts["backends"][op]
        assert set(backends) == {"reference", "cpp", "triton", "cuda"}
        assert backends["reference"] is None and backends["cpp"] is None
        assert "no Triton kernel" in backends["triton"]


def test_show_config_prints_a_reason_for_what_is_missing(capsys):
    rgtg_fast.show_config()
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and _C.build_info()["compiler"] in printed
    assert "no: there is no Triton kernel of topk_logprobs" in printed


@pytest.mark.parametrize("op", ops.OPS)
def test_an_absent_backend_is_an_error_with_a_reason(op):
    with pytest.raises(ops.BackendUnavailable, match=r"no Triton kernel.*pass backend='reference'"):
        ops._is_reference(op, "triton", "cuda")


@pytest.mark.parametrize("op", [op for op in ops.OPS if op != "topk_logprobs"])
def test_auto_on_cuda_is_torch_where_there_is_no_kernel_and_asking_for_one_is_an_error(op):
    assert ops._is_reference(op, "auto", "cuda")
    with pytest.raises(ops.BackendUnavailable, match=f"no CUDA kernel of {op}"):
        ops._is_reference(op, "cuda", "cuda")


def test_a_backend_for_the_other_device_is_an_error():
    with pytest.raises(ops.BackendUnavailable, match="it runs on cpu tensors and these are on"):
        ops._is_reference("topk_logprobs", "cpp", "cuda")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='c' is unknown; pass one of auto, reference"):
        ops.topk_logprobs(torch.zeros(1, 2), 1, backend="c")


def test_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv("RGTG_BACKEND", "triton")
    with pytest.raises(ops.BackendUnavailable, match="triton"):
        ops.topk_logprobs(torch.zeros(1, 2), 1)
    ops.topk_logprobs(torch.zeros(1, 2), 1, backend="cpp")
    monkeypatch.setenv("RGTG_BACKEND", "reference")
    assert ops.topk_logprobs(torch.zeros(1, 99), 99)[1].shape == (1, 99)
    monkeypatch.setenv("RGTG_BACKEND", "fastest")
    with pytest.raises(ValueError, match="RGTG_BACKEND='fastest' is unknown; set it to one of"):
        ops.topk_logprobs(torch.zeros(1, 2), 1)


def test_simd_level_that_does_not_exist():
    with pytest.raises(
        ValueError, match="SIMD level 'mmx' is not available here; pass one of base"
    ):
        _C.set_simd_level("mmx")
