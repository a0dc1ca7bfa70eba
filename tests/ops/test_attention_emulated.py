"""candidate_attention in CUDA under the SIMT emulation, beyond the matrix; broken, it is found."""

import pytest
import torch
from cuda_emulated import FORWARD, Emulator, build
from marks import some_slow
from op_arguments import attention
from op_support import assert_no_worse
from parity import Backend, check_candidate_attention, torch_attention
from test_cuda_emulated import mutant

HALVES = (torch.bfloat16, torch.float16)


def emulated(processors=132, orders=(FORWARD,)):
    """The kernels on a device of so many multiprocessors."""
    emulator = Emulator(build(), orders)
    emulator.processors = processors
    ops = {"candidate_attention": emulator.candidate_attention}
    return Backend("cuda-emulated", "cpu", lambda: ops, tuple(ops))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("k", "heads"), [(1, 4), (10, 4), (3, 1)])
@pytest.mark.parametrize("processors", [1, pytest.param(132, marks=pytest.mark.slow)])
def test_one_split_of_many_tiles_and_many_splits(dtype, width, k, heads, processors):
    shape = (1, k, heads, 1, width, 333, [6], [331], None, None)
    check_candidate_attention(emulated(processors), *attention(dtype, *shape))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("width", [8, 24, 100, 131, 250])
def test_widths_that_no_tile_has(dtype, width):
    shape = (1, 6, 2, 1, width, 70, [3], [70], None, None)
    check_candidate_attention(emulated(), *attention(dtype, *shape))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("k", [1, 10])
def test_lengths_around_the_tiles(length, k):
    shape = (2, k, 4, 1, 64, 140, [0, 7], [length, length + 7], None, None)
    check_candidate_attention(emulated(1), *attention(torch.bfloat16, *shape))


@pytest.mark.parametrize("k", [16, 17, 64, 65, 100])
def test_numbers_of_queries_around_a_block_of_them(k):
    shape = (1, k, 1, 1, 64, 150, [0], [150], None, None)
    check_candidate_attention(emulated(), *attention(torch.bfloat16, *shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_caps_of_small_and_large_scores(dtype):
    for softcap in (1e-3, 0.3, 50.0, 1e4):
        shape = (1, 5, 2, 1, 64, 90, [0], [90], None, softcap)
        check_candidate_attention(emulated(), *attention(dtype, *shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_score_beyond_all_others_or_none_at_all(dtype):
    q, keys, values, *rest = attention(dtype, 1, 10, 1, 1, 64, 400, [0], [400], None, None)
    q[..., 0], keys[0, 0, :, :], keys[0, 0, 370, 0] = 1.0, 0.0, 1e30
    (got,) = emulated()("candidate_attention", q, keys, values, *rest)
    assert torch.equal(got, values[0, 0, 370].expand_as(got))
    keys[0, 0, 370, 0] = -1e30
    check_candidate_attention(emulated(), q, keys, values, *rest)


def test_nan_stays_in_its_row_and_head_or_slot():
    q, keys, values, *rest = attention(
        torch.bfloat16, 2, 10, 2, 2, 64, 300, [0, 0], [300, 300], None, None
    )
    q[1, 9, 0, 5], keys[0, 1, 170, 3] = float("nan"), float("nan")
    (got,) = emulated()("candidate_attention", q, keys, values, *rest)
    want = torch.zeros_like(got, dtype=torch.bool)
    want[1, 9, 0], want[0, :, 1] = True, True
    assert torch.equal(got.isnan(), want)


def test_the_number_of_splits_changes_nothing_but_rounding():
    given = attention(torch.float32, 1, 10, 4, 1, 128, 1000, [40], [990], None, None)
    exact = torch_attention(*(t.double() for t in given[:5]), *given[5:])
    for processors in (1, 3, 8, 132):
        (got,) = emulated(processors)("candidate_attention", *given)
        assert_no_worse(got, torch_attention(*given), exact, given[2].abs().max().item())


KERNELS, TILE, STATE = (f"attention_{name}.cuh" for name in ("kernels", "tile", "state"))
BARRIER = "__syncthreads();"
BROKEN = [
    ("the states of warps, read before they are written", KERNELS, BARRIER, "", 0),
    ("a tile used before all threads' copies have arrived", KERNELS, BARRIER, "", 1),
    ("a tile overwritten while others use it", KERNELS, BARRIER, "", 2),
    ("copies not waited for", KERNELS, "<Tile::kStages - 1>", "<Tile::kStages>", 0),
    ("copies of two tiles in one group", KERNELS, "    commit_copies();\n    wait", "    wait", 0),
    ("a ring with one stage less than is ahead", TILE, "tile % kStages", "tile % (kStages - 1)", 0),
    ("positions beyond the end", TILE, "first + key + i < count && d < a.width", "d < a.width", 0),
    ("the last tile's mask", TILE, ">= left", "> left", 0),
    ("values of a split that wrote none", KERNELS, "share == 0.0f || ", "", 0),
    ("the longest prefix", STATE, "if (end > a.prefix) end = a.prefix;", "", 0),
    ("a row outside the store", KERNELS, "store >= 0 && store < a.stores", "true", 0),
    ("the lanes of a row that have other columns", STATE, "__shfl_xor_sync(~0u, x, 2)", "x", 0),
]  # fmt: skip


def run_all(emulator):
    """Few queries and many, one split and several, rows that read nothing or nowhere."""

    def run(*arguments, rows=None):
        got = emulator.candidate_attention(*arguments, rows)
        exact = torch_attention(*(t.double() for t in arguments[:5]), *arguments[5:])
        if rows is None:
            assert_no_worse(got, torch_attention(*arguments), exact, 4.0)
        else:
            assert got[:1].isnan().all() and got[1:].isfinite().all()

    for processors in (1, 132):
        emulator.processors = processors
        for k in (1, 20):
            shape = (2, k, 2, 1, 64, 500, [3, 0], [600, 60], None, None)
            run(*attention(torch.bfloat16, *shape))
    shape = (2, 2, 2, 1, 64, 40, [0, 0], [40, 40], None, None)
    run(*attention(torch.bfloat16, *shape), rows=torch.tensor([2, 1]))


def test_the_cases_of_the_broken_kernels_pass_where_nothing_is_broken():
    run_all(Emulator(build()))


@pytest.mark.parametrize(
    ("file", "old", "new", "occurrence"),
    some_slow([b[1:] for b in BROKEN], 3, ids=[b[0] for b in BROKEN]),
)
def test_a_broken_kernel_is_found(tmp_path, file, old, new, occurrence):
    broken = mutant(tmp_path, file, old, new, occurrence)
    with pytest.raises(AssertionError):
        run_all(broken)
