"""Which backend runs an op: what is there, what was asked for, and what ``"auto"`` means."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from . import crossover
from .foreign import has_kernel_for
from .gradients import wanted, with_gradients
from .registry import MAX_CANDIDATES, MAX_MIXED, OPS

Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
_COMPILED = {"cpp": ("CPU", "C++"), "cuda": ("CUDA", "CUDA")}  # dispatch key, name

try:
    from .. import _C

    missing_extension = None
except ImportError as error:  # a source tree that was never built
    _root = Path(__file__).parents[2]
    missing_extension = str(error)
    if (_root / "setup.py").is_file() and (_root / "csrc").is_dir():
        # It hides a package that is installed, from whoever begins Python in it.
        missing_extension = (
            f"{_root} holds the sources, which are not built; go elsewhere to use an installed "
            "rgtg_fast, or pip install --no-build-isolation -e . there"
        )


class BackendUnavailable(ValueError):
    """The backend asked for does not exist for this op on this device; the message says why."""


@functools.cache
def has_kernel(op: str, backend: str) -> bool:
    """Whether the extension, which must be there, holds a kernel of ``op``."""
    try:
        return has_kernel_for(f"rgtg_fast::{op}", _COMPILED[backend][0])
    except RuntimeError:  # no such operator
        return False


def _triton_reason(op: str) -> str | None:
    try:
        library = importlib.import_module("rgtg_fast.kernels.library")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install triton"
    if op not in library.KERNELS:
        return f"there is no Triton kernel of {op} in this version"
    if library.INTERPRETED or torch.cuda.is_available():
        return None
    return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"


def unavailable_reason(op: str, backend: str) -> str | None:
    """Why ``backend`` cannot run ``op`` in this installation, or None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_reason(op)
    if missing_extension is not None:
        return f"the compiled extension rgtg_fast._C cannot be imported ({missing_extension})"
    if backend == "cuda" and _C.build_info()["cuda_archs"] is None:
        return "the extension was built without nvcc"
    if not has_kernel(op, backend):
        return f"there is no {_COMPILED[backend][1]} kernel of {op} in this version"
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _devices(backend: str) -> tuple[str, ...]:
    if backend == "cpp":
        return ("cpu",)
    if backend == "triton":
        library = importlib.import_module("rgtg_fast.kernels.library")
        return ("cpu", "cuda") if library.INTERPRETED else ("cuda",)
    return ("cuda",)


