"""prefix_bt_loss on every backend: losses and gradients no worse than torch's own."""

import pytest
import torch
from hypothesis import strategies as st
from op_arguments import batch, examples
from op_support import FLOATS
from parity import INF, NAN, SLOW, backends_of, check_prefix_bt_loss

from rgtg_fast.ops import reference

over = pytest.mark.parametrize


@over("backend", backends_of("prefix_bt_loss"))
@over("dtype", FLOATS)
def test_drawn_shapes_and_options(backend, dtype):
    def arguments(data):
        rows, width = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 90))
        first = data.draw(st.integers(1, width))
        options = [data.draw(st.sampled_from([0.0, 0.1, 0.35])) for _ in range(2)]
        return batch(dtype, rows, width, first, *options)

    examples(backend, check_prefix_bt_loss, arguments, 24)


@over("backend", backends_of("prefix_bt_loss"))
@over("width", [1, 31, 255, 256, 257, 513, 1030])
def test_at_the_edges_of_blocks(backend, width):
    chosen, rejected, *_, weights, margin, _, _, _ = batch(torch.float32, 4, width)
    near = max(1, width - 1)
    lengths = torch.tensor([width, 1, near, width]), torch.tensor([1, width, width, width])
    rest = (*lengths, weights, margin, 0.1, 0.05)
    for first in {1, near, width}:
        check_prefix_bt_loss(backend, chosen, rejected, *rest, first)


@over("backend", backends_of("prefix_bt_loss"))
def test_views(backend):
    chosen, rejected, len_chosen, len_rejected, weights, margin, *rest = batch(
        torch.float32, 6, 40, 3
    )
    wide = torch.full((12, 100), NAN)
    views = wide[::2, 5:45], wide[1::2, 10:90:2]
    for view, values in zip(views, (chosen, rejected), strict=True):
        view.copy_(values)
    doubled = [torch.stack([t, t], dim=1).flatten()[::2] for t in (len_chosen, len_rejected)]
    vectors = [torch.stack([t, t], dim=1).flatten()[::2] for t in (weights, margin)]
    check_prefix_bt_loss(backend, *views, *doubled, *vectors, *rest)
    rows = 3 if backend.name in SLOW else 300
    check_prefix_bt_loss(backend, *batch(torch.bfloat16, rows, 7, 2))


@over("backend", backends_of("prefix_bt_loss"))
def test_what_no_prefix_uses_is_not_read(backend):
    chosen, rejected, *rest = batch(torch.float32, 5, 300, 20)
    want = backend("prefix_bt_loss", chosen, rejected, *rest)
    at, first = torch.arange(300), 20
    for rewards, length in zip((chosen, rejected), rest[:2], strict=True):
        used = (at >= torch.minimum(length[:, None], torch.tensor(first)) - 1) & (
            at < length[:, None]
        )
        rewards[~used] = NAN
    got = backend("prefix_bt_loss", chosen, rejected, *rest)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(a.isfinite().all() for a in got)


@over("backend", backends_of("prefix_bt_loss"))
@over("options", [(0.0, 0.0), (0.1, 0.2)])
def test_non_finite_rewards_and_undefined_pairs_beside_good_ones(backend, options):
    chosen, rejected, _, _, weights, margin, *_ = batch(torch.float32, 10, 270)
    len_chosen = torch.tensor([270, 100, 3, 270, 270, 0, 271, 2, -5, 100])
    len_rejected = torch.tensor([200, 270, 270, 3, 270, 270, 3, 3, 9, 100])
    chosen[0, 260], chosen[1, 99], rejected[3, 2] = NAN, INF, NAN
    rejected[4, 8], rejected[4, 9], chosen[4, 9] = -INF, INF, INF
    rest = (len_chosen, len_rejected, weights, margin, *options, 5)
    got = backend("prefix_bt_loss", chosen, rejected, *rest)
    want = reference.prefix_bt_loss(chosen, rejected, *rest)
    assert want[0].isnan().tolist()[5:] == [True, True, True, True, False]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
