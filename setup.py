"""Builds rgtg_fast._C: one extension on torch's stable ABI for CPU-only and CUDA torch alike.

RGTG_CUDA=0 leaves the CUDA kernels out; TORCH_CUDA_ARCH_LIST chooses their architectures.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import find_packages, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10


def cuda_home() -> Path | None:
    """The toolkit that holds nvcc. A CPU-only torch does not look for one, so this does."""
    if os.environ.get("RGTG_CUDA") == "0":
        return None
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for home in candidates:
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home)
    return None


def nvcc_version(home: Path) -> str:
    text = subprocess.check_output([str(home / "bin" / "nvcc"), "--version"], text=True)
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "unknown"


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def extension():
    # Error messages name their source file: below the root or the include folder, not where those
    # lay on the machine that built.
    # The last that fits counts, and an environment may lie below the root.
    folders = [str(ROOT), *cpp_extension.include_paths(), pybind11.get_include()]
    no_paths = [f"-ffile-prefix-map={folder}/=" for folder in folders]
    common = ["-O3", "-std=c++20", *STABLE_ABI]
    # The sampler's noise is bit-identical on every backend only if no multiply-add is fused.
    cxx = [*common, *no_paths, "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
    cxx += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # in GCC 12's own intrinsics
    cxx += [f"-DRGTG_BUILD_TORCH={torch.__version__}"]
    nvcc: list[str] = []
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    # Listed as needed though unused, so that the weak CUDA stream symbol resolves on a CUDA torch.
    link = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--strip-all"]
    include = [str(ROOT / "csrc"), pybind11.get_include()]  # before torch's own copy of pybind11
    home = cuda_home()
    if home:
        cpp_extension.CUDA_HOME = str(home)
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0").replace(";", " ")
        cxx += [f"-DRGTG_CUDA_ARCHS={archs}", f"-DRGTG_NVCC={nvcc_version(home)}"]
        # No -lineinfo: it writes the path of every source into the device code. To profile, set
        # NVCC_APPEND_FLAGS=-lineinfo.
        nvcc = [*common, "-DUSE_CUDA", "-Xcompiler", ",".join(no_paths)]
        files += sources("csrc/cuda/*.cu")
        include.append(str(home / "include"))
        link += [f"-L{home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    ext = cpp_extension.CppExtension(
        "rgtg_fast._C",
        files,
        include_dirs=include,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
    )
    ext.libraries = []  # torch_python is outside the stable ABI
    return ext


if __name__ == "__main__":  # tests/support/torch_headers.py reads the extension
    # nvcc 13 could not build beside torch 2.10, which is of CUDA 12.8: BuildExtension compares the
    # two. Nothing of torch's CUDA is linked, so this builds as beside a torch without one.
    torch.version.cuda = None
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": cpp_extension.BuildExtension},
        packages=[*find_packages(include=["rgtg_fast", "rgtg_fast.*"]), "rgtg_fast.kernels"],
        package_dir={"rgtg_fast.kernels": "kernels"},
    )
