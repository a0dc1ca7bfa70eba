import pytest
import torch
from op_arguments import attention
from op_support import SIMD_LEVELS, simd_level, threads
from parity import BACKENDS, backends_of, check_candidate_attention

from rgtg_fast import ops

CPP = next(backend for backend in BACKENDS if backend.name == "cpp")
OP = "candidate_attention"
HALVES = (torch.bfloat16, torch.float16)


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


def test_auto_on_cpu_is_cpp():
    inputs = attention_inputs()
    want = ops.candidate_attention(*inputs, backend="cpp")
    assert torch.equal(ops.candidate_attention(*inputs), want)


def test_only_the_reference_takes_float64():
    inputs = [x.double() if i < 5 else x for i, x in enumerate(attention_inputs())]
    assert ops.candidate_attention(*inputs, backend="reference").dtype == torch.float64
    with pytest.raises(ValueError, match=r"q has dtype torch.float64 .*; pass those or backend="):
        ops.candidate_attention(*inputs)
    with pytest.raises(RuntimeError, match="q must be float32, bfloat16 or float16"):
        torch.ops.rgtg_fast.candidate_attention(*inputs)


LEAST, MOST = -(2**63), 2**63 - 1


@pytest.mark.parametrize("backend", backends_of("candidate_attention"))
@pytest.mark.parametrize("window", [None, 1, 3, MOST])
@pytest.mark.parametrize(
    ("start", "length"),
    [(5, LEAST), (LEAST, LEAST), (LEAST, MOST), (MOST, MOST), (MOST, LEAST), (0, 2**40), (7, 3)],
)
def test_bounds_far_outside_the_prefix_read_nothing_there(backend, window, start, length):
    inputs = attention(torch.float32, 1, 3, 4, 2, 16, 20, [start], [length], window, None)
    check_candidate_attention(backend, *inputs)


@pytest.mark.parametrize("rows", [[2, 0], [0, -1], [LEAST, MOST]])
def test_a_row_that_reads_no_prefix_is_an_error_of_the_raw_operator_or_nan(rows):
    """A GPU kernel cannot raise."""
    inputs = (*attention_inputs(), None, None, torch.tensor(rows))
    with pytest.raises(RuntimeError, match=r"rows\[\d\] is .*; pass 0 .. 1"):
        torch.ops.rgtg_fast.candidate_attention(*inputs)
    for backend in BACKENDS:
        if backend.name in ("triton-interpreted", "cuda-emulated") and OP in backend.ops:
            (got,) = backend(OP, *inputs)
            for row in range(2):
                assert got[row].isnan().all() != (0 <= rows[row] < 2)
            (want,) = backend(OP, *inputs[:10], torch.tensor(rows).clamp(0, 1))
            assert torch.equal(got[got.isfinite()], want[got.isfinite()])


def test_gradients_of_rows_that_share_a_prefix_are_summed():
    *tensors, start, length, scale = attention_inputs()
    tensors = [t.requires_grad_() for t in tensors]
    rows = torch.tensor([1, 1])
    bounds = (start, length, scale, None, None)
    out = ops.candidate_attention(*tensors, *bounds, rows)
    copies = (tensors[0], tensors[1][rows], tensors[2][rows], *tensors[3:])
    want = ops.candidate_attention(*copies, *bounds)
    shared, copied = (torch.autograd.grad(x.square().sum(), tensors) for x in (out, want))
    for a, b in zip(shared, copied, strict=True):
        torch.testing.assert_close(a, b)
    assert not shared[1][0].any() and shared[1][1].any()


