"""prefix_bt_loss against one row per prefix, its gradients, its options and its errors."""

import math

import pytest
import torch
from op_arguments import batch
from op_support import FLOATS, SIMD_LEVELS, simd_level, threads
from parity import BACKENDS, check_prefix_bt_loss

from rgtg_fast import ops

NAN, INF = float("nan"), float("inf")
over = pytest.mark.parametrize
HERE = ("reference", "cpp")
LENGTHS = ([5, 1, 8, 3, 8, 2], [2, 4, 8, 3, 1, 8])
OPTIONS = [
    {},
    {"first": 2},
    {"first": 3},
    {"weights": "linear", "first": 3},
    {"weights": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 3.0, 0.0, 1.0], dtype=torch.float64)},
    {"margin": 0.7},
    {"margin": torch.tensor([0.0, -1.0, 0.5, 2.0, 0.1, 0.3], dtype=torch.float64)},
    {"label_smoothing": 0.2},
    {"centering": 0.3},
    {"weights": "linear", "margin": -0.4, "label_smoothing": 0.1, "centering": 0.05, "first": 2},
]


def names(options):
    return ", ".join(options) or "plain"


def pairs(lengths=LENGTHS, width=8, dtype=torch.float64, seed=0):
    noise = torch.Generator().manual_seed(seed)
    shape = (len(lengths[0]), width)
    rewards = [torch.randn(shape, generator=noise, dtype=torch.float64) * 2 for _ in range(2)]
    masks = [torch.arange(width) < torch.tensor(n)[:, None] for n in lengths]
    return *(r.to(dtype).requires_grad_() for r in rewards), *masks


def exploded(
    r_chosen, r_rejected, mask_chosen, mask_rejected, first=1, weights="uniform", margin=0.0,
    label_smoothing=0.0, centering=0.0, extension="hold",
):  # fmt: skip
    """The loss of each pair from one pair of rows per prefix length, one reward a row."""
    losses = []
    for n in range(r_chosen.shape[0]):
        own = [int(mask[n].sum()) for mask in (mask_chosen, mask_rejected)]
        shift = float(margin[n]) if isinstance(margin, torch.Tensor) else margin
        rows, shares = [], []
        for length in range(first, max(own) + 1):
            cut = [min(length, o) if extension == "hold" else length for o in own]
            winner, loser = r_chosen[n, cut[0] - 1], r_rejected[n, cut[1] - 1]
            gap = winner - loser - shift
            right, wrong = (-torch.nn.functional.logsigmoid(sign * gap) for sign in (1, -1))
            row = (1 - label_smoothing) * right + label_smoothing * wrong
            rows.append(row + centering * (winner + loser) ** 2)
            shares.append(
                {"uniform": 1, "linear": length}[weights]
                if isinstance(weights, str)
                else float(weights[length - 1])
            )
        shares = torch.tensor(shares, dtype=torch.float64)
        losses.append((torch.stack(rows).double() * shares).sum() / shares.sum())
    return torch.stack(losses)


@over("backend", HERE)
@over("extension", ["hold", "eos"])
@over("options", OPTIONS, ids=names)
def test_loss_and_gradient_are_those_of_one_row_per_prefix(backend, extension, options):
    arguments, options = pairs(), {**options, "extension": extension}
    got = ops.prefix_bt_loss(*arguments, backend=backend, **options)
    want = exploded(*arguments, **options).mean()
    assert got.dtype == torch.float64 and got.shape == ()
    assert abs(got - want) < 1e-10
    for mine, theirs in zip(
        torch.autograd.grad(got, arguments[:2]), torch.autograd.grad(want, arguments[:2]),
        strict=True,
    ):  # fmt: skip
        assert (mine - theirs).abs().max() < 1e-10


@over("backend", HERE)
@over("extension", ["hold", "eos"])
@over("options", OPTIONS, ids=names)
def test_gradcheck(backend, extension, options):
    *rewards, chosen, rejected = pairs()

    def loss(a, b):
        return ops.prefix_bt_loss(
            a, b, chosen, rejected, extension=extension, reduction="none", backend=backend,
            **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, rewards)


