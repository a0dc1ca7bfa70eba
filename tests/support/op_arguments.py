"""Arguments of the ops for tests, each from a generator of its own: the same in every test."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import INF, SLOW


def generator(*seed):
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def draw_logits(kind, rows, vocab):
    x = torch.randn(rows, vocab, generator=generator(rows, vocab), dtype=torch.float64)
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


def examples(backend, check, data_to_arguments, count):
    """Runs ``check`` on drawn arguments; fewer of them where a backend is slow."""

    count = max(4, count // 6) if backend.name in SLOW else count

    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(data=st.data())
    def run(data):
        check(backend, *data_to_arguments(data))

    run()


def policy(rows, do_sample=True):
    noise = generator(rows)
    return (
        torch.rand(rows, generator=noise) * 3 - 0.5,
        torch.rand(rows, generator=noise) + 0.2,
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=noise),
        torch.randint(0, 2**40, (rows,), generator=noise),
        do_sample,
    )


def candidates(rows, k):
    noise = generator(rows, k)
    logprobs = torch.log_softmax(torch.randn(rows, k, generator=noise) * 3, dim=1)
    rewards = torch.randn(rows, k, generator=noise)
    return logprobs, rewards, torch.randint(0, 300_000, (rows, k), generator=noise)


def attention(dtype, rows, k, heads, key_heads, width, prefix, start, length, window, softcap):
    noise = generator(rows, k, width, prefix)

    def tensor(*shape):
        return torch.randn(shape, generator=noise).to(dtype)

    query, own = tensor(rows, k, heads, width), (rows, k, key_heads, width)
    past = (rows, key_heads, prefix, width)
    bounds = torch.tensor(start), torch.tensor(length)
    return (
        query,
        tensor(*past),
        tensor(*past),
        tensor(*own),
        tensor(*own),
        *bounds,
        width**-0.5,
        window,
        softcap,
    )


def batch(dtype, rows, width, first=1, smoothing=0.0, centering=0.0):
    noise = generator(rows, width, first)
    own = torch.promote_types(dtype, torch.float32)
    rewards = [(torch.randn(rows, width, generator=noise) * 3).to(dtype) for _ in range(2)]
    lengths = [torch.randint(1, width + 1, (rows,), generator=noise) for _ in range(2)]
    lengths[0][::2].clamp_(min=first)
    lengths[1][1::2].clamp_(min=first)
    weights = torch.rand(width, generator=noise).to(own) + 0.1
    margin = torch.randn(rows, generator=noise).to(own)
    return *rewards, *lengths, weights, margin, smoothing, centering, first
