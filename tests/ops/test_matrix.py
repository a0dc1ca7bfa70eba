"""Every op on every backend: ids and slots bit for bit, values no worse than torch's."""

import pytest
import torch
from hypothesis import strategies as st
from op_arguments import attention, candidates, draw_logits, examples, generator, policy
from op_support import FLOATS
from parity import (
    INF,
    NAN,
    backends_of,
    check_ratio_sample,
    check_ratio_step,
    check_reward_head,
    check_topk_logprobs,
    check_vocab_reward,
    crossed,
)
from parity import check_candidate_attention as check_attention

from rgtg_fast import ops

over = pytest.mark.parametrize
LOGIT_KINDS = ("normal", "ties", "equal", "masked", "peaked", "far from zero", "ascending")


@over(("backend", "kind"), crossed("topk_logprobs", LOGIT_KINDS, quick=[1]))
def test_topk_of_drawn_shapes(backend, kind):
    def arguments(data):
        rows, vocab = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2600))
        k = data.draw(st.integers(1, min(64, vocab)))
        return draw_logits(kind, rows, vocab).to(data.draw(st.sampled_from(FLOATS))), k

    examples(backend, check_topk_logprobs, arguments, 24)


EDGES = [
    (1, 1, 1),
    (2, 61, 61),
    (2, 64, 64),
    (2, 255, 64),
    (3, 256, 1),
    (2, 257, 10),
    (1, 4099, 64),
    (1, 2047, 63),
    (1, 2048, 2),
    (1, 2049, 33),
    (257, 11, 1),
    (0, 40, 3),
]


@over(("backend", "rows", "vocab", "k"), crossed("topk_logprobs", EDGES, [0, 4, 5, 8, 11]))
def test_topk_at_the_edges_of_blocks(backend, rows, vocab, k):
    check_topk_logprobs(backend, draw_logits("normal", rows, vocab).float(), k)


@over(("backend", "dtype"), crossed("topk_logprobs", FLOATS, quick=[2]))
def test_topk_of_nan_and_infinite_rows_beside_a_good_one(backend, dtype):
    logits = draw_logits("normal", 6, 700).to(dtype)
    logits[0, 690] = NAN
    logits[1, 3] = INF
    logits[2] = -INF
    logits[3, 5:] = -INF
    logits[4] = NAN
    logits[5, :3] = torch.tensor([-0.0, 0.0, -0.0])
    logits[5, 3:] = -1.0
    check_topk_logprobs(backend, logits, 10)


@over("backend", backends_of("topk_logprobs", slow=["triton-interpreted"]))
def test_topk_of_views(backend):
    base = draw_logits("ties", 12, 900).float()
    check_topk_logprobs(backend, base[3:9:2, 5:850], 10)
    check_topk_logprobs(backend, base.t()[:3], 10)
    check_topk_logprobs(backend, base[:2, ::3], 10)
    check_topk_logprobs(backend, base[:1].expand(3, -1), 10)


@over("backend", backends_of("reward_head"))
@over("dtype", FLOATS)
def test_reward_head_of_drawn_shapes(backend, dtype):
    def arguments(data):
        rows, k = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 70))
        width = data.draw(st.integers(1, 300))
        noise = generator(rows, k, width)
        hidden = torch.randn(rows, k, width, generator=noise).to(dtype)
        weight = torch.randn(width, generator=noise).to(data.draw(st.sampled_from(FLOATS)))
        bias = torch.randn(1, generator=noise).to(dtype) if data.draw(st.booleans()) else None
        return hidden, weight, bias

    examples(backend, check_reward_head, arguments, 24)


@over("backend", backends_of("reward_head", slow=["triton-interpreted"]))
def test_reward_head_of_views_and_many_rows(backend):
    base = torch.randn(6, 24, 200, generator=generator(1))
    weight = torch.randn(400, generator=generator(2))
    check_reward_head(backend, base[1::2, 2:20:3, 10:], weight[:190])
    check_reward_head(backend, base.transpose(1, 2), weight[:48:2])
    check_reward_head(backend, base.flatten()[: 257 * 9].view(257, 1, 9), weight[:9])
    check_reward_head(backend, torch.randn(1, 2, 9001, generator=generator(3)), torch.ones(9001))


@over("backend", backends_of("reward_head"))
def test_reward_head_keeps_nan_to_its_candidate(backend):
    hidden = torch.randn(2, 3, 40, generator=generator(4))
    hidden[0, 1, 39], hidden[1, 2, 0] = NAN, INF
    check_reward_head(backend, hidden, torch.ones(40))