@over("backend", HERE)
def test_the_mean_is_over_pairs(backend):
    arguments = pairs()
    each = ops.prefix_bt_loss(*arguments, reduction="none", backend=backend)
    assert each.shape == (6,)
    assert torch.equal(ops.prefix_bt_loss(*arguments, backend=backend), each.mean())


@over("backend", HERE)
def test_one_reward_per_answer_is_the_full_sequence_loss(backend):
    chosen, rejected = torch.randn(2, 7, 1, dtype=torch.float64)
    ones = torch.ones(7, 1, dtype=torch.int64)
    got = ops.prefix_bt_loss(chosen, rejected, ones, ones, backend=backend)
    assert torch.allclose(got, -torch.nn.functional.logsigmoid(chosen - rejected).mean())


@over("backend", HERE)
def test_padding_is_not_used_and_gets_no_gradient(backend):
    chosen, rejected, *masks = pairs()
    poisoned = [
        r.detach().masked_fill(~mask, NAN).requires_grad_()
        for r, mask in zip((chosen, rejected), masks, strict=True)
    ]
    loss = ops.prefix_bt_loss(*poisoned, *masks, backend=backend)
    assert torch.equal(loss, ops.prefix_bt_loss(chosen, rejected, *masks, backend=backend))
    loss.backward()
    for r, mask in zip(poisoned, masks, strict=True):
        assert (r.grad[~mask] == 0).all() and (r.grad[mask] != 0).all()


@over("backend", HERE)
def test_what_is_held_gathers_its_gradient_at_the_last_token(backend):
    chosen, rejected, *masks = pairs(([2], [6]))
    ops.prefix_bt_loss(chosen, rejected, *masks, backend=backend).backward()
    assert torch.allclose(chosen.grad[0, 1], -rejected.grad[0, 1:6].sum())
    assert (chosen.grad[0, 2:] == 0).all()


@over("backend", HERE)
@over("extension", ["hold", "eos"])
def test_a_first_length_beyond_the_shorter_answer(backend, extension):
    arguments = pairs(([2, 7], [6, 1]))
    got = ops.prefix_bt_loss(*arguments, first=5, extension=extension, backend=backend)
    assert abs(got - exploded(*arguments, first=5, extension=extension).mean()) < 1e-10
    got.backward()
    assert (arguments[1].grad[0, :4] == 0).all()


@over("backend", HERE)
@over("value", [NAN, INF, -INF])
def test_a_non_finite_reward_stays_in_its_pair(backend, value):
    chosen, rejected, *masks = pairs()
    want = ops.prefix_bt_loss(chosen, rejected, *masks, reduction="none", backend=backend)
    bad = chosen.detach().clone()
    bad[2, 3] = value
    bad.requires_grad_()
    options = {"reduction": "none", "centering": 0.0, "backend": backend}
    got = ops.prefix_bt_loss(bad, rejected, *masks, **options)
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(got[rest], want[rest])
    assert got[2].isnan() if math.isnan(value) else (got[2].isfinite() == (value > 0))
    grads = [torch.autograd.grad(x.sum(), r)[0] for x, r in ((got, bad), (want, chosen))]
    assert torch.equal(grads[0][rest], grads[1][rest])


@over("backend", HERE)
def test_far_apart_rewards_neither_overflow_nor_lose_their_gradient(backend):
    mask = torch.ones(3, 1, dtype=torch.bool)
    chosen = torch.tensor([[-1e4], [1e4], [40.0]], requires_grad=True)
    rejected = torch.zeros(3, 1)
    options = {"reduction": "none", "backend": backend}
    loss = ops.prefix_bt_loss(chosen, rejected, mask, mask, **options)
    loss.sum().backward()
    assert torch.allclose(loss, torch.tensor([1e4, 0.0, math.exp(-40)]), rtol=1e-6, atol=0)
    want = torch.tensor([[-1.0], [0.0], [-math.exp(-40)]])
    assert torch.allclose(chosen.grad, want, rtol=1e-6, atol=0)