@torch.compiler.assume_constant_result
def requested(backend: str) -> str:
    """``backend``, or what RGTG_BACKEND says in place of ``"auto"``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; pass one of {', '.join(BACKENDS)}")
    chosen = os.environ.get("RGTG_BACKEND", "auto") if backend == "auto" else backend
    if chosen not in BACKENDS:
        raise ValueError(
            f"RGTG_BACKEND={chosen!r} is unknown; set it to one of {', '.join(BACKENDS)}"
        )
    return chosen


@torch.compiler.assume_constant_result
def _check_available(op: str, backend: str, device: str) -> None:
    reason = unavailable_reason(op, backend)
    if reason is None and device not in _devices(backend):
        devices = " and ".join(_devices(backend))
        reason = f"it runs on {devices} tensors and these are on {device}"
    if reason is not None:
        raise BackendUnavailable(
            f"backend={backend!r} cannot run {op}: {reason}; pass backend='reference'"
        )


@torch.compiler.assume_constant_result
def _compiled_for(op: str, device: str) -> str:
    """The compiled backends of ``op`` that work on ``device``, separated by blanks."""
    if device == "cpu":
        return "cpp" if missing_extension is None and has_kernel(op, "cpp") else ""
    names = ("cuda", "triton") if device == "cuda" else ()
    return " ".join(name for name in names if unavailable_reason(op, name) is None)


def automatic(op: str, device: str, rows: int) -> str:
    """What ``"auto"`` is: C++ on a CPU, on a GPU the faster of CUDA C++ and Triton as far as they
    are there, and the reference where no compiled backend of the op exists for the device."""
    names = _compiled_for(op, device).split()
    if len(names) < 2:
        return names[0] if names else "reference"
    return crossover.faster(op, rows)


def settle(op: str, backend: str, device: str, rows: int) -> str:
    """The backend that runs this call; raises BackendUnavailable where the one asked for cannot."""
    chosen = requested(backend)
    if chosen == "auto":
        if missing_extension is None:
            return automatic(op, device, rows)
        # Without the extension "cpp" raises and says why; falling back to the reference would make
        # a CPU run slow in silence.
        chosen = "cpp" if device == "cpu" else automatic(op, device, rows)
    if chosen != "reference":
        _check_available(op, chosen, device)
    return chosen


def kernel(op: str, backend: Backend, device: torch.device, rows: int = 1) -> Callable[..., Any]:
    """The function behind ``op`` on a backend, for loops: it checks nothing.

    Takes the arguments of the op in order, per-row ones (beta, temperature, seed, position) as
    tensors ``[B]``, a bias as a tensor or None. A compiled one gives no gradients (torch warns in
    the backward). Raises BackendUnavailable as the op does.
    """
    chosen = settle(op, backend, device.type, rows)
    if chosen == "reference":
        return OPS[op]
    space = torch.ops.rgtg_fast_triton if chosen == "triton" else torch.ops.rgtg_fast
    return getattr(space, op).default


def _was_written(op: str, backend: str) -> bool:
    """Whether this version has a kernel of ``op`` in a compiled backend, usable here or not."""
    if backend == "triton":
        try:
            return op in importlib.import_module("rgtg_fast.kernels.library").KERNELS
        except ImportError:
            return True  # :func:`kernel` says that Triton is missing
    built = missing_extension is None and (backend == "cpp" or _C.build_info()["cuda_archs"])
    return not built or has_kernel(op, backend)


def kernel_or_auto(op: str, backend: Backend, device: torch.device) -> Callable[..., Any]:
    """:func:`kernel` for the ops of a loop that not every backend has.

    Where this version has no kernel of ``op`` at all in the backend asked for, by argument or by
    RGTG_BACKEND, ``"auto"`` runs it: one op less would rule the backend out for every call. A
    backend that has one and cannot run here raises BackendUnavailable.
    """
    chosen = requested(backend)
    if chosen not in ("auto", "reference") and not _was_written(op, chosen):
        chosen = automatic(op, device.type, rows=1)
    return kernel(op, chosen, device)  # type: ignore[arg-type]


def run(op: str, backend: Backend, *arguments: Any) -> Any:
    """Calls ``op`` on its backend, which is settled by the first argument's device and rows."""
    first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
    function = kernel(op, backend, first.device, first.shape[0])
    if function is not OPS[op] and wanted(arguments):
        return with_gradients(op, function, arguments)
    return function(*arguments)


def limit_k(k: int, op: str, backend: str, first: torch.Tensor) -> None:
    """The compiled kernels keep their candidates in registers, MAX_CANDIDATES at most."""
    if k <= MAX_CANDIDATES or settle(op, backend, first.device.type, 1) == "reference":
        return
    raise ValueError(
        f"k={k} candidates asked for but the compiled backends keep at most {MAX_CANDIDATES}; "
        f"pass k<={MAX_CANDIDATES} or backend='reference'"
    )


def limit_mixed(count: int, backend: str, first: torch.Tensor) -> None:
    """The compiled mix_logits takes its tensors as fields of a fixed number."""
    if count <= MAX_MIXED or settle("mix_logits", backend, first.device.type, 1) == "reference":
        return
    raise ValueError(
        f"logits has {count} tensors but the compiled backends mix at most {MAX_MIXED}; "
        f"pass n<={MAX_MIXED} or backend='reference'"
    )
