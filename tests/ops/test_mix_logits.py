import pytest
import torch
from cuda_emulated import emulator
from hypothesis import strategies as st
from marks import some_slow
from op_arguments import draw_logits, examples, generator
from op_support import FLOATS, SIMD_LEVELS, simd_level, threads
from parity import BACKENDS, INF, NAN, backends_of, check_mix_logits, crossed
from test_cuda_emulated import mutant

from rgtg_fast import ops
from rgtg_fast.ops import reference

over = pytest.mark.parametrize
CPP = next(b for b in BACKENDS if b.name == "cpp")
KINDS = ("normal", "ties", "equal", "masked", "far from zero", "ascending")


def randn(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=generator(seed, *shape)) * scale


def shares(rows, count):
    noise = generator(rows, count)
    weights = (torch.randn(rows, count, generator=noise) * 2).round() / 2
    return torch.where(torch.rand(rows, count, generator=noise) < 0.2, 0.0, weights)


def drawing(rows):
    noise = generator(rows)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=noise)
    steps = torch.randint(0, 2**40, (rows,), generator=noise)
    return torch.rand(rows, generator=noise) + 0.3, seeds, steps


def draw_arguments(data, kind, most=2600):
    rows, count = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    vocab = data.draw(st.integers(1, most))
    logits = []
    for i in range(count):
        width = max(1, vocab + data.draw(st.sampled_from([0, 0, 1, -1, 70])) * (i > 0))
        x = draw_logits(kind if i == 0 else "normal", rows, width).roll(i, dims=1)
        logits.append(x.to(data.draw(st.sampled_from(FLOATS))))
    k = data.draw(st.integers(1, min(64, vocab)))
    floor = None
    if data.draw(st.booleans()):
        floor = logits[0].float().amax(dim=1) - 2.0
    temperature, seed, position = drawing(rows)
    draw = data.draw(st.sampled_from([(), (temperature,), (temperature, seed, position)]))
    return logits, shares(rows, count), k, floor, *draw


@over(("backend", "kind"), crossed("mix_logits", KINDS, quick=[1]))
def test_drawn_mixtures(backend, kind):
    examples(backend, check_mix_logits, lambda data: draw_arguments(data, kind), 24)


@over("level", SIMD_LEVELS)
def test_every_instruction_set(level):
    with simd_level(level):
        examples(CPP, check_mix_logits, lambda data: draw_arguments(data, "ties"), 24)


EDGES = [(1, 1, 1), (2, 61, 61), (2, 1023, 64), (1, 1024, 5), (2, 1025, 64), (3, 4097, 10)]


@over(("backend", "rows", "vocab", "k"), crossed("mix_logits", EDGES, quick=[0, 2]))
def test_edges_of_blocks(backend, rows, vocab, k):
    logits = [randn(rows, vocab, seed=i) for i in range(3)]
    weights = torch.tensor([1.0, 0.5, -0.75]).repeat(rows, 1)
    check_mix_logits(backend, logits, weights, k)
    check_mix_logits(backend, logits, weights, k, None, *drawing(rows))


@over("dtype", FLOATS)
def test_a_large_odd_vocabulary_split_over_threads(dtype):
    logits = [(randn(2, 152_065, seed=i)).to(dtype) for i in range(2)]
    for count in (1, 2, 3):
        with threads(count):
            check_mix_logits(CPP, logits, torch.tensor([[1.0, 0.7], [0.3, -2.0]]), 64)
            check_mix_logits(CPP, logits, torch.ones(2, 2), 1, None, *drawing(2))


@over("backend", backends_of("mix_logits", slow=["triton-interpreted"]))
def test_views_of_mixed_types(backend):
    base = randn(12, 900)
    logits = [base[3:9:2, 5:850], base.t()[:3, :].half(), base[:1, ::2].expand(3, -1).bfloat16()]
    check_mix_logits(backend, logits, torch.tensor([1.0, 0.5, 0.0]).expand(3, 3), 10)
    check_mix_logits(backend, logits[:1], torch.ones(3, 1), 10)


@over("backend", backends_of("mix_logits", slow=["triton-interpreted"]))
def test_impossible_tokens(backend):
    """-inf in the first or in a tensor with weight; a weight of 0 takes no part."""
    first, second, third = (randn(5, 700, seed=i) for i in range(3))
    first[:, :300], second[:, 200:400], third[:, 500:] = -INF, -INF, -INF
    first[3], second[4] = -INF, -INF
    weights = torch.tensor(
        [[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.0, 0.0, 2.0], [1.0] * 3, [1.0] * 3]
    )
    for draw in ((), drawing(5)):
        arguments = [first, second, third], weights, 64, None, *draw
        check_mix_logits(backend, *arguments)
        scores, ids, *_ = backend("mix_logits", *arguments)
        assert ((ids[0] >= 400) & (ids[0] < 500)).all() and scores[0].isfinite().all()
        assert (ids[1] >= 400).all() and (ids[2] >= 300).all()
        assert (scores[3:] == -INF).all() and (ids[3:] == torch.arange(64)).all()


