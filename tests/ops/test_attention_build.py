"""What can be known of the speed of the CUDA kernel of candidate_attention without a GPU.

On an H200: 132 multiprocessors of 4 schedulers at 1.755 GHz, 4.8 TB/s.
"""

import pytest
from cuda_emulated import emulator
from sass import compile_kernels, functions, loops, resources

SOURCE = """
#include "cuda/attention_kernels.cuh"
namespace rgtg::cuda {{
template __global__ void attend_prefix<AttentionTile<bf16, 128, {warps}>>(AttentionArguments);
}}
"""
BYTES_PER_CYCLE = 4.8e12 / 132 / 1.755e9  # of memory, for one multiprocessor: 20.7
HMMA_CYCLES = 8  # of a scheduler's tensor core, for one m16n8k16: 2048 products at 256 a cycle


@pytest.fixture(scope="module", params=[1, 4], ids=["40 queries", "4 queries"])
def built(request, tmp_path_factory):
    """Registers, facts of the tile, and the loop over tiles."""
    folder = tmp_path_factory.mktemp("attention")
    source = folder / "attention.cpp"
    source.write_text(SOURCE.format(warps=request.param))
    cubin, log = compile_kernels(folder, source=source)
    ((registers, _, spills, stack),) = resources(log).values()
    assert spills == stack == 0
    (code,) = functions(cubin).values()
    loop = next(loop for loop in loops(code) if loop.holds("HMMA"))
    return registers, emulator().attention_tile(few=request.param > 1), loop


def blocks_at_once(registers, tile):
    per_warp = -(-registers * 32 // 256) * 256
    return min(65536 // (4 * per_warp), 228 * 1024 // (tile["bytes"] + 1024))


@pytest.mark.slow
def test_enough_bytes_are_in_flight(built):
    """By Little's law 75 % of the bandwidth at 1 us of latency takes 27 KB; 40 KB are wanted."""
    registers, tile, _ = built
    blocks = blocks_at_once(registers, tile)
    assert blocks == 3
    one_tile = 2 * tile["keys"] * 128 * 2
    assert (tile["stages"] - 1) * one_tile * blocks >= 90 * 1024
    assert tile["stages"] * one_tile >= 32 * 1024  # of a single block, while it waits


@pytest.mark.slow
def test_a_tile_is_worked_off_in_less_time_than_it_takes_to_read(built):
    _, tile, loop = built
    size = 2 * tile["keys"] * 128 * 2
    reading = size / BYTES_PER_CYCLE
    # A score and two products with the values, of 16 queries and the keys of one warp.
    products = 3 * tile["keys"] // (4 if tile["keys"] == 64 else 1) * 128 // (16 * 8)
    assert loop.executed(HMMA=products, LDGSTS=size // (128 * 16)) <= 0.65 * reading
    assert loop.holds("HMMA") == products and products * HMMA_CYCLES <= reading


def test_splits_fill_the_device_and_are_not_too_short():
    splits = emulator().library.simt_attention_splits
    assert splits(8, 2048, 132) == 16  # batch 1, 8 key heads: one block on each multiprocessor
    assert splits(64, 8192, 132) == 6  # batch 8: three
    assert splits(8, 200, 132) == 2
    assert splits(8, 0, 132) == splits(100_000, 8192, 132) == 1
    assert splits(1, 10**6, 132) == 64
