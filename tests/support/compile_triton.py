"""Compiles the Triton kernels to machine code without a GPU; prints one JSON line per launch.

Run as a program, in a process without TRITON_INTERPRET: the launchers run as they are, on CPU
tensors, against a driver that names a target and has no device.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial

import op_cases
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from rgtg_fast.kernels import library


class Driver:
    """A driver of the given compute capability that cannot launch anything."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):  # compiled kernels are kept by device
        return self.target.arch

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def stack_bytes(cubin):
    """What a thread spills of its registers, by the cuobjdump that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", text))


def compile_only(self, grid, **kwargs):
    def launch(*args, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        record = {
            "kernel": self.__name__,
            "arch": kernel.metadata.target.arch,
            "cubin": len(kernel.asm["cubin"]),
            "stack": stack_bytes(kernel.asm["cubin"]),
            "shared": kernel.metadata.shared,
            "fma": kernel.asm["ptx"].count("fma.rn.f32"),
        }
        print(json.dumps(record), flush=True)

    return launch


run = JITFunction.run


def launch(ops, **size):
    for op in ops:
        for arguments in op_cases.arguments(op, op_cases.Size(rows=2, prefix=600, **size)):
            getattr(torch.ops.rgtg_fast_triton, op)(*arguments)


if __name__ == "__main__":
    assert not library.INTERPRETED
    JITFunction.__getitem__ = compile_only
    for capability in map(int, sys.argv[1].split(",")):
        triton.runtime.driver.set_active(Driver(capability))
        every = partial(launch, library.KERNELS, heads=(8, 2))
        attention = partial(launch, ["candidate_attention"], heads=(8, 2))
        if capability == 90:
            every(dtype=torch.bfloat16, k=64, width=4096, vocab=151_936, head=128)
            every(dtype=torch.float32, k=10, width=4096, vocab=32_000, head=256)
            every(dtype=torch.float64, k=1, width=100, vocab=61, head=64)
            every(dtype=torch.float16, k=10, width=100, vocab=1000, head=64)
            attention(dtype=torch.float32, k=10, head=128)
            attention(dtype=torch.bfloat16, k=10, head=256)
        else:
            every(dtype=torch.bfloat16, k=10, width=4096, vocab=151_936, head=128)
