"""Compiles the Triton kernels to machine code without a GPU; prints one JSON line per launch.

Run as a program, in a process without TRITON_INTERPRET: the launchers run as they are, on CPU
tensors, against a driver that names a target and has no device.
"""

import json
import sys

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


def compile_only(self, grid, **kwargs):
    def launch(*args, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        record = {
            "kernel": self.__name__,
            "arch": kernel.metadata.target.arch,
            "cubin": len(kernel.asm["cubin"]),
            "shared": kernel.metadata.shared,
            "fma": kernel.asm["ptx"].count("fma.rn.f32"),
        }
        print(json.dumps(record), flush=True)

    return launch


run = JITFunction.run
JITFunction.__getitem__ = compile_only


def floats(dtype, *shape):
    return torch.randn(shape).to(dtype)


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
    if dtype == torch.float64:
        return
    prefix, own = floats(dtype, 2, 2, 600, head), floats(dtype, 2, k, 2, head)
    query = floats(dtype, 2, k, 8, head)
    for window, softcap in ((None, None), (128, 30.0)):
        arguments = (query, prefix, prefix, own, own, count, count, 0.1, window, softcap)
        ops.candidate_attention(*arguments)


if __name__ == "__main__":
    assert not library.INTERPRETED
    for capability in map(int, sys.argv[1].split(",")):
        triton.runtime.driver.set_active(Driver(capability))
        if capability == 90:
            launch_all(torch.bfloat16, 64, 4096, 151_936, 128)
            launch_all(torch.float32, 10, 4096, 32_000, 256)
            launch_all(torch.float64, 1, 100, 61, 64)
            launch_all(torch.float16, 10, 100, 1000, 64)
        else:
            launch_all(torch.bfloat16, 10, 4096, 151_936, 128)