@over("backend", backends_of("mix_logits", slow=["triton-interpreted"]))
def test_nan_and_infinity_spoil_their_row_and_what_depends_on_them(backend):
    first, second = randn(6, 1300), randn(6, 1300, seed=1).bfloat16()
    first[0, 1290], second[1, 7], second[2, 9], first[3, 4], second[4, 0] = NAN, NAN, INF, INF, NAN
    weights = torch.tensor([[1.0, 1.0]] * 4 + [[1.0, 0.0]] + [[1.0, 1.0]])
    for draw in ((), drawing(6)):
        check_mix_logits(backend, [first, second], weights, 10, None, *draw)
        scores, _, logprobs, *rest = backend(
            "mix_logits", [first, second], weights, 10, None, *draw
        )
        assert scores[:4].isnan().all() and scores[4:].isfinite().all()
        assert logprobs[[1, 2, 4, 5]].isfinite().all()
        assert all(x[4:].isfinite().all() and x[:4].isnan().all() for x in rest if x.numel())


@over("backend", backends_of("mix_logits", slow=["triton-interpreted"]))
def test_masks_of_the_smallest_float_and_products_that_overflow(backend):
    first, second = randn(3, 600), randn(3, 600, seed=1)
    first[:, 50:], second[0, :20], second[1, 5] = -3.4e38, -3.4e38, 3.4e38
    weights = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, -4.0]])
    given = [first, second], weights, 10
    ids = backend("mix_logits", *given)[1]
    assert torch.equal(ids, reference.mix_logits(*given)[1])


@over("backend", backends_of("mix_logits", slow=["triton-interpreted"]))
def test_an_id_that_a_tensor_lacks_is_impossible_there(backend):
    first, shorter, longer = randn(2, 500), randn(2, 460, seed=1), randn(2, 900, seed=2)
    first[:, 470:] += 50
    longer[:, 500:] += 5
    for weights, most in (((1.0, 0.5, 0.5), 460), ((1.0, 0.0, 0.5), 500)):
        given = [first, shorter, longer], torch.tensor([weights]).repeat(2, 1), 30
        check_mix_logits(backend, *given)
        scores, ids, *_ = backend("mix_logits", *given)
        assert (ids < most).all() and scores.isfinite().all()
        own = torch.log_softmax(longer.double(), dim=1)  # over its own columns
        want = torch.log_softmax(first.double(), dim=1) + 0.5 * own[:, :500]
        if most == 500:
            assert torch.allclose(scores.double(), want.gather(1, ids), atol=1e-5)


@over("backend", backends_of("mix_logits", slow=["triton-interpreted"]))
def test_zeros_of_either_sign_tie(backend):
    first = torch.tensor([[-0.0, 0.0, -0.0, -1.0, 0.0]])
    weights = torch.tensor([[1.0, -1.0]])
    ids = backend("mix_logits", [first, torch.zeros(1, 5)], weights, 5)[1]
    assert ids.tolist() == [[0, 1, 2, 4, 3]]


def products_that_cancel():
    """Every sum is 0 where the product is rounded before it is added, and a residue where not."""
    second, weight = randn(2, 1100), torch.tensor([[1.0, 1 / 3], [1.0, 0.7]])
    return [-(weight[:, 1:] * second), second], weight, 64


@over("backend", backends_of("mix_logits"))
def test_products_are_rounded_before_they_are_added(backend):
    ids = backend("mix_logits", *products_that_cancel())[1]
    assert torch.equal(ids, torch.arange(64).expand(2, -1))


@over("backend", backends_of("mix_logits", slow=["triton-interpreted"]))
def test_the_draw_is_that_of_ratio_sample_over_all_tokens_as_candidates(backend):
    vocab, rows = 64, 40
    logits = [randn(rows, vocab, seed=i) for i in range(2)]
    weights = torch.tensor([[1.0, 0.8]]).repeat(rows, 1)
    draw = drawing(rows)
    scores, ids, logprobs, norm, _ = backend("mix_logits", logits, weights, vocab, None, draw[0])
    reward = scores - logprobs
    slot, logq = reference.ratio_sample(logprobs, reward, ids, torch.ones(rows), *draw, True)
    drawn = backend("mix_logits", logits, weights, 1, None, *draw)
    assert torch.equal(drawn[1], ids.gather(1, slot[:, None]))
    got = drawn[0][:, 0] / draw[0] - drawn[3]
    assert torch.allclose(got, logq.gather(1, slot[:, None])[:, 0], atol=2e-5)
    assert torch.allclose(norm, torch.logsumexp(scores / draw[0][:, None], dim=1), atol=2e-5)


