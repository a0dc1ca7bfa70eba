"""What can be known of the CUDA build without a GPU."""

import os
import re
import subprocess

import pytest
from cuda_emulated import ROOT
from parity import IN_CUDA
from sass import compile_kernels, resources, tool

from rgtg_fast import _C
from rgtg_fast.ops.dispatch import has_kernel

ARCHS = ("80", "90", "100", "120")  # WHEEL_ARCHS of the Makefile
KERNELS = {
    name
    for path in ROOT.glob("csrc/cuda/*.cuh")
    for name in re.findall(r"__global__ void[^;{]*?(\w+)\(\w+ \w", path.read_text())
}


@pytest.mark.parametrize(
    "arch",
    [arch if arch == "90" else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS],
)
def test_kernels_compile_without_spills_or_stack(arch, tmp_path):
    _, log = compile_kernels(tmp_path, arch)
    assert all(kernel in log for kernel in KERNELS)
    used = resources(log)
    assert len(used) >= len(KERNELS)
    for name, (_, _, spills, stack) in used.items():
        assert spills == stack == 0, name


def test_kernels_include_no_torch_header():
    for path in [
        *ROOT.glob("csrc/*.h"),
        *ROOT.glob("csrc/cuda/*.cuh"),
        ROOT / "csrc/cuda/launch.h",
    ]:
        assert "torch/" not in path.read_text(), path.name


@pytest.mark.skipif(_C.build_info()["cuda_archs"] is None, reason="built without nvcc")
@pytest.mark.parametrize("op", IN_CUDA)
def test_every_cuda_source_gives_its_op_a_kernel(op):
    assert has_kernel(op, "cuda")


@pytest.mark.skipif(_C.build_info()["cuda_archs"] is None, reason="built without nvcc")
def test_the_binary_holds_every_architecture_it_claims():
    listing = subprocess.check_output(
        [tool("cuobjdump"), "--list-elf", os.fspath(_C.__file__)], text=True
    )
    for arch in _C.build_info()["cuda_archs"].replace("+PTX", "").split():
        assert f"sm_{arch.replace('.', '')}" in listing
