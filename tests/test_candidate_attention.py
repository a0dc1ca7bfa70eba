import pytest
import torch

from rgtg_fast import ops


def attention_inputs(rows=2, k=3, heads=4, key_heads=2, width=64, prefix=20):
    generator = torch.Generator().manual_seed(rows + k)

    def tensor(*shape):
        return torch.randn(shape, generator=generator)

    past, own = (rows, key_heads, prefix, width), (rows, k, key_heads, width)
    tensors = (tensor(rows, k, heads, width), tensor(*past), tensor(*past), tensor(*own))
    bounds = torch.tensor([0, 4][:rows]), torch.tensor([20, 15][:rows])
    return (*tensors, tensor(*own), *bounds, width**-0.5)


def test_is_torch_attention_of_each_sibling_alone():
    query, keys, values, own_key, own_value, start, length, scale = attention_inputs()
    out = ops.candidate_attention(
        query, keys, values, own_key, own_value, start, length, scale, backend="reference"
    )
    for row in range(2):
        live = slice(int(start[row]), int(length[row]))
        for slot in range(3):
            want = torch.nn.functional.scaled_dot_product_attention(
                query[row, slot][:, None],
                torch.cat([keys[row, :, live], own_key[row, slot][:, None]], dim=1),
                torch.cat([values[row, :, live], own_value[row, slot][:, None]], dim=1),
                scale=scale,
                enable_gqa=True,
            )
            assert torch.allclose(out[row, slot], want[:, 0], atol=1e-5)


def test_window_counts_the_query_itself():
    query, keys, values, own_key, own_value, start, length, scale = attention_inputs()
    rest = (own_key, own_value, start, length, scale)
    alone = ops.candidate_attention(query, keys, values, *rest, window=1)
    assert torch.allclose(alone, own_value.repeat_interleave(2, dim=2), atol=1e-6)
    keys[:, :, :12], values[:, :, :12] = float("nan"), float("nan")
    start[1] = 12
    assert ops.candidate_attention(query, keys, values, *rest, window=4).isfinite().all()
    seen = ops.candidate_attention(query, keys, values, *rest, window=9)
    assert torch.equal(
        seen,
        ops.candidate_attention(
            query, keys, values, *rest[:2], torch.tensor([12, 12]), length, scale
        ),
    )


def test_auto_on_cpu_is_the_reference():
    inputs = attention_inputs()
    want = ops.candidate_attention(*inputs, backend="reference")
    assert torch.equal(ops.candidate_attention(*inputs), want)
    with pytest.raises(ops.BackendUnavailable, match=r"no C\+\+ kernel of candidate_attention"):
        ops.candidate_attention(*inputs, backend="cpp")


def test_triton_takes_no_float64():
    pytest.importorskip("triton")
    inputs = [x.double() if i < 5 else x for i, x in enumerate(attention_inputs())]
    assert ops.candidate_attention(*inputs).dtype == torch.float64
    with pytest.raises(ValueError, match=r"q has dtype torch.float64 .*; pass those or backend="):
        ops.candidate_attention(*inputs, backend="triton")


def test_opcheck():
    pytest.importorskip("triton")
    assert ops.unavailable_reason("candidate_attention", "triton") is None
    op = torch.ops.rgtg_fast_triton.candidate_attention.default
    for window, softcap in ((None, None), (5, 2.0)):
        torch.library.opcheck(op, (*attention_inputs(), window, softcap))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_without_graph_breaks(backend):
    pytest.importorskip("triton")

    def attend(*inputs):
        return ops.candidate_attention(*inputs, 0.125, 9, 2.0, backend=backend)

    compiler = "eager" if backend == "reference" else "aot_eager"
    compiled = torch.compile(attend, fullgraph=True, backend=compiler)
    inputs = attention_inputs()[:-1]
    assert torch.allclose(compiled(*inputs), attend(*inputs))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 3, 64), r"q has shape \[2, 3, 64\]; pass \[B, k, Hq, D\]"),
        (0, torch.zeros(2, 3, 3, 64), r"q has 3 heads and k_prefix 2; pass a multiple"),
        (1, torch.zeros(2, 2, 20, 32), r"k_prefix has shape .*; pass \[2, Hkv, T, 64\]"),
        (2, torch.zeros(2, 2, 21, 64), r"v_prefix has shape .*; pass \[2, 2, 20, 64\]"),
        (3, torch.zeros(2, 3, 2, 64).half(), r"k_self has dtype torch.float16 and q torch.float32"),
        (5, torch.zeros(2), r"start has dtype torch.float32; pass int64"),
        (6, torch.zeros(3).long(), r"length has shape \[3\]; pass \[2\]"),
        (8, 0, r"window=0; pass at least 1"),
        (9, 0.0, r"softcap=0.0; pass a positive number"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(place, value, message):
    arguments = [*attention_inputs(), None, None]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        ops.candidate_attention(*arguments)
