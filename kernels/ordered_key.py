"""The total order of candidates in 64-bit keys, and the largest keys of a tile.

A key is ``ordered(logit) << 32 | (2^32 - 1 - id)`` as a signed integer: logit descending, then id
ascending, with -0 == +0 and NaN on top, as in ``csrc/ordered_key.h`` (which is unsigned).
"""

import triton
import triton.language as tl

NO_CODE = tl.constexpr(-(2**31))  # below the code of -inf
NAN_CODE = tl.constexpr(2**31 - 1)
NO_KEY = tl.constexpr(-(2**63))  # below the key of every token


@triton.jit
def ordered(x):
    """int32 codes that order like the float32 value of ``x``."""
    x = x.to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    code = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, NAN_CODE, code)


@triton.jit
def pack(code, ids):
    key = (code.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))
    return tl.where(code == NO_CODE, NO_KEY, key)


@triton.jit
def key_id(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def best_of_rows(code, ids):
    """The code and the id of the first candidate in each row of a ``[R, C]`` tile."""
    best = tl.max(code, axis=1)
    first = tl.min(tl.where(code == best[:, None], ids, 0x7FFFFFFF), axis=1)
    return best, first


@triton.jit
def _swap_pairs(cube, ascends, axis: tl.constexpr, dims: tl.constexpr):
    # The partner of each key is sum - self; the sum may overflow, but modulo 2^64 it is exact.
    other = tl.sum(cube, axis=axis, keep_dims=True) - cube
    is_right = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (dims - 1 - axis))
    return tl.where((cube < other) != ((ascends ^ is_right) == 1), other, cube)


@triton.jit
def _merge_runs(cube, stage: tl.constexpr, dims: tl.constexpr):
    """Sorts runs of 2^stage keys, each bitonic: descending and ascending in turns, the last one
    (stage == dims) descending."""
    if stage < dims:
        ascends = tl.reshape(tl.arange(0, 2), [1] * (dims - 1 - stage) + [2] + [1] * stage)
    else:
        ascends = 0
    for i in tl.static_range(stage):
        cube = _swap_pairs(cube, ascends, dims - stage + i, dims)
    return cube


@triton.jit
def top_keys(keys, K: tl.constexpr, LOG_N: tl.constexpr, LOG_K: tl.constexpr):
    """The ``K = 2^LOG_K`` largest of ``2^LOG_N`` int64 keys, descending, by a bitonic top-k.

    Runs of K are sorted; then pairs of runs, one descending and one ascending, are halved by an
    elementwise maximum (which leaves a bitonic run of the K largest) and sorted again.
    """
    cube = tl.reshape(keys, [2] * LOG_N)
    for stage in tl.static_range(1, LOG_K + 1):
        cube = _merge_runs(cube, stage, LOG_N)
    for gone in tl.static_range(1, LOG_N - LOG_K + 1):
        cube = tl.max(cube, axis=LOG_N - LOG_K - gone)
        cube = _merge_runs(cube, LOG_K, LOG_N - gone)
    return tl.reshape(cube, [K])
