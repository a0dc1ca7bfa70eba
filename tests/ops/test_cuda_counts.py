"""What topk_logprobs costs an H200, counted in the machine code of sm_90: no GPU is needed.

An *item* is what one lane handles, so a warp instruction per item is one per 32 logits. In the
steady state, which is every tile of a slice but for its loads at the edge of a row, a lane executes
the loop over tiles once for kVectors vectors of 16 bytes: 32 items of bf16. Added is what the items
that pass the threshold cost, as often as random logits make a warp queue some, counted in the
emulation: the extra instructions of a tile of which one item passes, and one more round of the
inner loop for each further item of the busiest lane. That count holds the first tile, the keys kept
by the selection and those of the merge.
"""

import pytest
import torch
from cuda_emulated import PROCESSORS, emulator
from sass import compile_kernels, functions, loops, resources

pytestmark = pytest.mark.slow
VOCAB = 151_936
ISSUED = PROCESSORS * 4 * 1.98e3  # warp instructions a microsecond
REGISTERS, SHARED = 65536, 227 * 1024  # of a multiprocessor
THREADS, BLOCKS, VECTORS = 256, 4, 4  # of a block, per multiprocessor, per lane and tile
TYPES = {torch.bfloat16: "NS_4bf16E", torch.float16: "NS_4fp16E", torch.float32: "f"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """(code, resources) by name of function."""
    cubin, log = compile_kernels(tmp_path_factory.mktemp("sass"))
    return functions(cubin), resources(log)


def of_topk(named, dtype):
    (found,) = [named[name] for name in named if f"topk_kernelI{TYPES[dtype]}E" in name]
    return found


def tile_loop(code, items):
    """The loop over tiles, and in it the loop over the items of a lane that passed."""
    tiles = next(loop for loop in loops(code) if loop.holds("MUFU.EX2") >= items)
    queued = next(loop for loop in loops(code) if loop.body < tiles.body and loop.holds("ATOMS"))
    return tiles, queued


def costs(code, dtype):
    """Instructions of a tile of which nothing passes, of the first item that does, of a further."""
    items = VECTORS * 16 // dtype.itemsize
    tiles, queued = tile_loop(code, items)
    steady = tiles.executed(LDG_E_128=VECTORS, MUFU_EX2=items + 1)
    passed = tiles.executed(LDG_E_128=VECTORS, MUFU_EX2=items + 1, ATOMS=1)
    return steady, passed - steady, queued.executed(ATOMS=1)


def queueing(rows, k, dtype):
    """(warps that queued something, rounds of their loops) for one row of a batch of ``rows``."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(k)) * 3
    slicing = emulator().topk_slicing(dtype, rows, VOCAB)
    _, rounds, warps = emulator().topk_pushes(logits.to(dtype), k, slicing)
    return warps, rounds


def per_item(code, dtype, rows, k):
    """Warp instructions per item in the steady state and with what passes the threshold."""
    steady, first, further = costs(code, dtype)
    warps, rounds = queueing(rows, k, dtype)
    bare = steady / (VECTORS * 16 // dtype.itemsize)
    return bare, bare + (warps * first + (rounds - warps) * further) / (VOCAB / 32)


@pytest.mark.parametrize(("k", "most"), [(10, 16), (64, 24)])
@pytest.mark.parametrize("rows", [32, 64, 256])
def test_instructions_per_item(kernels, rows, k, most):
    bare, whole = per_item(of_topk(kernels[0], torch.bfloat16), torch.bfloat16, rows, k)
    print(f"B={rows} k={k}: {bare:.2f} steady, {whole:.2f} with what passes")
    print(f"issue floor {rows * VOCAB / 32 * whole / ISSUED:.1f} us")
    assert bare <= 8
    assert whole <= most


@pytest.mark.parametrize("dtype", TYPES)
def test_the_steady_loop_converts_each_item_once_and_waits_for_nothing(kernels, dtype):
    code = of_topk(kernels[0], dtype)
    items = VECTORS * 16 // dtype.itemsize
    tiles, _ = tile_loop(code, items)
    assert tiles.holds("MUFU.EX2") == items + 1  # and one for the sum so far
    assert tiles.holds("BAR") == tiles.holds("LDL") == tiles.holds("STL") == 0
    steady, _, _ = costs(code, dtype)
    assert steady / items <= (8 if dtype.itemsize == 2 else 9)


@pytest.mark.parametrize("dtype", TYPES)
def test_four_blocks_share_a_multiprocessor(kernels, dtype):
    registers, shared, spills, stack = of_topk(kernels[1], dtype)
    assert spills == stack == 0
    assert min(REGISTERS // (registers * THREADS), SHARED // (shared + 1024)) >= BLOCKS


@pytest.mark.parametrize("dtype", TYPES)
def test_one_row_runs_on_64_blocks_and_more_rows_in_one_wave(dtype):
    for rows in (1, 2, 8, 32, 64, 256):
        slices, stripes = emulator().topk_slicing(dtype, rows, VOCAB)
        blocks, items = rows * slices, slices * stripes * THREADS * 16 // dtype.itemsize
        assert 64 <= blocks <= BLOCKS * PROCESSORS
        assert items >= VOCAB
        if rows >= 32:
            assert blocks >= 0.9 * BLOCKS * PROCESSORS


@pytest.mark.parametrize(("rows", "k"), [(1, 10), (1, 64), (64, 64), (256, 64)])
def test_a_launch_moves_little_more_than_the_logits(rows, k):
    slices, _ = emulator().topk_slicing(torch.bfloat16, rows, VOCAB)
    kept = 1.5 * k * 8 + 32  # keys and the summary of a slice, written and read
    beside = rows * (slices * 2 * kept + k * 12)
    assert beside / (rows * VOCAB * 2) < (0.4 if rows == 1 else 0.05)
