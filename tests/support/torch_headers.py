"""Compiles every source against the headers of the oldest and the newest torch claimed.

``python tests/support/torch_headers.py CACHE`` (`make headers`). A wheel of torch is 0.5 to 1 GB
and brings gigabytes of CUDA with it; the index is asked for its address, and only the headers of
the stable ABI are read from it, a few hundred kilobytes. They are kept in CACHE. Any other header
of torch that a source came to include is missing there, which holds the sources to that ABI.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

ROOT = Path(__file__).parents[2]
STABLE = tuple(
    f"torch/include/torch/{folder}/"
    for folder in ("csrc/inductor/aoti_torch", "csrc/stable", "headeronly")
)


class IndexUnreachable(RuntimeError):
    """The package index gave no torch of the version asked for; the message says what pip said."""


def claimed() -> str:
    """The oldest torch that pyproject.toml claims, such as ``"2.10"``."""
    found = re.search(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None, "pyproject.toml names no oldest torch"
    return found.group(1)


def wheel(requirement: str) -> tuple[str, str]:
    """The version and the address of the wheel that pip would install for ``requirement``.

    Raises:
        IndexUnreachable: if pip finds none.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", requirement, "--quiet"]
        # Nothing is installed, so that the machine's limit on what may be does not hold.
        command += ["--dry-run", "--ignore-installed", "--no-deps", "--constraint", os.devnull]
        # Without this pip downloads the wheel where the index does not serve its metadata.
        command += ["--use-feature=fast-deps", "--report", str(report)]
        environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise IndexUnreachable(
                f"the package index gave no {requirement}, so nothing was compiled against its "
                f"headers; pip said:\n{done.stderr.strip()}"
            )
        (item,) = json.loads(report.read_text())["install"]
    return item["metadata"]["version"], item["download_info"]["url"]


def open_wheel(url: str) -> zipfile.ZipFile:
    """A wheel on disk, or on a server that is asked for parts of it."""
    if url.startswith("file:"):
        return zipfile.ZipFile(url2pathname(urlparse(url).path))
    from remotezip import RemoteZip  # `make headers` installs it; the tests of this file need none

    return RemoteZip(url)


def headers(requirement: str, cache: Path) -> tuple[str, Path]:
    """The version of torch and the folder of its headers, fetched unless it is in ``cache``."""
    version, url = wheel(requirement)
    folder = cache / version
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as partial, open_wheel(url) as archive:
            names = [name for name in archive.namelist() if name.startswith(STABLE)]
            assert names, f"{url.rpartition('/')[2]} holds no headers of the stable ABI"
            archive.extractall(partial, names)
            (Path(partial) / "torch" / "include").rename(folder)
    return version, folder


def load_setup() -> Any:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("rgtg_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


def commands(folder: Path) -> dict[str, list[str]]:
    """Source -> the command that checks it against the headers in ``folder``, with setup.py's own
    flags. nvcc stops at PTX: its front end has by then read all of the file, host code too."""
    setup = load_setup()
    built = setup.extension()
    installed = setup.cpp_extension.include_paths()
    includes = [path for path in built.include_dirs if path not in installed]
    includes += [str(folder), sysconfig.get_paths()["include"]]
    cxx = ["g++", "-fsyntax-only", *built.extra_compile_args["cxx"]]
    nvcc = [f"{setup.cuda_home()}/bin/nvcc", "-ptx", "-arch=sm_90", "-o", os.devnull]
    tools = {".cpp": cxx, ".cu": [*nvcc, *built.extra_compile_args["nvcc"]]}
    return {
        file: [*tools[Path(file).suffix], *(f"-I{path}" for path in includes), file]
        for file in built.sources
    }


def complaints(checks: dict[str, list[str]]) -> dict[str, str]:
    """Source -> what the compiler said, for every source whose command fails."""

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = zip(checks, pool.map(run, checks.values()), strict=True)
        return {file: result.stderr for file, result in done if result.returncode != 0}


def main(cache: Path) -> int:
    """Checks both versions and prints the verdict; the exit status."""
    cache.mkdir(parents=True, exist_ok=True)
    status = 0
    for requirement in (f"torch=={claimed()}.*", f"torch>={claimed()}"):
        version, folder = headers(requirement, cache)
        checks = commands(folder)
        failed = complaints(checks)
        for file, said in failed.items():
            print(f"{file} does not compile against the headers of torch {version}:\n{said}")
        kinds = [sum(file.endswith(suffix) for file in checks) for suffix in (".cpp", ".cu")]
        cuda = f"{kinds[1]} CUDA sources" if kinds[1] else "no CUDA source, as there is no nvcc"
        print(f"torch {version}: {kinds[0]} C++ and {cuda}; {len(failed)} do not compile")
        status |= bool(failed)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except IndexUnreachable as error:
        sys.exit(str(error))
