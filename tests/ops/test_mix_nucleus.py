"""mix_logits with top_p: the nucleus of the mixture, against a sort of the whole vocabulary."""

import pytest
import torch
from op_arguments import generator

from rgtg_fast import ops

over = pytest.mark.parametrize
WEIGHTS = (1.0, 0.7)
# Spreads of the logits: the nucleus is one token, a few of them, and more than 64 of 3000.
SCALES = {"peaked": 9.0, "middling": 4.0, "flat": 0.3}


def logits(scale, rows=6, vocab=3000):
    return [torch.randn(rows, vocab, generator=generator(i, rows, vocab)) * scale for i in range(2)]


def nucleus_by_sorting(given, top_p, temperature, alpha=None):
    """Scores float64 [B, V], -inf outside the nucleus."""
    one, other = (x.double().log_softmax(1) for x in given)
    scores = WEIGHTS[0] * one + WEIGHTS[1] * other
    if alpha is not None:
        scores[one.exp() < alpha * one.exp().amax(1, keepdim=True)] = -torch.inf
    for row, share in zip(scores, (scores / temperature).softmax(1), strict=True):
        order = share.argsort(descending=True, stable=True)
        last = int((share[order].cumsum(0) < top_p).sum())
        row[order[last + 1 :]] = -torch.inf
    return scores, one


@over("backend", ["cpp", "reference"])
@over("scale", SCALES)
@over("top_p", [0.02, 0.6, 0.95])
@over("alpha", [None, 0.05])
def test_only_the_nucleus_is_left(backend, scale, top_p, alpha):
    given, temperature = logits(SCALES[scale]), 0.8
    want, one = nucleus_by_sorting(given, top_p, temperature, alpha)
    scores, ids, logprobs, norm, kl = ops.mix_logits(
        given, WEIGHTS, 40, alpha, temperature, top_p=top_p, backend=backend
    )
    best = want.topk(40)
    assert torch.allclose(scores.double(), best.values, atol=2e-5)
    inside = best.values > -torch.inf
    assert torch.equal(ids[inside], best.indices[inside])
    assert torch.allclose(logprobs.double(), one.gather(1, ids), atol=2e-5)
    policy = (want / temperature).log_softmax(1)
    assert torch.allclose(norm.double(), (want / temperature).logsumexp(1), atol=2e-5)
    gap = torch.where(policy > -torch.inf, policy.exp() * (policy - one), 0.0).sum(1)
    assert torch.allclose(kl.double(), gap, atol=2e-5)


def test_the_sizes_above_are_on_both_sides_of_what_is_ranked():
    for scale, beyond in (("peaked", False), ("middling", False), ("flat", True)):
        scores, _ = nucleus_by_sorting(logits(SCALES[scale]), 0.6, 0.8)
        assert bool(((scores > -torch.inf).sum(1) > 64).all()) is beyond


@over("scale", SCALES)
def test_a_draw_is_the_best_of_the_nucleus_with_its_noise(scale):
    """The noise of a token is that of a draw from everything."""
    given = logits(SCALES[scale])
    want, _ = nucleus_by_sorting(given, 0.6, 0.9)
    masked = [given[0].masked_fill(want == -torch.inf, -torch.inf), given[1]]
    drawn = ops.mix_logits(given, WEIGHTS, 1, None, 0.9, 5, 2, top_p=0.6)
    assert torch.equal(drawn[1], ops.mix_logits(masked, WEIGHTS, 1, None, 0.9, 5, 2)[1])


def test_draws_have_the_frequencies_of_the_nucleus():
    rows = 20_000
    given = [x.expand(rows, -1) for x in logits(0.5, rows=1, vocab=30)]
    scores, ids, _, norm, _ = ops.mix_logits(given, WEIGHTS, 1, None, 0.8, 11, 3, top_p=0.7)
    want, _ = nucleus_by_sorting([x[:1] for x in given], 0.7, 0.8)
    share = (want[0] / 0.8).softmax(0) * rows
    seen, inside = torch.bincount(ids[:, 0], minlength=30), share > 0
    assert 5 < inside.sum() < 20 and not seen[~inside].any()
    chi = ((seen - share) ** 2 / share)[inside].sum()
    assert float(chi) < 43.8  # p = 0.001 at 19 degrees of freedom, which are not exceeded
    chance = (scores[:, 0] / 0.8 - norm).exp().double()
    assert torch.allclose(chance, (share / rows)[ids[:, 0]], atol=1e-5)


def test_several_draws_are_different_tokens_also_where_the_nucleus_has_fewer():
    given = logits(SCALES["peaked"])
    scores, ids, *_ = ops.mix_logits(given, WEIGHTS, 12, None, 0.8, 5, 2, top_p=0.6)
    few = (scores > -torch.inf).sum(1)
    assert bool((few < 12).all()) and bool((few > 0).all())
    assert all(row.unique().numel() == 12 for row in ids)


def test_a_row_that_is_not_a_number_spoils_no_other():
    given = logits(SCALES["middling"])
    given[1][2, 17] = torch.nan
    given[0][3] = -torch.inf
    whole = ops.mix_logits(given, WEIGHTS, 2, None, 0.8, 5, 2, top_p=0.6)
    assert whole[0][2].isnan().all() and whole[4][2].isnan()
    assert (whole[0][3] == -torch.inf).all() and whole[4][3].isnan()
    good = torch.tensor([0, 1, 4, 5])
    alone = ops.mix_logits([x[good] for x in given], WEIGHTS, 2, None, 0.8, 5, 2, top_p=0.6)
    for got, want in zip(whole, alone, strict=True):
        assert torch.equal(got[good], want)


def test_no_rows_and_one_token():
    empty = ops.mix_logits(logits(1.0, rows=0), WEIGHTS, 3, None, 0.8, 5, 2, top_p=0.6)
    assert [list(x.shape) for x in empty] == [[0, 3]] * 3 + [[0]] * 2
    ids = ops.mix_logits(logits(1.0, vocab=1), WEIGHTS, 1, None, 0.8, 5, 2, top_p=0.6)[1]
    assert not ids.any()


@over(
    ("options", "message"),
    [
        ({"top_p": 0.0, "temperature": 1.0}, r"top_p=0.0; pass a share in \(0, 1\]"),
        ({"top_p": 1.5, "temperature": 1.0}, r"top_p=1.5; pass a share"),
        ({"top_p": float("nan"), "temperature": 1.0}, r"top_p=nan; pass a share"),
        ({"top_p": 0.5}, r"top_p came without temperature; pass temperature=1.0"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        ops.mix_logits(logits(1.0), WEIGHTS, 1, **options)
