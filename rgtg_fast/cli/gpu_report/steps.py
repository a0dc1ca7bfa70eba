"""The steps of the report, in order: what each runs, for how long at most, and what it needs."""

from __future__ import annotations

import difflib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...ops.registry import OPS

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER = "compute-sanitizer"
GPU_TESTS = ("tests/ops/test_gpu.py", "tests/decode/test_gpu_graphs.py")
TESTS = "tests.xml"  # what pytest found, in the step's folder


@dataclass(frozen=True)
class Place:
    """Where a step runs: its own folder, the source tree if there is one, on the CPU or not."""

    folder: Path
    tree: Path | None
    dry: bool


@dataclass(frozen=True)
class Step:
    name: str  # "group" or "group.part"
    argv: Callable[[Place], list[str]]
    limit: float  # seconds, after which it is killed
    expected: float  # seconds; more than what is left of a budget: not begun
    tree: bool = True
    program: str | None = None  # that has to be installed, but for a dry run
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return self.name.split(".")[0]


def program(name: str) -> str | None:
    """A tool of the CUDA toolkit, by PATH or in the toolkit's usual places."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home, "bin")) for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def _python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def _pytest(place: Place, jobs: int, *arguments: str) -> list[str]:
    # "no:cacheprovider": the tree may be read-only, and other runs' last failures are not asked.
    common = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={place.folder / TESTS}"]
    jobs = min(jobs, os.cpu_count() or 1)
    if jobs > 1 and not place.dry and importlib.util.find_spec("xdist") is not None:
        common += ["-n", str(jobs)]
    return _python(
        *common, "-m", "not gpu and not slow and not exhaustive" if place.dry else "gpu", *arguments
    )


def _build(place: Place) -> list[str]:
    if place.dry:  # a build could change the package under what else runs here
        return _python("-m", "rgtg_fast", "info")
    return _python("setup.py", "--quiet", "build_ext", "--inplace")


def _environment(place: Place) -> list[str]:
    file = place.folder / "environment.json"
    return _python("-m", f"{__package__}.environment", file, "cpu" if place.dry else "cuda")


def _precompile(place: Place) -> list[str]:
    return _python("-m", f"{__package__}.precompile", *(["--dry-run"] if place.dry else []))


def _test_gpu(place: Place) -> list[str]:
    if place.dry:  # the emulation of capture and replay
        return _pytest(place, 1, "tests/decode/test_graph_emulated.py")
    return _pytest(place, 8, *GPU_TESTS)


def _microbench(op: str) -> Step:
    def argv(place: Place) -> list[str]:
        size = ["--device", "cuda"]
        if place.dry:
            size = ["--device", "cpu", "--cases", "1", "--repeat", "2"]
        file = place.folder / f"{op}_gpu.json"
        return _python("-m", "rgtg_fast", "bench", op, *size, "--json", file)

    return Step(f"microbench.{op}", argv, limit=150, expected=30, tree=False)


def _generate(batch: int, ks: Sequence[int], contenders: Sequence[str], expected: float) -> Step:
    def argv(place: Place) -> list[str]:
        size = ["--device", "cuda", "--prompt", 512, "--new", 64, "--repeats", 3, "--k", *ks]
        if place.dry:
            size = ["--quick", "--device", "cpu", "--new", 4, "--repeats", 1]
        asked = ["--shape", "llama-8b", *size, "--batch", batch, "--contenders", *contenders]
        file = place.folder / f"generate_b{batch}_gpu.json"
        return _python("bench/bench_generate.py", *asked, "--json", file)

    return Step(f"generate.b{batch}", argv, limit=2 * expected, expected=expected)


def _matrix(place: Place) -> list[str]:
    if place.dry:
        return _pytest(place, 1, "tests/ops/test_matrix.py", "-k", "test_reward_head_keeps_nan")
    others = [f"--ignore={file}" for file in GPU_TESTS]
    return _pytest(place, 8, "tests/ops", *others)


def _sanitizer(tool: str) -> Step:
    def argv(place: Place) -> list[str]:
        if place.dry:  # reads past the end, and threads in several orders, by the emulation
            file = "tests/ops/test_cuda_emulated.py"
            return _pytest(place, 1, file, "-k", "mixed_types or id_outside")
        tests = _pytest(place, 1, GPU_TESTS[0], "-k", "real_sizes")
        return [str(program(SANITIZER)), "--tool", tool, "--error-exitcode", "1", *tests]

    # The caching allocator hides overruns between tensors.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(
        f"sanitizer.{tool}", argv, limit=240, expected=90, program=SANITIZER,
        environment=environment,
    )  # fmt: skip


STEPS = (
    # The lines of the sources are for the sanitizer's reports.
    Step("build", _build, 400, 150, environment={"NVCC_APPEND_FLAGS": "-lineinfo"}),
    Step("environment", _environment, 60, 10, tree=False),
    Step("precompile", _precompile, 200, 60, tree=False),
    Step("test_gpu", _test_gpu, 300, 90),
    *(_microbench(op) for op in OPS),
    _generate(1, (10, 40), ("plain", "static", "auto", "head", "adapter"), 150),
    _generate(8, (10,), ("plain", "static", "auto", "adapter"), 120),
    _generate(32, (10,), ("plain", "auto"), 60),
    Step("matrix", _matrix, 400, 180),
    *(_sanitizer(tool) for tool in SANITIZERS),
)


def chosen(names: Sequence[str] | None) -> list[Step]:
    """The steps of these names or groups, in order; all for None.

    Raises:
        ValueError: naming one that does not exist, and the nearest that does.
    """
    if names is None:
        return list(STEPS)
    known = list(dict.fromkeys(n for step in STEPS for n in (step.group, step.name)))
    for name in names:
        if name not in known:
            alike = [n for n in known if ("." in n) == ("." in name)]
            begun = [n for n in known if name and n.startswith(name)]
            near = begun or difflib.get_close_matches(name, alike, n=1)
            groups = ", ".join(dict.fromkeys(step.group for step in STEPS))
            hint = f"did you mean {near[0]}?" if near else f"there are {groups}"
            raise ValueError(f"--only: no step {name[:80]!r}; {hint}")
    return [step for step in STEPS if step.name in names or step.group in names]