@over("backend", backends_of("vocab_reward"))
@over("dtype", FLOATS)
def test_vocab_reward_of_drawn_shapes(backend, dtype):
    def arguments(data):
        rows, k = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 20))
        width, vocab = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 50))
        noise = generator(rows, k, width)
        hidden = torch.randn(rows, width, generator=noise).to(dtype)
        weight = torch.randn(vocab, width, generator=noise)
        ids = torch.randint(0, vocab, (rows, k), generator=noise)
        return hidden, weight.to(data.draw(st.sampled_from(FLOATS))), ids

    examples(backend, check_vocab_reward, arguments, 24)


@over("backend", backends_of("vocab_reward"))
def test_vocab_reward_of_views_that_read_only_the_gathered_rows(backend):
    base = torch.randn(60, 1200, generator=generator(5))
    ids = torch.randint(0, 20, (8, 24), generator=generator(6))
    check_vocab_reward(backend, base[:16:2, 50:850], base[30:, 100:900], ids[:, ::2])
    check_vocab_reward(backend, base.t()[:8, :40], base[:, :40], ids)
    poisoned = torch.full((100, 16), NAN)
    poisoned[ids[0]] = 1.0
    check_vocab_reward(backend, torch.ones(1, 16), poisoned, ids[:1])


@over("backend", backends_of("ratio_sample"))
@over("do_sample", [True, False])
def test_draw_of_drawn_shapes(backend, do_sample):
    def arguments(data):
        rows, k = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 64))
        logprobs, rewards, ids = candidates(rows, k)
        if data.draw(st.booleans()):
            logprobs, rewards = logprobs.round(), rewards.round()
        if data.draw(st.booleans()):
            logprobs[:, k // 2 + 1 :] = -INF
        return logprobs, rewards, ids, *policy(rows, do_sample)

    examples(backend, check_ratio_sample, arguments, 40)


@over("backend", backends_of("ratio_sample"))
@over("do_sample", [True, False])
def test_draw_with_nan_infinite_and_extreme_rows(backend, do_sample):
    logprobs, rewards, ids = candidates(8, 7)
    logprobs[0, 3] = NAN
    logprobs[1] = -INF
    rewards[2, 6] = INF
    logprobs[3, 1:] = -INF
    rewards[4, 0] = NAN
    rewards[5], logprobs[5] = 0.0, -1.0
    logprobs[6] *= 1e30
    check_ratio_sample(backend, logprobs, rewards, ids, *policy(8, do_sample))


@over("backend", backends_of("ratio_sample", slow=["triton-interpreted"]))
def test_draw_of_views_and_many_rows(backend):
    logprobs, rewards, ids = candidates(20, 30)
    check_ratio_sample(
        backend, logprobs[::2, 1:21:2], rewards.t()[:10, :10], ids[5:15, ::3], *policy(10)
    )
    check_ratio_sample(backend, *candidates(257, 2), *policy(257))
    check_ratio_sample(backend, *candidates(3, 200), *policy(3))


@over(("backend", "dtype"), crossed("ratio_step", FLOATS, quick=[2]))
def test_step_of_drawn_shapes(backend, dtype):
    def arguments(data):
        rows, k = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 64))
        width = data.draw(st.integers(1, 300))
        noise = generator(rows, k, width)
        logprobs, _, ids = candidates(rows, k)
        hidden = torch.randn(rows, k, width, generator=noise).to(dtype)
        weight = (torch.randn(width, generator=noise) / width**0.5).to(dtype)
        bias = torch.randn(1, generator=noise) if data.draw(st.booleans()) else None
        return logprobs, hidden, weight, ids, *policy(rows, data.draw(st.booleans())), bias

    examples(backend, check_ratio_step, arguments, 24)


@over("backend", backends_of("ratio_step", slow=["triton-interpreted"]))
def test_step_with_nan_rows_views_and_a_wide_head(backend):
    logprobs, _, ids = candidates(4, 20)
    logprobs, ids = logprobs[:, ::2], ids[:, 1::2]
    logprobs[0] = -INF
    hidden = torch.randn(4, 10, 2 * 2100, generator=generator(8))[..., ::2]
    hidden[1, 4, 2000], hidden[2, 0, 0] = NAN, INF
    weight = torch.randn(2100, generator=generator(9))
    check_ratio_step(backend, logprobs, hidden, weight, ids, *policy(4), None)
    rows = (candidates(257, 2)[0], torch.ones(257, 2, 3), torch.ones(3), candidates(257, 2)[2])
    check_ratio_step(backend, *rows, *policy(257), torch.tensor([0.5]))


OPTIONS = [
    (dtype, *options)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for options in ((None, None), (1, None), (20, 3.0))
]


