"""What can be known of the CUDA build without a GPU."""

import os
import re
import subprocess

import pytest
from cuda_emulated import ROOT, SIMT
from parity import IN_CUDA
from sass import compile_kernels, resources, tool

from rgtg_fast import _C
from rgtg_fast.ops.dispatch import has_kernel

ARCHS = ("80", "90", "100", "120")  # WHEEL_ARCHS of the Makefile


def kernels_in(*paths):
    text = "".join(path.read_text() for path in paths)
    return set(re.findall(r"__global__ void[^;{]*?(\w+)\(\w+ \w", text))


ATTENTION = kernels_in(ROOT / "csrc/cuda/attention_kernels.cuh")
KERNELS = {
    "ops.cpp": kernels_in(*ROOT.glob("csrc/cuda/*.cuh")) - ATTENTION,
    "attention.cpp": ATTENTION,
}


@pytest.mark.parametrize(
    ("source", "arch"),
    [
        (source, arch)
        if (source, arch) == ("ops.cpp", "90")
        else pytest.param(
            *(source, arch), marks=pytest.mark.slow if arch == "90" else pytest.mark.exhaustive
        )
        for source in KERNELS
        for arch in ARCHS
    ],
)
def test_kernels_compile_without_spills_or_stack(source, arch, tmp_path):
    _, log = compile_kernels(tmp_path, arch, source=SIMT / source)
    assert KERNELS[source] and all(kernel in log for kernel in KERNELS[source])
    used = resources(log)
    assert len(used) >= len(KERNELS[source])
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