def test_a_key_that_is_not_live_has_no_part_in_the_gradients():
    *tensors, start, length, scale = attention_inputs()
    tensors = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        tensors[1][1, :, :4] = tensors[2][1, :, 15:] = float("nan")
    out = ops.candidate_attention(*tensors, start, length, scale)
    gradients = torch.autograd.grad(out.square().sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][1, :, :4].any() and gradients[1][1, :, 4:15].any()


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 10, 17, 40, 64])
@pytest.mark.parametrize(("width", "softcap"), [(64, None), (80, 3.0), (100, None)])
def test_numbers_of_queries_around_the_vector_and_block_width(level, k, width, softcap):
    shape = (1, k, 2, 2, width, 150, [3], [150], None, softcap)
    with simd_level(level):
        check_candidate_attention(CPP, *attention(torch.float32, *shape))


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("prefix", [1, 3, 8, 31, 32, 33, 64, 255, 256, 257, 700])
def test_prefixes_around_the_tile_and_the_chunk(level, k, prefix):
    shape = (1, k, 2, 1, 64, prefix, [0], [prefix], None, None)
    with simd_level(level):
        check_candidate_attention(CPP, *attention(torch.float32, *shape))


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("width", [64, 100])
def test_half_precision(level, dtype, k, width):
    shape = (2, k, 4, 2, width, 300, [0, 250], [300, 260], None, 2.0)
    with simd_level(level):
        check_candidate_attention(CPP, *attention(dtype, *shape))


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("k", [1, 10])
def test_more_positions_than_chunks_of_the_least_length(level, k):
    with simd_level(level):
        shape = (1, k, 1, 1, 64, 4500, [10], [4500], None, None)
        check_candidate_attention(CPP, *attention(torch.float32, *shape))


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_cache_with_nan_around_what_is_live(level, k, dtype):
    """Slots laid out as the cache of siblings has them, with heads inside positions."""
    inputs = attention(dtype, 2, k, 4, 2, 64, 320, [0, 40], [300, 40], None, None)
    query, keys, values, own_key, own_value, *rest = inputs
    stores = []
    for prefix in (keys, values):
        store = torch.full((2, 500, 2, 64), float("nan"), dtype=dtype)
        store[0, 100:400] = prefix[0].transpose(0, 1)[:300]
        stores.append(store[:, 100:420].transpose(1, 2))
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    with simd_level(level):
        (got,) = CPP("candidate_attention", query, *stores, own_key, own_value, *rest)
        (want,) = CPP("candidate_attention", *inputs)
    assert torch.equal(got, want)
    assert torch.allclose(got[1], own_value[1].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("k", [1, 10])
def test_nan_in_a_live_value_or_query_stays_in_its_row_and_slot(level, k):
    query, keys, values, *rest = attention(
        torch.float32, 2, k, 2, 2, 64, 90, [0, 0], [90, 90], None, None
    )
    query[1, k - 1, 0, 5], keys[0, 1, 70, 3] = float("nan"), float("nan")
    with simd_level(level):
        (got,) = CPP("candidate_attention", query, keys, values, *rest)
    want = torch.zeros(2, k, 2, 64, dtype=torch.bool)
    want[1, k - 1, 0], want[0, :, 1] = True, True
    assert torch.equal(got.isnan(), want)


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("size", [1e3, 1e38])
def test_scores_of_any_size(k, size):
    query, keys, *rest = attention(torch.float32, 1, k, 1, 1, 64, 100, [0], [100], None, None)
    keys[0, 0, :, :] = 0.0
    keys[0, 0, 70, 0], query[..., 0] = size, 1.0
    (got,) = CPP("candidate_attention", query, keys, *rest)
    assert torch.allclose(got, rest[0][0, 0, 70].expand(1, k, 1, 64))


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize(("rows", "key_heads"), [(1, 1), (1, 2), (3, 2)])
def test_result_does_not_depend_on_threads_or_other_rows(k, rows, key_heads):
    ends = [1000, 700, 1024][:rows]
    inputs = attention(
        torch.float32,
        rows,
        k,
        2 * key_heads,
        key_heads,
        64,
        1024,
        [9, 0, 0][:rows],
        ends,
        None,
        None,
    )
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results += CPP("candidate_attention", *inputs)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    (alone,) = CPP("candidate_attention", *(x[-1:] for x in inputs[:7]), *inputs[7:])
    assert torch.equal(alone, results[0][-1:])


def test_instruction_sets_agree():
    inputs = attention(torch.float32, 1, 10, 4, 2, 64, 600, [0], [600], None, 2.0)
    found = []
    for level in SIMD_LEVELS:
        with simd_level(level):
            found += CPP("candidate_attention", *inputs)
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_compiles_without_graph_breaks(backend):
    if backend == "triton":
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
        (8, 2**63, r"window=9223372036854775808; pass at least 1 .* and less than 2\*\*63"),
        (9, 0.0, r"softcap=0.0; pass a positive number"),
        (10, torch.zeros(3).long(), r"rows has shape \[3\]; pass \[2\]"),
        (10, torch.zeros(2), r"rows has dtype torch.float32; pass int64"),
        (10, torch.tensor([0, 2]), r"rows=\[0, 2\] reach outside the 2 prefixes .*; pass 0 \.\. 1"),
        (10, torch.tensor([-1, 0]), r"rows=\[-1, 0\] reach outside"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(place, value, message):
    arguments = [*attention_inputs(), None, None, None]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        ops.candidate_attention(*arguments)
