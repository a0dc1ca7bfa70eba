"""What the op tests share: data types, instruction sets, and the rule for numerical error."""

from contextlib import contextmanager

import torch

from rgtg_fast import _C

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIMD_LEVELS = _C.simd_levels()


@contextmanager
def simd_level(name):
    before = _C.simd_level()
    _C.set_simd_level(name)
    try:
        yield
    finally:
        _C.set_simd_level(before)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_no_worse(got, torch_result, exact, scale=None):
    """The error against float64 is at most that of the torch expression plus one float32 ulp.

    The ulp is that of the largest result or, where results are sums that cancel, of ``scale``, the
    largest sum of magnitudes. Infinities and NaN must match exactly.
    """
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isnan(got), torch.isnan(exact))
    infinite = torch.isinf(exact)
    assert torch.equal(got[infinite].double(), exact[infinite])
    if not finite.any():
        return
    error = (got.double() - exact)[finite].abs().max().item()
    torch_error = (torch_result.double() - exact)[finite].abs().max().item()
    ulp = (exact[finite].abs().max().item() if scale is None else scale) * 2.0**-23
    assert error <= torch_error + ulp, f"{error} against torch's {torch_error} and ulp {ulp}"