@over("backend", HERE)
@over("dtype", FLOATS)
def test_types_of_the_loss_and_of_the_gradients(backend, dtype):
    arguments = pairs(dtype=dtype)
    loss = ops.prefix_bt_loss(*arguments, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert arguments[0].grad.dtype == arguments[1].grad.dtype == dtype
    exact = pairs(dtype=dtype)
    exact = *(r.detach().double().requires_grad_() for r in exact[:2]), *exact[2:]
    want = ops.prefix_bt_loss(*exact, backend="reference")
    want.backward()
    assert abs(loss - want) < 1e-6
    room = torch.finfo(dtype).eps * exact[0].grad.abs().max() + 1e-7
    assert (arguments[0].grad.double() - exact[0].grad).abs().max() <= room


@over("backend", HERE)
def test_views(backend):
    chosen, rejected, *masks = pairs()
    wide = torch.full((12, 30), NAN, dtype=torch.float64)
    views = (wide[::2, 3:11], wide[1::2, 11:27:2])
    for view, rewards in zip(views, (chosen, rejected), strict=True):
        view.copy_(rewards.detach())
    flipped = [mask.t().contiguous().t() for mask in masks]
    got = ops.prefix_bt_loss(*views, *flipped, backend=backend)
    assert torch.equal(got, ops.prefix_bt_loss(chosen, rejected, *masks, backend=backend))


@over("backend", HERE)
def test_no_pairs(backend):
    none = torch.zeros(0, 4, requires_grad=True)
    mask = torch.zeros(0, 4, dtype=torch.int64)
    loss = ops.prefix_bt_loss(none, none, mask, mask, reduction="none", backend=backend)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert none.grad.shape == (0, 4)


@over("backend", HERE)
def test_a_second_derivative_is_refused(backend):
    chosen, rejected, *masks = pairs()
    loss = ops.prefix_bt_loss(chosen, rejected, *masks, backend=backend)
    with pytest.raises(RuntimeError, match="prefix_bt_loss has no second derivative; call"):
        torch.autograd.grad(loss, chosen, create_graph=True)


@over("backend", HERE)
@over("extension", ["hold", "eos"])
def test_compiles_without_graph_breaks(backend, extension):
    def step(chosen, rejected, *masks):
        options = {"extension": extension, "weights": "linear", "margin": 0.1}
        loss = ops.prefix_bt_loss(chosen, rejected, *masks, backend=backend, **options)
        return 2 * loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments, again = pairs(), pairs()
    got, want = compiled(*arguments), step(*again)
    assert torch.allclose(got, want)
    got.backward()
    want.backward()
    assert torch.allclose(arguments[0].grad, again[0].grad)
    assert torch.allclose(arguments[1].grad, again[1].grad)


@over("backend", HERE)
@over("extension", ["hold", "eos"])
def test_what_cannot_be_refused_on_a_gpu_is_nan(backend, extension):
    """Compiled graphs do not look at values either."""
    chosen, rejected, first, second = pairs()
    first, second = first.clone(), second.clone()
    first[1] = False  # empty

    def each(*arguments):
        options = {"first": 3, "extension": extension, "backend": backend}
        return ops.prefix_bt_loss(*arguments, reduction="none", **options)

    lengths = torch.tensor([5, 0, 8, 3, 8, 2]), torch.tensor([2, 4, 8, 1, 1, 1])
    masks = [torch.arange(8) < n[:, None] for n in lengths]
    loss = torch.compile(each, fullgraph=True, backend="aot_eager")(chosen, rejected, *masks)
    assert loss.isnan().tolist() == [False, True, False, False, False, True]
    loss[:5].nansum().backward()
    assert chosen.grad[1].isnan().all() and chosen.grad[[0, 2, 3, 4]].isfinite().all()


@over("level", SIMD_LEVELS)
@over("dtype", FLOATS)
def test_every_instruction_set_is_no_worse_than_torch(level, dtype):
    cpp = next(b for b in BACKENDS if b.name == "cpp")
    with simd_level(level):
        for width in (1, 5, 16, 47, 700):
            check_prefix_bt_loss(cpp, *batch(dtype, 9, width, (width + 4) // 5, 0.1, 0.2))


def test_threads_do_not_change_the_result():
    arguments = batch(torch.float32, 200, 300)
    with threads(3):
        got = torch.ops.rgtg_fast.prefix_bt_loss(*arguments)
    want = torch.ops.rgtg_fast.prefix_bt_loss(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_wrong_arguments_of_the_operator_are_errors():
    chosen, rejected, *rest = batch(torch.float32, 3, 9)
    for change in (
        (chosen, rejected[:2], *rest),
        (chosen, rejected.double(), *rest),
        (chosen, rejected, rest[0].int(), *rest[1:]),
        (chosen, rejected, *rest[:2], rest[2][:8], *rest[3:]),
        (chosen, rejected, *rest[:3], rest[3].double(), *rest[4:]),
        (chosen, rejected, *rest[:-1], 0),
    ):
        with pytest.raises(RuntimeError, match="must"):
            torch.ops.rgtg_fast.prefix_bt_loss(*change)


GOOD = torch.zeros(2, 4)
ONES = torch.ones(2, 4, dtype=torch.int64)


@over(
    ("change", "words"),
    [
        ({"r_chosen": torch.zeros(4)}, "r_chosen has shape \\[4\\]; pass \\[N, L\\]"),
        ({"r_chosen": GOOD[:, :0], "r_rejected": GOOD[:, :0]}, "r_chosen has no positions; pass"),
        ({"r_chosen": ONES}, "r_chosen has dtype torch.int64"),
        ({"r_rejected": torch.zeros(2, 5)}, "r_rejected has shape \\[2, 5\\]; pass \\[2, 4\\]"),
        ({"r_rejected": GOOD.double()}, "r_rejected has dtype torch.float64 and r_chosen"),
        ({"mask_chosen": ONES[:1]}, "mask_chosen has shape \\[1, 4\\]; pass \\[2, 4\\]"),
        ({"mask_chosen": [1, 1]}, "mask_chosen is a list"),
        ({"mask_rejected": ONES.float()}, "mask_rejected has dtype torch.float32"),
        ({"mask_rejected": ONES * torch.tensor([[1], [0]])}, "mask_rejected has no .* pair 1"),
        ({"mask_chosen": torch.tensor([[1] * 4, [1, 0, 1, 0]])}, "mask_chosen has a hole in pair"),
        ({"mask_chosen": torch.tensor([[0, 1, 1, 1], [1] * 4])}, "hole in pair 0; pass right-pad"),
        ({"first": 0}, "first=0; pass the shortest prefix length, an int >= 1"),
        ({"first": 1.5}, "first=1.5; pass"),
        ({"first": 5}, "first=5 but both answers of pair 0 are shorter \\(at most 4 tokens\\)"),
        ({"weights": "cubic"}, "weights='cubic' is unknown; pass 'uniform', 'linear' or a tensor"),
        ({"weights": torch.ones(5)}, "weights has shape \\[5\\]; pass \\[4\\]"),
        ({"weights": torch.tensor([1.0, -1, 1, 1])}, "weights has a negative or non-finite"),
        ({"weights": torch.tensor([1.0, NAN, 1, 1])}, "weights has a negative or non-finite"),
        (
            {"weights": torch.zeros(4)},
            "weights are 0 at every prefix length of pair 0 \\(1 .. 4\\)",
        ),
        ({"weights": torch.ones(4, requires_grad=True)}, "weights requires grad"),
        ({"margin": NAN}, "margin=nan; pass a finite number"),
        ({"margin": torch.zeros(3)}, "margin has shape \\[3\\]; pass \\[2\\]"),
        ({"margin": torch.tensor([0.0, INF])}, "margin=\\[0.0, inf\\]; every element"),
        ({"margin": torch.zeros(2, requires_grad=True)}, "margin requires grad"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5; pass 0 <= label_smoothing < 0.5"),
        ({"centering": -1.0}, "centering=-1.0; pass a finite number >= 0"),
        ({"extension": "pad"}, "extension='pad' is unknown; pass 'hold' or 'eos'"),
        ({"reduction": "sum"}, "reduction='sum' is unknown; pass 'mean' or 'none'"),
    ],
)
def test_errors(change, words):
    arguments = {
        "r_chosen": GOOD, "r_rejected": GOOD, "mask_chosen": ONES, "mask_rejected": ONES
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        ops.prefix_bt_loss(**{**arguments, **change})


def test_the_mean_of_no_pairs_is_an_error():
    with pytest.raises(ValueError, match="r_chosen has no pairs to average; pass N >= 1"):
        ops.prefix_bt_loss(GOOD[:0], GOOD[:0], ONES[:0], ONES[:0])
