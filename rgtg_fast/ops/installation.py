"""What this installation can do: versions, compilers, instruction sets, backends per op."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .dispatch import BACKENDS, BackendUnavailable, settle, unavailable_reason
from .registry import OPS


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def info() -> dict[str, Any]:
    """The facts behind :func:`show_config`.

    Returns:
        ``versions`` (name to version), ``build`` (compilers and CUDA architectures, or None where
        the extension is missing), ``simd`` (level in use and levels available), ``devices`` and
        ``backends``: op to backend to None where it works, or the reason why not.
    """
    build = simd = None
    if unavailable_reason("topk_logprobs", "cpp") is None:
        from .. import _C

        build = _C.build_info()
        simd = {"in use": _C.simd_level(), "available": _C.simd_levels()}
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "rgtg_fast": _version("rgtg_fast"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            "triton": _version("triton"),
        },
        "build": build,
        "simd": simd,
        "threads": torch.get_num_threads(),
        "devices": devices,
        "backends": {
            op: {
                backend: unavailable_reason(op, backend)
                for backend in BACKENDS
                if backend != "auto"
            }
            for op in OPS
        },
    }


def _chosen(op: str, device: str) -> str:
    """What "auto" is for a call of one row."""
    try:
        return settle(op, "auto", device, rows=1)
    except BackendUnavailable:
        return "an error"


def show_config() -> None:
    """Prints :func:`info`: what was built, and which backend of which op works here or why not."""
    facts = info()
    for name, value in facts["versions"].items():
        print(f"{name:14} {value}")
    build, simd = facts["build"], facts["simd"]
    if build is None:
        print(f"{'extension':14} missing: {unavailable_reason('topk_logprobs', 'cpp')}")
    else:
        print(f"{'extension':14} {build['compiler']}, built against torch {build['torch']}")
        cuda = f"nvcc {build['nvcc']} for {build['cuda_archs']}"
        print(f"{'CUDA kernels':14} {cuda if build['nvcc'] else 'none: built without nvcc'}")
        print(f"{'SIMD':14} {simd['in use']} (available: {', '.join(simd['available'])})")
    print(f"{'threads':14} {facts['threads']}")
    print(f"{'devices':14} {', '.join(facts['devices'])}")
    for op, backends in facts["backends"].items():
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        choices = ", ".join(f"{_chosen(op, kind)} on {kind}" for kind in kinds)
        print(f"{op} (auto: {choices})")
        for backend, reason in backends.items():
            print(f"  {backend:12} {'yes' if reason is None else 'no: ' + reason}")
