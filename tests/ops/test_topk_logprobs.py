import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_support import FLOATS, SIMD_LEVELS, assert_no_worse, simd_level, threads

from rgtg_fast import ops

INF = float("inf")


def oracle(logits, k):
    """Ids by a stable sort, log-probabilities by torch in float64 and in fp32 (fp64)."""
    order = torch.sort(logits.to(torch.float32), dim=1, descending=True, stable=True)
    ids = order.indices[:, :k]
    exact = torch.log_softmax(logits.double(), dim=1).gather(1, ids)
    own = logits if logits.dtype == torch.float64 else logits.float()
    return ids, exact, torch.log_softmax(own, dim=1).gather(1, ids).float()


def check(logits, k, backend="cpp"):
    logprobs, ids = ops.topk_logprobs(logits, k, backend=backend)
    want_ids, exact, torch_logprobs = oracle(logits, k)
    assert logprobs.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(ids, want_ids)
    assert_no_worse(logprobs, torch_logprobs, exact)


def draw_logits(kind, rows, vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    if kind == "ties":
        return (x * 2).round()
    if kind == "equal":
        return torch.full_like(x, 3.0)
    if kind == "masked":
        return torch.where(x > 1.0, -INF, x).index_fill(1, torch.tensor([vocab // 2]), 0.5)
    if kind == "peaked":
        return x * 30
    if kind == "far from zero":
        return x + 1000.0
    if kind == "ascending":
        return x.sort(dim=1).values
    return x


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_ids_exact_and_error_no_worse_than_torch(level, dtype, data):
    kinds = ["normal", "ties", "equal", "masked", "peaked", "far from zero", "ascending"]
    rows, vocab = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 3000))
    k = data.draw(st.integers(1, min(64, vocab)))
    logits = draw_logits(data.draw(st.sampled_from(kinds)), rows, vocab, seed=rows + vocab)
    with simd_level(level):
        check(logits.to(dtype), k)


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 1031, 32003])
def test_vocabulary_sizes_around_the_vector_and_block_width(level, vocab):
    with simd_level(level):
        check(torch.randn(3, vocab), min(10, vocab))
        check(torch.randn(2, vocab).bfloat16(), min(64, vocab))


@pytest.mark.parametrize("dtype", FLOATS)
def test_vocabulary_of_300k(dtype):
    check((torch.randn(2, 300_000) * 3).to(dtype), 64)


@pytest.mark.parametrize("rows", [0, 1, 2, 31, 257])
def test_batch_sizes(rows):
    check(torch.randn(rows, 1300), 10)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_k_equal_to_vocabulary(backend):
    check(torch.randn(3, 61), 61, backend)


def test_reference_takes_any_k():
    check(torch.randn(2, 500), 500, "reference")


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_rows_split_over_threads(count, rows):
    logits = (torch.randn(rows, 65_537) * 2).round()
    logits[0, 5] = -INF
    with threads(count):
        check(logits, 64)


def test_row_strided_and_transposed_views():
    base = torch.randn(40, 2100)
    check(base[3:20:2, 5:2050], 10)
    check(base.t(), 10)
    check(base[:, ::3], 10)
    check(base[:1].expand(4, -1), 10)


def test_zeros_of_either_sign_tie():
    logits = torch.tensor([[-0.0, 0.0, -0.0, -1.0, 0.0]])
    for backend in ("cpp", "reference"):
        assert ops.topk_logprobs(logits, 4, backend=backend)[1].tolist() == [[0, 1, 2, 4]]


def test_float64_is_ordered_by_its_float32_rounding():
    logits = torch.tensor([[1.0, 1.0 + 1e-12, 0.5]], dtype=torch.float64)
    for backend in ("cpp", "reference"):
        assert ops.topk_logprobs(logits, 2, backend=backend)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("vocab", [5, 2500])
def test_nan_sorts_first_and_spoils_only_its_row(level, vocab):
    logits = torch.randn(3, vocab)
    clean = ops.topk_logprobs(logits, 3)
    logits[1, vocab - 2] = float("nan")
    with simd_level(level):
        for backend in ("cpp", "reference"):
            logprobs, ids = ops.topk_logprobs(logits, 3, backend=backend)
            assert ids[1, 0] == vocab - 2 and logprobs[1].isnan().all()
            assert torch.equal(ids[[0, 2]], clean[1][[0, 2]])
            assert torch.allclose(logprobs[[0, 2]], clean[0][[0, 2]], atol=1e-6)


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("vocab", [5, 2500])
def test_plus_infinity_spoils_the_row_as_in_torch(level, vocab):
    logits = torch.randn(2, vocab)
    logits[0, 4] = INF
    with simd_level(level):
        for backend in ("cpp", "reference"):
            logprobs, ids = ops.topk_logprobs(logits, 3, backend=backend)
            assert ids[0, 0] == 4 and logprobs[0].isnan().all() and logprobs[1].isfinite().all()


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_infinity_has_logprob_minus_infinity(level, dtype):
    logits = torch.full((2, 1500), -INF, dtype=dtype)
    logits[0, 1400] = 2.0
    with simd_level(level):
        for backend in ("cpp", "reference"):
            logprobs, ids = ops.topk_logprobs(logits, 3, backend=backend)
            assert ids.tolist() == [[1400, 0, 1], [0, 1, 2]]
            assert logprobs.tolist() == [[0.0, -INF, -INF], [-INF] * 3]


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("value", [-3.4e38, -3.0e38, -1e30, 1e30, 3e38, 3.4e38])
def test_masks_of_the_smallest_float_and_other_huge_logits(level, value):
    with simd_level(level):
        logits = torch.randn(2, 3000)
        logits[0, :2000] = value
        logits[1, 1000:] = value
        check(logits, 5)
        check(torch.full((1, 3000), value), 5)


@pytest.mark.parametrize(("backend", "compiler"), [("auto", "aot_eager"), ("reference", "eager")])
def test_compiles_without_graph_breaks(backend, compiler):
    logits = torch.randn(3, 100)
    compiled = torch.compile(
        lambda x: ops.topk_logprobs(x, 5, backend=backend), fullgraph=True, backend=compiler
    )
    for got, want in zip(compiled(logits), ops.topk_logprobs(logits, 5), strict=True):
        assert torch.allclose(got, want)


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        (torch.randn(2, 32), 64, r"k=64 candidates asked for but the vocabulary has 32 tokens; pa"),
        (torch.randn(2, 32), 0, r"k=0 candidates asked for; pass k>=1"),
        (torch.randn(2, 99), 65, r"k=65 .* at most 64; pass k<=64 or backend='reference'"),
        (torch.randn(32), 1, r"logits has shape \[32\]; pass \[B, V\]"),
        (torch.ones(2, 32, dtype=torch.int64), 1, r"logits has dtype torch.int64; pass float64"),
        ([[1.0, 2.0]], 1, r"logits is a list; pass a floating-point tensor"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(logits, k, message):
    with pytest.raises(ValueError, match=message):
        ops.topk_logprobs(logits, k)
