import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_support import FLOATS, SIMD_LEVELS, assert_no_worse, simd_level, threads

from rgtg_fast import ops


def check(hidden, weight, ids):
    rows = weight[ids]
    own = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    exact = (rows.double() * hidden.double()[:, None]).sum(dim=-1)
    torch_result = (rows.to(own) * hidden.to(own)[:, None]).sum(dim=-1)
    rewards = ops.vocab_reward(hidden, weight, ids, backend="cpp")
    reference = ops.vocab_reward(hidden, weight, ids, backend="reference")
    assert rewards.dtype == torch.float32 and rewards.shape == ids.shape
    if rewards.numel():
        scale = (rows.double() * hidden.double()[:, None]).abs().sum(dim=-1).max().item()
        assert_no_worse(rewards, torch_result.float(), exact, scale)
        assert_no_worse(reference, torch_result.float(), exact)


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("hidden_dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_error_no_worse_than_torch(level, hidden_dtype, weight_dtype, data):
    rows, k = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 20))
    width, vocab = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(width)
    hidden = torch.randn(rows, width, generator=generator).to(hidden_dtype)
    weight = torch.randn(vocab, width, generator=generator).to(weight_dtype)
    ids = torch.randint(0, vocab, (rows, k), generator=generator)
    with simd_level(level):
        check(hidden, weight, ids)


def test_strided_views_and_threads():
    base, ids = torch.randn(80, 900), torch.randint(0, 40, (8, 12))
    with threads(3):
        check(base[:16:2, 50:850], base[40:, 100:].t()[:800].t(), ids[:, ::2])
        check(base.t()[:8, :40], base[:40, ::20][:, :40], ids)


def test_only_the_gathered_rows_are_read():
    weight = torch.full((1000, 16), float("nan"))
    weight[7] = 1.0
    rewards = ops.vocab_reward(torch.ones(2, 16), weight, torch.full((2, 3), 7))
    assert (rewards == 16).all()


@pytest.mark.parametrize("bad", [-1, 10])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_id_outside_the_vocabulary(bad, backend):
    ids = torch.tensor([[0, bad]])
    with pytest.raises(ValueError, match=rf"ids holds {bad} but weight has rows 0 .. 9"):
        ops.vocab_reward(torch.ones(1, 4), torch.ones(10, 4), ids, backend=backend)


@pytest.mark.parametrize("bad", [-1, 10])
def test_the_kernel_itself_refuses_an_id_outside_the_vocabulary(bad):
    ids = torch.tensor([[0, bad]])
    with pytest.raises(RuntimeError, match=f"ids: {bad} is outside the vocabulary of 10 tokens"):
        torch.ops.rgtg_fast.vocab_reward(torch.ones(1, 4), torch.ones(10, 4), ids)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradients_reach_the_gathered_rows_and_the_hidden_state(backend):
    hidden = torch.randn(2, 8, requires_grad=True)
    weight = torch.randn(9, 8, requires_grad=True)
    ids = torch.tensor([[3, 3, 1], [0, 3, 8]])
    weights = torch.randn(2, 3)
    want = ((weight[ids] * hidden[:, None]).sum(dim=-1) * weights).sum()
    got = (ops.vocab_reward(hidden, weight, ids, backend=backend) * weights).sum()
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_without_graph_breaks():
    arguments = (torch.randn(3, 17), torch.randn(20, 17), torch.randint(0, 20, (3, 4)))
    compiled = torch.compile(ops.vocab_reward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.vocab_reward(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4)}, r"hidden has shape \[4\]; pass \[B, H\]"),
        ({"weight": torch.zeros(10, 5)}, r"weight has shape \[10, 5\]; pass \[V, 4\]"),
        ({"ids": torch.zeros(3, 2).long()}, r"ids has shape \[3, 2\]; pass \[2, k\]"),
        ({"ids": torch.zeros(2, 2)}, r"ids has dtype torch.float32; pass int64"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(change, message):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(10, 4),
        "ids": torch.zeros(2, 2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        ops.vocab_reward(**{**arguments, **change})
