"""The CUDA kernels under the SIMT emulation, and that it finds what it is there to find."""

import functools
import shutil

import pytest
import torch
from cuda_emulated import FORWARD, OPS, ROOT, Emulator, build, emulator
from marks import some_slow
from op_support import FLOATS, assert_no_worse

from rgtg_fast import ops
from rgtg_fast.ops import reference

INF, NAN = float("inf"), float("nan")


def randn(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_topk(logits, k, op=OPS["topk_logprobs"]):
    logprobs, ids = op(logits, k)
    want, want_ids = reference.topk_logprobs(logits, k)
    assert torch.equal(ids, want_ids)
    exact = torch.log_softmax(logits.double(), dim=1).gather(1, want_ids)
    exact = torch.where(torch.isneginf(want), -INF, exact)
    torch_result = torch.log_softmax(logits.float(), dim=1).gather(1, want_ids)
    assert_no_worse(logprobs, torch_result, exact)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows, vocab, k", [(1, 40_009, 64), (3, 1031, 10), (2, 64, 64), (5, 1, 1)])
def test_topk_matches_the_reference(dtype, rows, vocab, k):
    assert_topk(randn(rows, vocab, seed=vocab).to(dtype), k)


@pytest.mark.parametrize("vocab, dtype", [(65_700, torch.float64), (150_003, torch.bfloat16)])
@pytest.mark.parametrize("k", [10, 64])
def test_topk_of_slices_that_hold_several_tiles(vocab, dtype, k):
    logits = randn(1, vocab).to(dtype)
    stripes = -(-vocab * dtype.itemsize // 4096)
    for slices in (1, 2):
        cut = functools.partial(OPS["topk_logprobs"], slicing=(slices, stripes // slices + 1))
        assert_topk(logits, k, cut)
        assert_topk(logits.sort(dim=1).values, k, cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("order", ["equal", "ascending", "descending", "two values"])
def test_topk_where_the_queue_overfills(order, dtype):
    row = {
        "equal": torch.zeros(20_000),
        "ascending": torch.arange(20_000.0) / 1000,
        "descending": -torch.arange(20_000.0) / 1000,
        "two values": (torch.arange(20_000) % 3 == 0).float(),
    }[order]
    assert_topk(row.to(dtype)[None], 64)


@pytest.mark.parametrize("offset", range(9))
def test_topk_of_rows_that_begin_unaligned(offset):
    base = randn(3, 1030).to(torch.bfloat16)
    base[:, :offset] = base[:, offset + 1003 :] = INF  # must not be seen
    assert_topk(base[:, offset : offset + 1003], 12)
    assert_topk(base.t().contiguous().t()[:, offset : offset + 1003], 12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_topk_of_infinities_and_nan(dtype):
    logits = randn(6, 5000).to(dtype)
    logits[0, 4990] = NAN
    logits[1, 17] = INF
    logits[2, 5:] = -INF
    logits[3] = -INF
    logits[4] = NAN
    assert_topk(logits, 40)


def test_topk_launched_again_on_the_same_workspace_with_the_same_token_as_graphs_do():
    inputs = [randn(3, 30_000, seed=seed).bfloat16() for seed in range(3)]
    for (logprobs, ids), logits in zip(emulator().topk_replays(inputs, 20), inputs, strict=True):
        want, want_ids = reference.topk_logprobs(logits, 20)
        assert torch.equal(ids, want_ids)
        torch.testing.assert_close(logprobs, want, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_token_left_for_the_next_replay_is_found(tmp_path):
    broken = mutant(tmp_path, "topk_logprobs.cuh", "slices.done[thread] = 0;", ";")
    with pytest.raises(AssertionError, match="different values"):
        list(broken.topk_replays([randn(3, 30_000, seed=seed) for seed in range(2)], 20))


def test_topk_of_a_row_does_not_depend_on_the_other_rows_or_the_slicing():
    logits = (randn(1, 40_000) * 4).round().half()
    want = OPS["topk_logprobs"](logits, 33)
    for slicing in [(1, 20), (2, 10), (3, 7), (10, 2), (20, 1)]:
        logprobs, ids = OPS["topk_logprobs"](logits, 33, slicing=slicing)
        assert torch.equal(ids, want[1])
        torch.testing.assert_close(logprobs, want[0], atol=1e-6, rtol=0)


def test_topk_where_most_logits_are_masked():
    logits = torch.full((2, 60_000), -INF).bfloat16()
    logits[0, ::6000], logits[1, 59_990:] = 1.0, torch.arange(10).bfloat16()
    for slicing in (None, (2, 15)):
        assert_topk(logits, 10, functools.partial(OPS["topk_logprobs"], slicing=slicing))
        assert_topk(logits, 64, functools.partial(OPS["topk_logprobs"], slicing=slicing))


def test_topk_of_one_likely_token_is_exact():
    logits = torch.full((1, 40_000), -50.0)
    logits[0, 39_000] = 50.0
    for slicing in (None, (1, 40)):
        assert OPS["topk_logprobs"](logits, 1, slicing=slicing)[0].item() == 0.0


def test_what_exceeds_a_bound_is_what_is_ordered_after_it():
    floats = [-INF, -3.4e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3.4e38, INF, NAN]
    codes = emulator().ordered(floats)
    assert codes == sorted(codes) and codes[4] == codes[5]
    edges = [edge for code in codes for edge in (code - 1, code, code + 1) if edge < 2**32]
    for edge in [0, 1, *edges]:
        above = emulator().exceeds(floats, edge)
        expected = [code > edge for code in codes]
        expected[-1] = True  # a NaN is always looked at
        assert above == expected, hex(edge)


def test_dots_agree_between_ops_bit_for_bit():
    hidden, weight, ids = randn(4, 13, 257), randn(257), torch.arange(13).repeat(4, 1)
    rewards = OPS["reward_head"](hidden, weight)
    for row in range(4):
        gathered = OPS["vocab_reward"](weight[None], hidden[row], ids[row : row + 1])
        assert torch.equal(gathered[0], rewards[row])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 7, 64, 513, 4096])
def test_reward_head_is_no_worse_than_torch(dtype, width):
    hidden, weight = randn(2, 9, width).to(dtype), randn(width, seed=1).to(dtype)
    bias = torch.tensor([0.25], dtype=dtype)
    got = OPS["reward_head"](hidden, weight, bias)
    exact = hidden.double() @ weight.double() + 0.25
    scale = (hidden.double().abs() @ weight.double().abs()).max().item()
    assert_no_worse(got, hidden @ weight + bias, exact, scale)


@pytest.mark.parametrize("other", FLOATS)
def test_dots_of_mixed_types_and_odd_strides(other):
    base, table = randn(3, 11, 65).to(torch.bfloat16), randn(40, 67).to(other)
    hidden, weight = base[:, ::2, 1:64], randn(63, seed=2).to(other)
    exact = hidden.double() @ weight.double()
    torch.testing.assert_close(
        OPS["reward_head"](hidden, weight).double(), exact, rtol=1e-6, atol=1e-4
    )
    ids = torch.tensor([[0, 39, 7], [7, 7, 1], [2, 3, 4]])
    got = OPS["vocab_reward"](hidden[:, 0], table[:, 3:66], ids)
    want = reference.vocab_reward(hidden[:, 0], table[:, 3:66], ids)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-4)


def test_an_id_outside_the_vocabulary_gives_nan_and_reads_nothing():
    got = OPS["vocab_reward"](randn(1, 8), randn(4, 8), torch.tensor([[0, 4, -1, 3, 2**40]]))
    assert torch.isnan(got).tolist() == [[False, True, True, False, True]]


def candidates(rows, k):
    logprobs = torch.log_softmax(randn(rows, k), dim=1)
    ids = torch.randint(0, 300_000, (rows, k), generator=torch.Generator().manual_seed(2))
    beta, temperature = torch.rand(rows) * 3, torch.rand(rows) + 0.2
    return logprobs, ids, (beta, temperature, ops.split_seed(5, rows), torch.arange(rows))


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("rows, k", [(1, 1), (7, 10), (33, 64), (2, 200)])
def test_slots_and_steps_match_the_reference(rows, k, do_sample):
    logprobs, ids, settings = candidates(rows, k)
    logprobs[:, k // 2 + 1 :] = -INF
    hidden, weight, bias = randn(rows, k, 40), randn(40, seed=1, scale=0.1), torch.ones(1)
    slot, rewards, logq = OPS["ratio_step"](
        logprobs, hidden, weight, ids, *settings, do_sample, bias
    )
    assert torch.equal(rewards, OPS["reward_head"](hidden, weight, bias))
    drawn = OPS["ratio_sample"](logprobs, rewards, ids, *settings, do_sample)
    assert torch.equal(slot, drawn[0]) and torch.equal(logq, drawn[1])
    want = reference.ratio_sample(logprobs, rewards, ids, *settings, do_sample)
    assert torch.equal(slot, want[0])
    torch.testing.assert_close(logq, want[1], rtol=2e-7, atol=2e-7)


def test_undefined_rows_have_no_slot_and_nan_logq():
    logprobs, ids, settings = candidates(5, 10)
    rewards = randn(5, 10)
    rewards[0, 3], rewards[1, 9] = NAN, INF
    logprobs[2] = -INF
    settings[1][3] = 0.0
    slot, logq = OPS["ratio_sample"](logprobs, rewards, ids, *settings, True)
    want = reference.ratio_sample(logprobs, rewards, ids, *settings, True)
    assert torch.equal(slot, want[0]) and slot[:3].tolist() == [-1, -1, -1]
    assert torch.equal(torch.isnan(logq), torch.isnan(want[1]))


def test_noise_is_bit_identical_over_a_long_stream():
    rows = 4096
    flat, ids = torch.zeros(rows, 16), torch.arange(rows * 16).reshape(rows, 16) * 19
    settings = (torch.ones(rows), torch.ones(rows), ops.split_seed(3, rows), torch.arange(rows))
    emulated = Emulator(build(), orders=[FORWARD]).ratio_sample(flat, flat, ids, *settings, True)
    assert torch.equal(emulated[0], reference.ratio_sample(flat, flat, ids, *settings, True)[0])


@pytest.mark.parametrize(
    "op, arguments, shape",
    [
        ("topk_logprobs", (torch.empty(0, 9), 3), (0, 3)),
        ("reward_head", (torch.empty(2, 0, 4), torch.empty(4)), (2, 0)),
        ("vocab_reward", (torch.empty(0, 4), torch.empty(9, 4), torch.empty(0, 3).long()), (0, 3)),
    ],
)
def test_empty_batches(op, arguments, shape):
    out = OPS[op](*arguments)
    assert (out[0] if isinstance(out, tuple) else out).shape == shape


def mutant(tmp_path, file, old, new, occurrence=0):
    """The emulator of a copy of the sources in which one piece of text is replaced."""
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = csrc / "cuda" / file
    pieces = path.read_text().split(old)
    assert len(pieces) > occurrence + 1, f"{file} has no such text any more"
    halves = [old.join(pieces[: occurrence + 1]), old.join(pieces[occurrence + 1 :])]
    path.write_text(new.join(halves))
    return Emulator(build(csrc))


BARRIER, WARP_BARRIER, FENCE = "__syncthreads();", "__syncwarp();", "__threadfence();"
MISSING_BARRIERS = [
    ("select.cuh", BARRIER, 0, "block_reduce"),
    ("select.cuh", BARRIER, 1, "Rounds::sum"),
    ("select.cuh", BARRIER, 2, "Queue::settle, before the count is read"),
    ("select.cuh", BARRIER, 3, "Queue::settle, before others push again"),
    ("select.cuh", BARRIER, 4, "shrink, before keys are overwritten"),
    ("select.cuh", BARRIER, 5, "shrink, before the kept keys are used"),
    ("topk_logprobs.cuh", BARRIER, 0, "scan_slice, before stripes are queued again"),
    ("topk_logprobs.cuh", BARRIER, 1, "merge_slices, before slices are queued again"),
    ("last_block.cuh", FENCE, 0, "before the token is left"),
    ("last_block.cuh", WARP_BARRIER, 0, "before the tokens are looked for"),
    ("last_block.cuh", FENCE, 1, "before the tokens are looked for"),
    ("last_block.cuh", FENCE, 2, "before what others wrote is read"),
    ("last_block.cuh", BARRIER, 0, "before all threads know who is last"),
    ("dot.cuh", BARRIER, 0, "candidate_dots, before the second half is used"),
    ("dot.cuh", BARRIER, 1, "candidate_dots, before the next round"),
]


def test_every_barrier_and_fence_has_its_mutation():
    found = {
        (path.name, text, occurrence)
        for path in (ROOT / "csrc/cuda").glob("*.cuh")
        if "attention" not in path.name  # tests/ops/test_attention_emulated.py has those
        for text in (BARRIER, WARP_BARRIER, FENCE)
        for occurrence in range(path.read_text().count(text))
    }
    # prefix_bt_loss has none of its own; its sums' barrier is block_reduce's, with a test below.
    assert found == {mutation[:3] for mutation in MISSING_BARRIERS}


@pytest.mark.parametrize("file, barrier, occurrence, where", some_slow(MISSING_BARRIERS, 3))
def test_a_missing_barrier_is_found(tmp_path, file, barrier, occurrence, where):
    broken = mutant(tmp_path, file, barrier, "", occurrence)
    with pytest.raises(AssertionError):
        if file == "dot.cuh":
            hidden, weight = randn(2, 30, 64), randn(64)
            logprobs, ids, settings = candidates(2, 30)
            got = broken.ratio_step(logprobs, hidden, weight, ids, *settings, True)
            assert torch.equal(got[1], OPS["reward_head"](hidden, weight))
        else:
            for logits, slicing in selections():
                assert_topk(logits, 64, functools.partial(broken.topk_logprobs, slicing=slicing))


def selections():
    """Logits and slicings (slices, stripes) that go through every part of the selection."""
    yield randn(1, 20_000), None
    yield randn(2, 50_000).bfloat16(), (2, 13)
    yield torch.zeros(1, 20_000), (4, 5)
    yield torch.zeros(1, 20_000, dtype=torch.float64), None
    yield randn(1, 40_000).sort(dim=1).values, (2, 20)


BROKEN_BOUNDS = [
    ("topk_tile.cuh", "position >= begin && position + Vector<T>::kWidth <= end", "true"),
    ("topk_tile.cuh", "position >= begin && position < end", "position <= end"),
    ("topk_tile.cuh", "position + kTileItems<T> <= end", "position <= end"),
    ("vocab_reward.cuh", "id < 0 || id >= a.vocab", "false"),
    ("ratio_sample.cuh", "row < a.rows", "true"),
]


@pytest.mark.parametrize("file, old, new", some_slow(BROKEN_BOUNDS))
def test_a_read_outside_the_buffers_is_found(tmp_path, file, old, new):
    broken = mutant(tmp_path, file, old, new)
    with pytest.raises(AssertionError, match="reached outside"):
        if file == "topk_tile.cuh":
            broken.topk_logprobs(randn(1, 20_001), 10, slicing=(2, 10))
        elif file == "ratio_sample.cuh":
            logprobs, ids, settings = candidates(3, 600)
            broken.ratio_sample(logprobs, logprobs, ids, *settings, True)
        else:
            broken.vocab_reward(randn(1, 1029), randn(9, 1029), torch.tensor([[8, 9]]))


@pytest.mark.slow
def test_a_read_past_the_end_of_a_row_is_found(tmp_path):
    broken = mutant(tmp_path, "dot.cuh", "i + kWidth <= length", "i < length")
    hidden, weight = randn(1, 2, 1032)[..., :1029], randn(1029)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(broken.reward_head(hidden, weight), hidden @ weight)


def pair_loss(op, len_chosen, width=300):
    lengths = torch.tensor([len_chosen]), torch.tensor([width - 10])
    vectors = randn(width, seed=3).abs(), torch.zeros(1)
    return op(randn(1, width), randn(1, width, seed=1), *lengths, *vectors, 0.1, 0.1, 2)


@pytest.mark.slow
def test_a_missing_barrier_in_the_sums_of_a_pair_is_found(tmp_path):
    broken = mutant(tmp_path, "select.cuh", BARRIER, "")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            pair_loss(broken.prefix_bt_loss, 20), pair_loss(OPS["prefix_bt_loss"], 20)
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "occurrence", "length"),
    [(" || end > a.width", "", 0, 302), ("at < a.width", "at <= a.width", 1, 20)],
)
def test_a_pair_that_reaches_outside_is_found(tmp_path, old, new, occurrence, length):
    broken = mutant(tmp_path, "prefix_bt_loss.cuh", old, new, occurrence)
    assert pair_loss(OPS["prefix_bt_loss"], length)[0].isnan() == (length != 20)
    with pytest.raises(AssertionError, match="reached outside"):
        pair_loss(broken.prefix_bt_loss, length)
