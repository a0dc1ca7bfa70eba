"""Schemas and result shapes of the ops, derived from `reference.OPS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import OPS

MAX_CANDIDATES = 64  # what a compiled kernel keeps in registers
MAX_MIXED = 4  # tensors that a compiled mix_logits takes


def schema(name: str) -> str:
    """The schema of an op without its name, such as ``(Tensor hidden, int k) -> Tensor``."""
    inferred = torch.library.infer_schema(OPS[name], mutates_args=())
    return inferred.replace("SymInt", "int")  # the kernels take plain integers


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _fake(name: str) -> Callable[..., Any]:
    def fake(*arguments: Any, **named: Any) -> Any:
        """The reference's shapes and dtypes, contiguous as every kernel leaves its results."""
        results = OPS[name](*arguments, **named)
        empty = tuple(t.new_empty(t.shape) for t in as_tuple(results))
        return empty if isinstance(results, tuple) else empty[0]

    return fake


def register_fakes(namespace: str) -> None:
    """Tells ``torch.compile`` what those ops return that ``torch.ops.<namespace>`` has."""
    for name in OPS:
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", _fake(name))