@over(("backend", "dtype", "window", "softcap"), crossed("candidate_attention", OPTIONS, [1, 5]))
def test_attention_with_its_options(backend, dtype, window, softcap):
    shape = (3, 5, 4, 2, 80, 150, [0, 7, 100], [150, 130, 100])
    check_attention(backend, *attention(dtype, *shape, window, softcap))


SHAPES = [
    (1, 1, 1, 1, 64, 1),
    (2, 3, 3, 1, 128, 65),
    (1, 64, 2, 2, 64, 40),
    (1, 10, 8, 1, 256, 30),
    (2, 2, 6, 2, 96, 300),
    (1, 2, 2, 2, 8, 3),
    (0, 3, 2, 1, 64, 9),
    (2, 3, 4, 2, 64, 0),
]


@over(
    ("backend", "rows", "k", "heads", "key_heads", "width", "prefix"),
    crossed("candidate_attention", SHAPES, quick=[0, 1, 5, 6, 7]),
)
def test_attention_of_shapes(backend, rows, k, heads, key_heads, width, prefix):
    bounds = [0] * rows, [prefix] * rows
    shape = (rows, k, heads, key_heads, width, prefix)
    check_attention(backend, *attention(torch.float32, *shape, *bounds, None, None))


@over("backend", backends_of("candidate_attention"))
def test_attention_never_uses_what_is_not_live(backend):
    shape = (2, 3, 2, 1, 64, 200, [130, 50], [180, 50])
    arguments = attention(torch.float32, *shape, None, None)
    for prefix in arguments[1:3]:
        prefix[0, :, :130], prefix[0, :, 180:], prefix[1] = NAN, NAN, NAN
    (got,) = backend("candidate_attention", *arguments)
    assert got.isfinite().all()
    own = arguments[4].repeat_interleave(2, dim=2)  # row 1 has no live prefix: its own value
    assert torch.allclose(got[1], own[1])


@over("backend", backends_of("candidate_attention"))
def test_attention_of_views(backend):
    query, keys, values, own_key, own_value, *rest = attention(
        torch.float32, 2, 4, 4, 2, 64, 90, [3, 0], [80, 90], None, None
    )
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([values, values], dim=3)[..., :64]
    sliced = torch.cat([query, query], dim=1)[:, ::2]
    check_attention(backend, sliced, strided, wide, own_key.mT.contiguous().mT, own_value, *rest)


@over(("backend", "dtype"), crossed("candidate_attention", FLOATS[1:3], quick=[0]))
def test_attention_of_rows_that_share_a_prefix_or_leave_one_out(backend, dtype):
    shape = (4, 3, 4, 2, 64, 150, [0, 7, 100, 2], [150, 130, 100, 3])
    query, keys, values, *rest = attention(dtype, *shape, 90, None)
    rows = torch.tensor([2, 2, 0, 2])
    check_attention(backend, query, keys, values, *rest, rows)
    unread = torch.tensor([False, True, False, True])
    for prefix in (keys, values):
        prefix[unread] = NAN
    (got,) = backend("candidate_attention", query, keys, values, *rest, rows)
    assert got.isfinite().all()
    copied = (query, keys[rows], values[rows], *rest)
    (want,) = backend("candidate_attention", *copied)
    assert torch.equal(got, want)
    one = [x[1:2] for x in (query, *rest[:4])]
    check_attention(backend, one[0], keys, values, *one[1:], *rest[4:], rows[1:2])


@over("backend", backends_of("candidate_attention"))
def test_siblings_do_not_see_each_other(backend):
    arguments = attention(torch.float32, 1, 4, 2, 1, 64, 70, [0], [70], None, None)
    (together,) = backend("candidate_attention", *arguments)
    query, keys, values, own_key, own_value, *rest = arguments
    one = (query[:, 2:3], keys, values, own_key[:, 2:3], own_value[:, 2:3], *rest)
    (alone,) = backend("candidate_attention", *one)
    assert torch.allclose(together[:, 2:3], alone, atol=1e-6)


@over("backend", backends_of("ratio_sample", slow=["triton-interpreted"]))
def test_equal_streams_over_rows_and_steps(backend):
    """One row's noise does not depend on its place in the batch, and differs between steps."""
    k, rows = 16, 24
    ids = torch.arange(k).expand(rows, k)
    flat, one = torch.zeros(rows, k), torch.ones(rows)
    seeds, steps = ops.split_seed(7, 1).expand(rows), torch.arange(rows)
    stream = (flat, flat, ids, one, one, seeds, steps, True)
    (slots, _) = backend("ratio_sample", *stream)
    assert slots.unique().numel() > 4
    (swapped, _) = backend("ratio_sample", *stream[:6], steps.flip(0), True)
    assert torch.equal(swapped, slots.flip(0))
