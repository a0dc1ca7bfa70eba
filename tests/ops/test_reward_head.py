import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_support import FLOATS, SIMD_LEVELS, assert_no_worse, simd_level, threads

from rgtg_fast import ops


def check(hidden, weight, bias=None):
    offset = 0.0 if bias is None else float(bias)
    exact = hidden.double() @ weight.double() + offset
    own = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    torch_result = (hidden.to(own) * weight.to(own)).sum(dim=-1) + offset
    rewards = ops.reward_head(hidden, weight, bias, backend="cpp")
    reference = ops.reward_head(hidden, weight, bias, backend="reference")
    assert rewards.dtype == torch.float32 and rewards.shape == hidden.shape[:2]
    if rewards.numel():
        scale = (hidden.double().abs() @ weight.double().abs()).max().item()
        assert_no_worse(rewards, torch_result.float(), exact, scale)
        assert_no_worse(reference, torch_result.float(), exact)


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("hidden_dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_error_no_worse_than_torch(level, hidden_dtype, weight_dtype, data):
    rows, k = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 20))
    width = data.draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(width)
    hidden = torch.randn(rows, k, width, generator=generator).to(hidden_dtype)
    weight = torch.randn(width, generator=generator).to(weight_dtype)
    with simd_level(level):
        check(hidden, weight, data.draw(st.sampled_from([None, 0.25, torch.tensor([1.5])])))


def test_float64_is_accumulated_in_float64():
    hidden = torch.tensor([[[1e9, 1.0, -1e9]]], dtype=torch.float64)
    assert ops.reward_head(hidden, torch.ones(3)).item() == 1.0


def test_strided_views_and_threads():
    base = torch.randn(6, 30, 1000)
    with threads(3):
        check(base[::2, 3:20:4, 100:900], torch.randn(1600)[::2])
        check(base.transpose(0, 2)[:50], torch.randn(6))
        check(base[:1].expand(4, -1, -1), torch.randn(1000))


def test_nan_stays_in_its_candidate():
    hidden = torch.randn(2, 3, 40)
    hidden[0, 1, 7] = float("nan")
    assert ops.reward_head(hidden, torch.ones(40)).isnan().nonzero().tolist() == [[0, 1]]


def test_bias_as_zero_dimensional_tensor():
    hidden = torch.zeros(1, 2, 3)
    rewards = ops.reward_head(hidden, torch.ones(3), torch.tensor(0.5, dtype=torch.bfloat16))
    assert rewards.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_a_linear_layer(backend, compiled):
    inputs = [torch.randn(2, 3, 8), torch.randn(8), torch.randn(1)]
    inputs = [x.double().requires_grad_() for x in inputs]
    weights = torch.randn(2, 3, dtype=torch.float64)

    def rewards(*inputs):
        return ops.reward_head(*inputs, backend=backend)

    if compiled and backend == "cpp":
        rewards = torch.compile(rewards, fullgraph=True, backend="aot_eager")
    hidden, weight, bias = inputs
    want = torch.autograd.grad(((hidden @ weight + bias) * weights).sum(), inputs)
    got = torch.autograd.grad((rewards(*inputs) * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the rewards' own are float32


def test_compiles_without_graph_breaks():
    hidden, weight = torch.randn(3, 4, 17), torch.randn(17)
    compiled = torch.compile(ops.reward_head, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight, 0.5), ops.reward_head(hidden, weight, 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8), torch.zeros(8)), r"hidden has shape \[2, 8\]; pass \[B, k, H\]"),
        ((torch.zeros(2, 3, 8), torch.zeros(1, 8)), r"weight has shape \[1, 8\]; pass \[8\]"),
        ((torch.zeros(2, 3, 8), torch.zeros(8), torch.zeros(3)), r"bias has shape \[3\]; pass a"),
        ((torch.zeros(2, 3, 8).int(), torch.zeros(8)), r"hidden has dtype torch.int32; pass flo"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.reward_head(*arguments)
