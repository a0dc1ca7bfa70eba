"""Gumbel noise, bit for bit that of ``csrc/gumbel.h`` and ``rgtg_fast/ops/reference.py``.

One Philox block and one polynomial logarithm, both made of operations that are rounded once: a
kernel that uses this must be launched with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

_ONE_MINUS_SQRT_HALF = tl.constexpr(0.292893218813452476)
_SQRT_HALF = tl.constexpr(0.707106781186547524)
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_SCALE = tl.constexpr(2.0**-32)


@triton.jit
def philox_word(counter0, counter1, counter2, counter3, key0, key1):
    """The first word of Philox4x32-10 (Salmon et al., SC 2011); all uint32."""
    for _ in tl.static_range(10):
        product0 = counter0.to(tl.uint64) * 0xD2511F53
        product1 = counter2.to(tl.uint64) * 0xCD9E8D57
        counter0 = (product1 >> 32).to(tl.uint32) ^ counter1 ^ key0
        counter2 = (product0 >> 32).to(tl.uint32) ^ counter3 ^ key1
        counter1 = product1.to(tl.uint32)
        counter3 = product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return counter0


@triton.jit
def _log_near_one(f, exponent):
    square = f * f
    y = f * 7.0376836292e-2 + -1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f + -1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f + -1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f + -2.4999993993e-1
    y = y * f + 3.3333331174e-1
    y = y * f * square
    y = y + exponent * _LN2_LOW
    y = y + square * -0.5
    return (f + y) + exponent * _LN2_HIGH


@triton.jit
def _log_positive(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # in [1/2, 1)
    low = mantissa < _SQRT_HALF
    exponent = exponent - low.to(tl.int32)
    mantissa = tl.where(low, mantissa + mantissa, mantissa)
    return _log_near_one(mantissa - 1.0, exponent.to(tl.float32))


@triton.jit
def gumbel_from_word(word):
    """-log(-log(1 - v)), v = (word + 1/2) / 2^32, relatively precise at both ends."""
    v = (word.to(tl.float32) + 0.5) * _SCALE
    w = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * _SCALE  # 1 - v
    small = v <= _ONE_MINUS_SQRT_HALF
    exponential = tl.where(small, -_log_near_one(-v, tl.zeros_like(v)), -_log_positive(w))
    return -_log_positive(exponential)


@triton.jit
def gumbel_noise(seed, position, ids):
    """Noise of each token id: keyed by the row seed, counted by (token id, position)."""
    word = philox_word(
        ids.to(tl.uint32),
        (ids >> 32).to(tl.uint32),
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    return gumbel_from_word(word)
