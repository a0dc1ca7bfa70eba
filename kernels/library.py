"""Registers the Triton kernels as ``torch.ops.rgtg_fast_triton.*`` on import.

``kernels/<op>.py`` holds the launcher ``<op>``; an op without such a module has no Triton kernel.
The schemas are those of ``torch.ops.rgtg_fast.*``. As operators the launches are opaque to
``torch.compile`` and can be captured; plain ``torch.library`` registration keeps the overhead of a
call at that of one Python callback.
"""

from importlib import import_module
from importlib.util import find_spec

import torch

from rgtg_fast.ops.registry import OPS, register_fakes, schema

from .launch import INTERPRETED

__all__ = ["INTERPRETED", "KERNELS"]

KERNELS = {
    op: getattr(import_module(f"{__package__}.{op}"), op)
    for op in OPS
    if find_spec(f"{__package__}.{op}") is not None
}

_library = torch.library.Library("rgtg_fast_triton", "DEF")
for _name, _launcher in KERNELS.items():
    _library.define(_name + schema(_name), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _launcher, "CPU")
    _library.impl(_name, _launcher, "CUDA")
register_fakes("rgtg_fast_triton")
