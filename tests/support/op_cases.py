"""Arguments of every op, as its kernels take them: ``arguments(op, size)``.

One function per op, named like it, gives its cases at a size: the tests of what holds for every op
(operator registration, gradients, graphs on a GPU, compilation) draw theirs here.
"""

from dataclasses import dataclass

import torch

from rgtg_fast.ops.reference import OPS


@dataclass(frozen=True)
class Size:
    dtype: torch.dtype = torch.float32
    rows: int = 3
    k: int = 4
    width: int = 17  # H of heads, L of answers
    vocab: int = 30
    head: int = 16  # D of attention
    prefix: int = 20  # T of attention
    heads: tuple[int, int] = (4, 2)  # of queries, of keys

    def floats(self, *shape):
        noise = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=noise).to(self.dtype)


def arguments(op, size):
    """The cases of ``op`` at a size: a list of argument tuples; the first has no options set."""
    return globals()[op](size)


def _candidates(size):
    """Log-probabilities, rewards and ids ``[B, k]``."""
    plain = Size(rows=size.rows)
    logprobs = torch.log_softmax(plain.floats(size.rows, size.k) * 3, dim=1)
    noise = torch.Generator().manual_seed(size.k)
    ids = torch.randint(0, size.vocab, (size.rows, size.k), generator=noise)
    return logprobs, plain.floats(size.rows, size.k, 1)[..., 0], ids


def _policy(size):
    """beta, temperature, row seeds and positions."""
    row = torch.arange(size.rows)
    return 0.5 + row / size.rows, 0.7 + row / size.rows, row * 7919, row + 2


def topk_logprobs(size):
    return [(size.floats(size.rows, size.vocab), min(size.k, size.vocab))]


def mix_logits(size):
    other = Size(rows=size.rows).floats(size.rows, size.vocab + 2) * 3
    logits = [size.floats(size.rows, size.vocab) * 2, other]
    weights = 1.0 + torch.arange(2.0 * size.rows).view(size.rows, 2) / 4
    third = size.floats(size.rows, size.vocab, 1)[..., 0]
    shares = torch.cat([weights, -weights[:, :1]], dim=1)
    k = min(size.k, size.vocab)
    return [
        (logits, weights, k),
        ([*logits, third], shares, k, None, _policy(size)[1]),
        (logits, weights, k, None, *_policy(size)[1:]),
    ]


def _head(size):
    return size.floats(size.rows, size.k, size.width), size.floats(size.width) / size.width**0.5


def reward_head(size):
    return [(*_head(size), None), (*_head(size), size.floats(1))]


def vocab_reward(size):
    weight = size.floats(size.vocab, size.width)
    return [(size.floats(size.rows, size.width), weight, _candidates(size)[2])]


def ratio_sample(size):
    return [(*_candidates(size), *_policy(size), sample) for sample in (True, False)]


def ratio_keep(size):
    logprobs, _, ids = _candidates(size)
    return [(logprobs, ids, *_policy(size), sample, -0.5, 1.0) for sample in (True, False)]


def ratio_step(size):
    logprobs, _, ids = _candidates(size)
    policy = ids, *_policy(size)
    head = _head(size)
    return [
        (logprobs, *head, *policy, True, None),
        (logprobs, *head, *policy, False, size.floats(1)),
    ]


def candidate_attention(size):
    if size.dtype == torch.float64:  # which only the reference takes
        return []
    queries, keys = size.heads
    past, own = (size.rows, keys, size.prefix, size.head), (size.rows, size.k, keys, size.head)
    tensors = [size.floats(size.rows, size.k, queries, size.head)]
    tensors += [size.floats(*shape) * factor for shape in (past, own) for factor in (1, -0.5)]
    start = torch.arange(size.rows)
    bounds = start, size.prefix - start
    scale = size.head**-0.5
    window = size.prefix // 3
    rows = torch.arange(size.rows).flip(0) // 2
    return [
        (*tensors, *bounds, scale, None, None),
        (*tensors, *bounds, scale, window, 3.0),
        (*tensors, *bounds, scale, None, None, rows),
    ]


def prefix_bt_loss(size):
    own = torch.promote_types(size.dtype, torch.float32)
    shape = size.rows, size.width
    rewards = size.floats(*shape), size.floats(*shape, 1)[..., 0].flip(0)
    lengths = [torch.arange(size.rows) % size.width + 1, torch.full((size.rows,), size.width)]
    constants = torch.linspace(0.1, 1.0, size.width, dtype=own), torch.zeros(size.rows, dtype=own)
    return [
        (*rewards, *lengths, *constants, 0.0, 0.0, 1),
        (*rewards, *lengths, *constants, 0.1, 0.05, 2),
    ]


assert all(op in globals() for op in OPS), "every op needs its cases"
