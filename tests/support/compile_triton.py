"""Compiles the Triton kernels to machine code without a GPU; prints one JSON line per launch.

Run as a program, in a process without TRITON_INTERPRET: the launchers run as they are, on CPU
tensors, against a driver that names a target and has no device.
"""

import json
import re
import subprocess
import sys
import tempfile

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
JITFunction.__getitem__ = compile_only


def floats(dtype, *shape):
    return torch.randn(shape).to(dtype)


def launch_attention(dtype, k, head, window, softcap):
    prefix, own = floats(dtype, 2, 2, 600, head), floats(dtype, 2, k, 2, head)
    count = torch.zeros(2, dtype=torch.int64)
    arguments = (floats(dtype, 2, k, 8, head), prefix, prefix, own, own, count, count)
    torch.ops.rgtg_fast_triton.candidate_attention(*arguments, 0.1, window, softcap)


def launch_all(dtype, k, width, vocab, head):
    ids, one = torch.zeros(2, k, dtype=torch.int64), torch.ones(2)
    count = torch.zeros(2, dtype=torch.int64)
    policy = (one, one, count, count)
    ops = torch.ops.rgtg_fast_triton
    ops.topk_logprobs(floats(dtype, 2, vocab), k)
    hidden, weight = floats(dtype, 2, k, width), floats(dtype, width)
    ops.reward_head(hidden, weight)
    ops.vocab_reward(hidden[:, 0], floats(dtype, 64, width), ids)
    ops.ratio_sample(torch.randn(2, k), torch.randn(2, k), ids, *policy, False)
    ops.ratio_step(torch.randn(2, k), hidden, weight, ids, *policy, True, weight[:1])
    own = torch.float64 if dtype == torch.float64 else torch.float32
    pair = (floats(dtype, 2, width), floats(dtype, 2, width), count, count)
    ops.prefix_bt_loss(*pair, floats(own, width), floats(own, 2), 0.1, 0.1, 1)
    if dtype == torch.float64:
        return
    launch_attention(dtype, k, head, None, None)
    launch_attention(dtype, k, head, 128, 30.0)


if __name__ == "__main__":
    assert not library.INTERPRETED
    for capability in map(int, sys.argv[1].split(",")):
        triton.runtime.driver.set_active(Driver(capability))
        if capability == 90:
            launch_all(torch.bfloat16, 64, 4096, 151_936, 128)
            launch_all(torch.float32, 10, 4096, 32_000, 256)
            launch_all(torch.float64, 1, 100, 61, 64)
            launch_all(torch.float16, 10, 100, 1000, 64)
            launch_attention(torch.float32, 10, 128, None, None)
            launch_attention(torch.bfloat16, 10, 256, None, None)
        else:
            launch_all(torch.bfloat16, 10, 4096, 151_936, 128)
