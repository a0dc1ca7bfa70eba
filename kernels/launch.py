"""Argument checks and launch settings that the Triton launchers share."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether @triton.jit wraps kernels for the interpreter; fixed when a kernel is defined, so a later
# change of TRITON_INTERPRET has no effect.
INTERPRETED = triton.knobs.runtime.interpret


def check(holds: bool, message: str) -> None:
    """Refuses a raw call that would read outside its tensors, as the compiled operators do."""
    if not holds:
        raise RuntimeError(message)


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise RuntimeError(f"{name} has shape {list(tensor.shape)}; pass {list(shape)}")


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, so make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def accumulator(*tensors: Tensor) -> tl.dtype:
    """float64 if any tensor is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return tl.float64 if wide else tl.float32


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and at least ``least``."""
    return max(triton.next_power_of_2(n), least)