@over("temperature", [1.0, 0.6])
def test_draws_have_the_frequencies_of_the_mixture(temperature):
    rows, vocab = 20_000, 12
    logits = [randn(1, vocab, seed=i, scale=1.0).expand(rows, -1) for i in range(2)]
    ids = ops.mix_logits(logits, (1.0, 0.7), 1, None, temperature, 11, 3)[1]
    scores = torch.log_softmax(logits[0][0], 0) + 0.7 * torch.log_softmax(logits[1][0], 0)
    want = torch.softmax(scores.double() / temperature, 0) * rows
    seen = torch.bincount(ids[:, 0], minlength=vocab)
    assert float(((seen - want) ** 2 / want).sum()) < 31.3  # chi-square, 11 degrees, p = 0.001


def test_draws_of_several_are_without_replacement_and_the_first_is_the_draw_of_one():
    logits = [randn(3, 200, seed=i) for i in range(2)]
    several, one = (ops.mix_logits(logits, (1.0, 1.0), k, None, 0.9, 5, 2)[1] for k in (20, 1))
    assert torch.equal(several[:, :1], one)
    assert all(row.unique().numel() == 20 for row in several)


def test_a_row_does_not_depend_on_its_batch_or_on_threads():
    logits = [randn(5, 40_001, seed=i) for i in range(2)]
    weights, draw = shares(5, 2), drawing(5)
    with threads(1):
        whole = ops.mix_logits(logits, weights, 8, 0.01, *draw)
    with threads(3):
        for i in range(5):
            row = slice(i, i + 1)
            one = ops.mix_logits(
                [x[row] for x in logits], weights[row], 8, 0.01, *(x[row] for x in draw)
            )
            assert torch.equal(one[1], whole[1][row])
            assert all(
                torch.allclose(a, b[row], atol=1e-5, equal_nan=True)
                for a, b in zip(one, whole, strict=True)
            )


def log_p(x):
    return torch.log_softmax(x.double(), dim=1)


PI, OTHER, THIRD = (randn(4, 333, seed=i) for i in range(3))
PUBLISHED = {
    "GenARM": ([PI, OTHER], (1.0, 1.5), None, log_p(PI) + 1.5 * log_p(OTHER)),
    "Nash-MD": (
        [PI, OTHER],
        (0.75, 0.25),
        None,
        log_p(PI).exp() ** 0.75 * log_p(OTHER).exp() ** 0.25,
    ),
    "DExperts": ([PI, OTHER, THIRD], (1.0, 2.0, -2.0), None, PI + 2.0 * (OTHER - THIRD)),
    "contrastive": ([PI, OTHER], (1.0, -1.0), 0.1, None),
}


@over("name", PUBLISHED)
@over("backend", ["cpp", "reference"])
def test_each_published_mixture_is_an_instance(name, backend):
    logits, weights, alpha, formula = PUBLISHED[name]
    if name == "Nash-MD":
        formula = formula.log()
    if name == "contrastive":
        plausible = log_p(PI).exp() >= 0.1 * log_p(PI).exp().amax(dim=1, keepdim=True)
        formula = torch.where(plausible, log_p(PI) - log_p(OTHER), -INF)
        assert plausible.sum(dim=1).min() > 1 and plausible.sum(dim=1).max() < 64
    scores, ids, _, norm, kl = ops.mix_logits(logits, weights, 10, alpha, 0.8, backend=backend)
    best = formula.double().topk(10)
    possible = best.values > -INF
    assert torch.equal(ids[possible], best.indices[possible])
    policy = torch.log_softmax(formula.double() / 0.8, dim=1)
    assert torch.allclose((scores / 0.8 - norm[:, None]).double(), policy.gather(1, ids), atol=1e-5)
    terms = torch.where(policy > -INF, policy.exp() * (policy - log_p(PI)), 0.0)
    assert torch.allclose(kl.double(), terms.sum(dim=1), atol=1e-5)


def test_weights_of_each_row_and_as_numbers():
    logits = [randn(3, 90, seed=i) for i in range(2)]
    alike = ops.mix_logits(logits, (1.0, 0.5), 5)
    for weights in (torch.tensor([1.0, 0.5]), torch.tensor([[1.0, 0.5]] * 3, dtype=torch.float64)):
        for a, b in zip(ops.mix_logits(logits, weights, 5), alike, strict=True):
            assert torch.equal(a, b)


def test_the_reference_takes_any_number_of_tensors_and_any_k():
    logits = [randn(2, 300, seed=i) for i in range(6)]
    scores, ids, *_ = ops.mix_logits(logits, [0.5] * 6, 300, backend="reference")
    want = sum(0.5 * log_p(x) for x in logits)
    assert torch.allclose(scores.double(), want.gather(1, ids), atol=1e-5)
    assert torch.equal(ids, want.sort(dim=1, descending=True, stable=True).indices)


