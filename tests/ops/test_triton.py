"""The Triton kernels beyond the matrix: real compilation, loops over blocks, noise, operators."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marks import some_slow
from op_arguments import attention, draw_logits
from parity import BACKENDS, IN_TRITON, ROOT, check_candidate_attention, check_topk_logprobs

from rgtg_fast import ops
from rgtg_fast.ops import installation, reference

triton = pytest.importorskip("triton")
tl = triton.language
TRITON = next(b for b in BACKENDS if b.name == "triton-interpreted")
SUPPORT = Path(__file__).parents[1] / "support"
LAUNCHES = r"\b(_\w+)\[\(", r"\bLaunch\(\s*(_\w+)"  # as Triton launches, and by launch.py
LAUNCHED = {
    name
    for op in IN_TRITON
    for launches in LAUNCHES
    for name in re.findall(launches, (ROOT / "kernels" / f"{op}.py").read_text())
}


ONCE_ROUNDED = ("_ratio_sample", "_ratio_step", "_reward_head", "_mix_groups", "_mix_merge")


def kernels(name):
    return importlib.import_module(f"rgtg_fast.kernels.{name}")


def run_support(program, *arguments):
    """What a program of tests/support prints, a record for each line of JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT.parents[1]), *sys.path])
    command = [sys.executable, "-W", "ignore", str(SUPPORT / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


gumbel_from_word = kernels("gumbel").gumbel_from_word


@triton.jit
def _noise(words, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, gumbel_from_word(tl.load(words + at).to(tl.uint32)))


@pytest.mark.parametrize("archs", some_slow([("90",), ("80,100,120",)]))
def test_every_kernel_compiles_to_machine_code_without_a_gpu(archs):
    records = run_support("compile_triton.py", archs)
    assert {str(r["arch"]) for r in records} == set(archs.split(","))
    assert {r["kernel"] for r in records} == LAUNCHED
    for record in records:
        assert record["cubin"] > 0
        assert record["stack"] <= 32, f"registers are spilled: {record}"
        # 99 KiB is what a block may have on the smallest of these architectures.
        assert record["shared"] <= (99 if record["arch"] == 120 else 160) * 1024
        if record["kernel"] in ONCE_ROUNDED:
            assert record["fma"] == 0, "fused multiply-adds would turn sampled tokens"


def test_topk_over_several_chunks_of_groups(monkeypatch):
    monkeypatch.setattr(kernels("topk_logprobs"), "CHUNK", 8)
    check_topk_logprobs(TRITON, draw_logits("ties", 1, 6007).float(), 8)
    logits = draw_logits("normal", 2, 6007)
    logits[0, 6006] = float("nan")
    check_topk_logprobs(TRITON, logits, 5)


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 100])
def test_attention_over_several_splits_and_tiles_of_queries(monkeypatch, window):
    shape = (2, 40, 4, 1, 64, 500, [0, 300], [500, 420])
    check_candidate_attention(TRITON, *attention(torch.float32, *shape, window, None))
    monkeypatch.setattr(kernels("candidate_attention"), "MAX_SPLITS", 2)
    check_candidate_attention(TRITON, *attention(torch.float32, *shape, window, None))


@pytest.mark.slow
def test_no_kernel_is_compiled_anew_while_the_prefix_or_the_candidates_grow():
    (found,) = run_support("triton_host.py", "forms")
    assert found == {
        "candidate_attention k=10": {"_attend_prefix": 1, "_merge_self": 1},
        "candidate_attention k=1": {"_attend_prefix": 1, "_merge_self": 1},
        "reward_head k=33..64": {"_reward_head": 1},
        "ratio_sample k=33..64": {"_ratio_sample": 1},
        "ratio_step k=33..64": {"_ratio_step": 1},
        "vocab_reward k=1..64": {"_vocab_reward": 1},
    }


def test_splits_keep_a_gpu_busy_and_bounded():
    split_count = kernels("candidate_attention").split_count
    assert split_count(8192, 64) == 8
    assert split_count(8192, 8) == 33
    assert split_count(2048, 8) == 16
    assert split_count(1_000_000, 1) == 64
    assert split_count(0, 1) == split_count(0, 500) == 1


def test_noise_is_bit_identical_for_extreme_words():
    edges = torch.tensor([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 1257966796])
    words = torch.cat([edges, torch.randint(0, 2**32, (4088,))])
    out = torch.empty(4096)
    _noise[(1,)](words, out, 4096)
    assert torch.equal(out, reference.gumbel_from_word(words))


def test_compiles_without_graph_breaks():
    def two_ops(logits, hidden, weight):
        logprobs, ids = ops.topk_logprobs(logits, 3, backend="triton")
        return logprobs, ids, ops.vocab_reward(hidden, weight, ids, backend="triton")

    arguments = (torch.randn(2, 30), torch.randn(2, 9), torch.randn(30, 9))
    compiled = torch.compile(two_ops, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*arguments), two_ops(*arguments), strict=True):
        assert torch.equal(a, b)


def test_an_id_outside_the_vocabulary_is_nan_and_reads_nothing():
    ids = torch.tensor([[0, -1, 9, 2**40]])
    (rewards,) = TRITON("vocab_reward", torch.ones(1, 4), torch.ones(9, 4), ids)
    assert rewards[0, 0] == 4 and rewards[0, 1:].isnan().all()


def test_without_the_interpreter_cpu_tensors_are_an_error(monkeypatch):
    monkeypatch.setattr(kernels("library"), "INTERPRETED", False)
    with pytest.raises(ops.BackendUnavailable, match=r"'triton' cannot run topk_logprobs: .* on"):
        ops.topk_logprobs(torch.zeros(1, 4), 2, backend="triton")
    if not torch.cuda.is_available():
        assert "TRITON_INTERPRET=1" in installation.info()["backends"]["ratio_step"]["triton"]


@pytest.mark.slow
def test_kernels_are_interpreted_whatever_is_collected_before_them():
    """tests/decode has a conftest that imports transformers, which imports Triton."""
    files = ["tests/decode/test_rows.py", "tests/ops/test_triton.py"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", "several_chunks"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert "1 passed" in done.stdout, done.stdout[-3000:]
