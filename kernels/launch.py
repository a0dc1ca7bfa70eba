"""Argument checks and launch settings that the Triton launchers share."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether @triton.jit wraps kernels for the interpreter; fixed when a kernel is defined, so a later
# change of TRITON_INTERPRET has no effect.
INTERPRETED = triton.knobs.runtime.interpret

_forms: dict[tuple, dict[int, Any]] = {}  # compiled kernels by device


def check(holds: bool, message: str) -> None:
    """Refuses a raw call that would read outside its tensors, as the compiled operators do."""
    if not holds:
        raise RuntimeError(message)


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise RuntimeError(f"{name} has shape {list(tensor.shape)}; pass {list(shape)}")


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, so make it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


class Launch:
    """``kernel[grid](*tensors, *numbers, *constants)``, from the second time on without Triton's
    search for the compiled form, which costs the host more than the launch does.

    The kernel must specialise on none of its numbers, or a form compiled for others would be run:
    the form is known by the dtypes, the constants, the device, and that all tensors are aligned.
    """

    def __init__(
        self,
        kernel: Any,
        dtypes: tuple[torch.dtype, ...],
        grid: tuple[int, int, int],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
        stages: int,
    ) -> None:
        self.kernel, self.grid = kernel, grid
        self.numbers = numbers + constants
        self.options = {"num_warps": warps, "num_stages": stages}
        self.forms = _forms.setdefault((kernel, dtypes, constants, warps, stages), {})

    def __call__(self, first: Tensor, *others: Tensor | None) -> None:
        bits, pointers = 0, []
        for tensor in (first, *others):
            pointer = 0 if tensor is None else tensor.data_ptr()
            pointers.append(pointer)
            bits |= pointer
        device = first.get_device()
        form = None if bits % 16 else self.forms.get(device)
        if form is not None:
            form[self.grid](*pointers, *self.numbers)
            return
        form = self.kernel[self.grid](first, *others, *self.numbers, **self.options)
        if form is not None and not bits % 16:
            self.forms[device] = form


def accumulator(*tensors: Tensor) -> tl.dtype:
    """float64 if any tensor is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return tl.float64 if wide else tl.float32


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and at least ``least``."""
    return max(1 << (n - 1).bit_length() if n > 1 else 1, least)