@over(("backend", "compiler"), [("auto", "aot_eager"), ("reference", "eager")])
def test_compiles_without_graph_breaks(backend, compiler):
    logits, weights = [randn(3, 100, seed=i) for i in range(2)], torch.ones(3, 2)
    compiled = torch.compile(
        lambda x, y: ops.mix_logits([x, y], weights, 5, backend=backend),
        fullgraph=True,
        backend=compiler,
    )
    for got, want in zip(compiled(*logits), ops.mix_logits(logits, weights, 5), strict=True):
        assert torch.allclose(got, want)


TWO = [torch.zeros(2, 9), torch.zeros(2, 9)]


@over(
    ("arguments", "message"),
    [
        (([], [], 1), r"logits is empty; pass the language model's logits"),
        ((TWO, [1.0], 1), r"weights=\[1.0\] for 2 logits; pass a finite number for each"),
        ((TWO, [1.0, NAN], 1), r"weights=\[1.0, nan\] for 2 logits; pass a finite"),
        ((TWO, torch.tensor([1.0, INF]), 1), r"weights=\[1.0, inf\]; every element must be fini"),
        ((TWO, torch.ones(3, 2), 1), r"weights has shape \[3, 2\]; pass \[2, 2\]"),
        (([*TWO, torch.zeros(3, 9)], [1.0] * 3, 1), r"logits\[2\] has shape \[3, 9\]; pass \[2, V"),
        (([TWO[0], TWO[1].long()], [1.0] * 2, 1), r"logits\[1\] has dtype torch.int64; pass"),
        ((TWO, [1.0] * 2, 10), r"k=10 candidates asked for but the vocabulary has 9 tokens"),
        ((TWO * 3, [1.0] * 6, 1), r"logits has 6 tensors but .* at most 4; pass n<=4 or backend="),
        ((TWO, [1.0] * 2, 1, 0.0), r"alpha=0.0; pass a share in \(0, 1\], or None for no bound"),
        ((TWO, [1.0] * 2, 1, 1.5), r"alpha=1.5; pass a share"),
        ((TWO, [1.0] * 2, 1, None, 0.0), r"temperature=0.0; pass a positive and finite number"),
        ((TWO, [1.0] * 2, 1, None, None, 1, 0), r"seed came without temperature; pass temperature"),
        ((TWO, [1.0] * 2, 1, None, 1.0, 1), r"position is missing; a draw takes both"),
        ((TWO, [1.0] * 2, 1, None, 1.0, torch.zeros(3).long(), 0), r"seed has shape \[3\]; pass"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.mix_logits(*arguments)


@over("slicing", [(1, 40), (2, 20), (4, 10), (40, 1)])
@over("kind", ["ascending", "equal", "normal"])
def test_the_cuda_kernel_gives_the_same_ids_however_a_row_is_cut(slicing, kind):
    logits = [draw_logits(kind, 1, 40_001).half(), torch.zeros(1, 40_900)]
    given = logits, torch.ones(1, 2), 64
    for draw in ((), drawing(1)):
        got = emulator().mix_logits(*given, None, *draw, slicing=slicing)
        want = reference.mix_logits(*given, None, *draw)
        assert torch.equal(got[1], want[1])
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, want, strict=True))


MUTATIONS = [
    ("at < vocab ? widen(row[at])", "at <= vocab ? widen(row[at])"),  # reads outside
    ("add_rn(mixed, mul_rn(weight[i], logit))", "fmaf(weight[i], logit, mixed)"),
    ("count > kMixKept", "false"),
    ("rounds).value - 1", "rounds).value"),
    ("sums = {};", ""),
    ("part.rebase(largest);", ";"),
]


@over(("old", "new"), some_slow(MUTATIONS))
def test_a_fault_in_the_cuda_kernel_is_found(tmp_path, old, new):
    broken = mutant(tmp_path, "mix_logits.cuh", old, new)
    with pytest.raises(AssertionError):
        ids = broken.mix_logits(*products_that_cancel())[1]
        assert torch.equal(ids, torch.arange(64).expand(2, -1))
        for kind in ("ascending", "equal", "normal"):
            logits = [draw_logits(kind, 1, 20_001).float(), torch.zeros(1, 20_001)]
            given = logits, torch.tensor([[1.0, 0.3]]), 64
            for slicing in ((2, 10), None):
                got = broken.mix_logits(*given, slicing=slicing)
                want = reference.mix_logits(*given)
                assert torch.equal(got[1], want[1])
                assert torch.allclose(got[0], want[0], atol=1e-4)
