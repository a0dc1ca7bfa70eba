"""What `make headers` says, without asking the index."""

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch_headers

INSTALLED = Path(torch.__file__).parent / "include"


def test_the_stable_abi_is_that_of_the_oldest_torch_claimed():
    (flag,) = torch_headers.load_setup().STABLE_ABI
    version = int(flag.rpartition("=")[2], 16)
    assert f"{version >> 56}.{version >> 48 & 255}" == torch_headers.claimed()
    readme = (torch_headers.ROOT / "README.md").read_text()
    assert f"torch {torch_headers.claimed()} and\nlater" in readme


def test_an_index_that_gives_no_torch_is_named_and_pip_is_quoted(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        torch_headers.IndexUnreachable, match=r"gave no torch==2\.10\.\*(.|\n)*No ma"
    ):
        torch_headers.wheel("torch==2.10.*")


def test_headers_of_the_stable_abi_are_taken_from_a_wheel_and_no_others(tmp_path, monkeypatch):
    names = ("torch/headeronly/a.h", "torch/csrc/stable/b.h", "ATen/c.h")
    with zipfile.ZipFile(tmp_path / "a wheel.whl", "w") as archive:
        for name in names:
            archive.writestr(f"torch/include/{name}", "")
    url = (tmp_path / "a wheel.whl").as_uri()
    monkeypatch.setattr(torch_headers, "wheel", lambda requirement: ("2.99.0", url))
    for _ in range(2):  # the second time they are there
        version, folder = torch_headers.headers("torch", tmp_path)
        found = {str(path.relative_to(folder)) for path in folder.rglob("*.h")}
        assert (version, found) == ("2.99.0", set(names[:2]))
    assert {path.name for path in tmp_path.iterdir()} == {"a wheel.whl", "2.99.0"}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["csrc/cpu/ratio_step.cpp", "csrc/cuda/ratio_step.cu"])
def test_a_name_that_the_headers_lack_is_found_in_host_code(file, tmp_path):
    """Every host file checks its arguments; the headers have that macro, and then not."""
    if file.endswith(".cu") and torch_headers.load_setup().cuda_home() is None:
        pytest.skip("nvcc is not installed")
    for folder in torch_headers.STABLE:
        part = folder.removeprefix("torch/include/")
        shutil.copytree(INSTALLED / part, tmp_path / part)
    checks = {file: torch_headers.commands(tmp_path)[file]}
    assert torch_headers.complaints(checks) == {}
    for path in tmp_path.rglob("*.h"):
        text = path.read_text()
        path.write_text(re.sub(r"#define STD_TORCH_CHECK\(", "#define ANOTHER_CHECK(", text))
    assert "STD_TORCH_CHECK" in torch_headers.complaints(checks)[file]


def test_what_does_not_compile_fails_the_step_by_version_and_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch_headers, "headers", lambda asked, cache: (asked, cache))
    commands = {"good.cpp": ["true"], "bad.cpp": ["false"]}
    monkeypatch.setattr(torch_headers, "commands", lambda folder: commands)
    assert torch_headers.main(tmp_path) == 1
    printed = capsys.readouterr().out
    oldest, newest = (f"torch{sign}{torch_headers.claimed()}" for sign in ("==", ">="))
    for version in (f"{oldest}.*", newest):
        assert f"bad.cpp does not compile against the headers of torch {version}" in printed
    assert "2 C++ and no CUDA source, as there is no nvcc; 1 do not compile" in printed
    commands["bad.cpp"] = ["true"]
    assert torch_headers.main(tmp_path) == 0
