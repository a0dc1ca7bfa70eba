"""candidate_attention in C++ against torch's scaled_dot_product_attention with a 4D mask.

Each call finds its inputs in memory, not in the cache, as a layer does after the weights of all the
others. For GPUs: ``python -m rgtg_fast bench candidate_attention --device cuda``.
"""

import itertools
import time

import torch
from _common import arguments, report, require
from torch.nn.functional import scaled_dot_product_attention

from rgtg_fast import ops
from rgtg_fast.cli import microbench

WIDTH = 64
FLUSH_BYTES = 96 * 2**20


def main() -> None:
    options = arguments(__doc__)
    copy = microbench.copy_bandwidth("cpu")
    product = multiply_adds_per_microsecond()
    print(f"copy {copy:.1f} GB/s, fp32 matrix product {product / 1e3:.1f} G multiply-adds/s")
    rows = []
    for dtype, heads in itertools.product((torch.float32, torch.bfloat16), ((12, 12), (32, 8))):
        for prefix, k in itertools.product((64, 256, 1024), (1, 10, 40)):
            row = measure(dtype, *heads, prefix, k, options.repeat)
            size = 2 * heads[1] * prefix * WIDTH
            floor = 1e-3 * size * dtype.itemsize / copy
            compute = size * k * heads[0] // heads[1] / product
            row |= {"memory floor us": floor, "product floor us": compute}
            rows.append(row | {"x floor": row["cpp us"] / max(floor, compute)})
    report("candidate_attention", rows, options)


def multiply_adds_per_microsecond() -> float:
    a, b = torch.randn(2, 1024, 1024)
    taken = min(microbench.times(torch.mm, [(a, b)], "cpu", 10))
    return 1024**3 / taken


def measure(
    dtype: torch.dtype, heads: int, key_heads: int, prefix: int, k: int, repeat: int
) -> dict:
    past = (1, key_heads, prefix, WIDTH)
    count = 1 + FLUSH_BYTES // (4 * key_heads * prefix * WIDTH * dtype.itemsize)
    sets = []
    for _ in range(min(count, repeat + 3)):
        query, own = torch.randn(1, k, heads, WIDTH), torch.randn(2, 1, k, key_heads, WIDTH)
        keys, values = torch.randn(2, *past)
        tensors = [t.to(dtype) for t in (query, keys, values, *own)]
        all_keys = torch.cat([tensors[1], tensors[3].transpose(1, 2)], dim=2)
        all_values = torch.cat([tensors[2], tensors[4].transpose(1, 2)], dim=2)
        sets.append((tensors, all_keys, all_values))
    blocked = torch.full((k, k), -torch.inf).fill_diagonal_(0.0)
    mask = torch.cat([torch.zeros(k, prefix), blocked], dim=1).to(dtype)[None, None]
    start, length = torch.tensor([0]), torch.tensor([prefix])

    def cpp(tensors, *_):
        return torch.ops.rgtg_fast.candidate_attention(*tensors, start, length, WIDTH**-0.5)

    def checked(tensors, *_):
        return ops.candidate_attention(*tensors, start, length, WIDTH**-0.5, backend="cpp")

    def sdpa(tensors, all_keys, all_values):
        query = tensors[0].transpose(1, 2)
        return scaled_dot_product_attention(query, all_keys, all_values, mask, enable_gqa=True)

    def cat_sdpa(tensors, *_):
        _, keys, values, own_key, own_value = tensors
        keys = torch.cat([keys, own_key.transpose(1, 2)], dim=2)
        values = torch.cat([values, own_value.transpose(1, 2)], dim=2)
        return sdpa(tensors, keys, values)

    want = ops.candidate_attention(*sets[0][0], start, length, WIDTH**-0.5, backend="reference")
    require(microbench.agrees(cpp(*sets[0]), want), f"T={prefix} k={k} {heads}/{key_heads} {dtype}")
    taken = cold_microseconds([cpp, checked, sdpa, cat_sdpa], sets, repeat)
    ours, wrapped, plain, with_cat = taken
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "heads": f"{heads}/{key_heads}",
        "T": prefix,
        "k": k,
        "cpp us": ours,
        "with checks us": wrapped,
        "sdpa us": plain,
        "ratio": plain / ours,
        "cat + sdpa us": with_cat,
    }


def cold_microseconds(functions: list, sets: list, repeat: int) -> list[float]:
    """The fastest call of each, in turns over inputs that the cache has meanwhile lost."""
    best = [float("inf")] * len(functions)
    for turn in range(repeat + 3):
        for i, function in enumerate(functions):
            inputs = sets[(turn + i * len(sets) // len(functions)) % len(sets)]
            start = time.perf_counter()
            function(*inputs)
            if turn >= 3:
                best[i] = min(best[i], 1e6 * (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
