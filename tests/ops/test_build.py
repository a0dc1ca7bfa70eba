import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.cpp_extension

from rgtg_fast import _C, ops


def readelf(*options):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    return subprocess.check_output(["readelf", "-W", *options, _C.__file__], text=True).splitlines()


def test_needs_libtorch_but_no_cuda_library_and_no_libtorch_python():
    needed = [line.split("[")[1][:-1] for line in readelf("-d") if "(NEEDED)" in line]
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert not [name for name in needed if "cuda" in name or "python" in name]


def test_loads_without_cuda_because_cuda_symbols_are_weak():
    undefined = [line.split() for line in readelf("--dyn-syms") if " UND " in line]
    strong = {row[-1] for row in undefined if len(row) == 8 and row[4] == "GLOBAL"}
    assert not {name for name in strong if name.startswith(("cuda", "__cuda", "cu"))}
    assert "aoti_torch_get_current_cuda_stream" not in strong


def test_build_info_agrees_with_the_backends():
    built = _C.build_info()
    assert (built["cuda_archs"] is None) == (built["nvcc"] is None)
    if built["cuda_archs"] is None:
        assert "without nvcc" in ops.unavailable_reason("topk_logprobs", "cuda")


def test_the_binary_says_nothing_of_the_machine_that_built_it():
    """No symbols but those it is linked by, and no folder: neither the sources' nor the tools'."""
    sections = {word for line in readelf("-S") for word in line.split() if word.startswith(".")}
    assert ".dynsym" in sections
    assert not {name for name in sections if name == ".symtab" or name.startswith(".debug")}
    binary = Path(_C.__file__).read_bytes()
    root = Path(__file__).parents[2]
    for folder in (root, sys.prefix, torch.utils.cpp_extension.include_paths()[0]):
        assert f"{folder}/".encode() not in binary
    absolute = re.findall(rb"/[\w./-]+/(?:csrc|include)/[\w./-]+", binary)
    assert not absolute
