"""Gradients of the kernels: those of the float64 reference on the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import OPS, as_tuple


def _flat(arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments with the elements of lists in the place of these."""
    return [x for a in arguments for x in (a if isinstance(a, list) else [a])]


def _nested(flat: list[Any], lengths: list[int | None]) -> list[Any]:
    """Undoes :func:`_flat`; a length tells of a list."""
    left = iter(flat)
    return [next(left) if n is None else [next(left) for _ in range(n)] for n in lengths]


def wanted(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd would follow a call with these arguments."""
    return torch.is_grad_enabled() and any(
        isinstance(argument, Tensor) and argument.requires_grad for argument in _flat(arguments)
    )


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: str, kernel: Callable[..., Any], lengths: list[int | None], *flat: Any
    ) -> Any:
        ctx.save_for_backward(*(a for a in flat if isinstance(a, Tensor)))
        ctx.op, ctx.lengths = op, lengths
        ctx.others = [None if isinstance(a, Tensor) else (a,) for a in flat]
        return kernel(*_nested(list(flat), lengths))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{ctx.op} has no second derivative; call backward or grad without "
                "create_graph=True, or pass backend='reference'"
            )
        saved = iter(ctx.saved_tensors)
        flat = [next(saved) if other is None else other[0] for other in ctx.others]
        needed = ctx.needs_input_grad[3:]
        inputs = [a for a, needs in zip(flat, needed, strict=True) if needs]

        def differentiable(*values: Tensor) -> tuple[Tensor, ...]:
            left = iter(values)
            given = [next(left) if n else a for a, n in zip(flat, needed, strict=True)]
            results = as_tuple(OPS[ctx.op](*_nested(given, ctx.lengths)))
            return tuple(r for r in results if r.is_floating_point())

        results, pull_back, *_ = torch.func.vjp(differentiable, *inputs)
        floats = [g for g in upstream if g.is_floating_point()]
        found = iter(pull_back(tuple(g.to(r.dtype) for g, r in zip(floats, results, strict=True))))
        return None, None, None, *(next(found) if needs else None for needs in needed)


def with_gradients(op: str, kernel: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Calls ``kernel`` so that its results carry gradients to the floating-point arguments.

    The backward computes the reference anew, so it costs a float64 forward and its memory.
    """
    lengths = [len(a) if isinstance(a, list) else None for a in arguments]
    return _WithGradients.apply(op, kernel, lengths, *_flat(arguments))
