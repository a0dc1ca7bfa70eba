import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_support import FLOATS, assert_no_worse, threads
from parity import backends_of
from scipy import stats

from rgtg_fast import ops

INF, NAN = float("inf"), float("nan")


def candidates(rows, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.log_softmax(torch.randn(rows, k, generator=generator) * 3, dim=1)
    rewards = torch.randn(rows, k, generator=generator)
    ids = torch.randint(0, 300_000, (rows, k), generator=generator)
    return logprobs, rewards, ids


def draw(logprobs, rewards, beta=1.0, temperature=1.0, seed=0, position=0, do_sample=True, **kw):
    ids = torch.arange(logprobs.shape[1]).expand(logprobs.shape).contiguous()
    return ops.ratio_sample(
        logprobs, rewards, ids, beta, temperature, seed, position, do_sample, **kw
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_slots_bit_identical_and_logq_no_worse_than_torch(data):
    rows, k = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 64))
    logprobs, rewards, ids = candidates(rows, k, seed=rows * k)
    if data.draw(st.booleans()):
        logprobs = logprobs.round()
    if data.draw(st.booleans()):
        logprobs[:, k // 2 + 1 :] = -INF
    dtype = data.draw(st.sampled_from(FLOATS))
    beta = data.draw(st.sampled_from([0.0, 1.0, -2.5, torch.rand(rows) * 3]))
    temperature = data.draw(st.sampled_from([1.0, 0.1, 3.7, torch.rand(rows) + 0.2]))
    args = (logprobs.to(dtype), rewards.to(dtype), ids, beta, temperature, 5, 17)
    for do_sample in (True, False):
        slot, logq = ops.ratio_sample(*args, do_sample, backend="cpp")
        want_slot, _ = ops.ratio_sample(*args, do_sample, backend="reference")
        assert torch.equal(slot, want_slot)
        scores = args[0].float() + torch.as_tensor(beta).reshape(-1, 1) * args[1].float()
        tempered = scores.double() / torch.as_tensor(temperature).float().double().reshape(-1, 1)
        exact = torch.log_softmax(tempered, dim=1)
        assert_no_worse(logq, torch.log_softmax(tempered.float(), dim=1), exact)


def test_million_draws_follow_the_ratio_policy():
    rows = 1_000_000
    logprobs = torch.tensor([[-0.4, -1.5, -3.0, -INF, -2.0, -5.5]])
    rewards = torch.tensor([[-1.0, 0.3, 1.2, 9.0, 0.0, 2.0]])
    slot, logq = draw(
        logprobs.expand(rows, -1),
        rewards.expand(rows, -1),
        beta=1.3,
        temperature=0.8,
        seed=torch.full((rows,), 2024),
        position=torch.arange(rows),
        backend="cpp",
    )
    probabilities = logq[0].double().exp().numpy()
    counts = np.bincount(slot.numpy(), minlength=6)
    assert counts[3] == 0
    possible = probabilities > 0
    expected = probabilities[possible] / probabilities[possible].sum() * rows
    assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


@pytest.mark.parametrize("neighbour", ["row", "position"])
def test_draws_are_independent_over_rows_and_positions(neighbour):
    count = 200_000
    flat = torch.zeros(count, 4)
    seed, position = ops.split_seed(1, count), 0
    if neighbour == "position":
        seed, position = torch.full((count,), 9), torch.arange(count)
    slot = draw(flat, flat, seed=seed, position=position)[0].numpy()
    table = np.zeros((4, 4))
    np.add.at(table, (slot[:-1], slot[1:]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_row_does_not_depend_on_the_batch_around_it():
    logprobs, rewards, ids = candidates(33, 10)
    seeds, positions = ops.split_seed(11, 33), torch.arange(33)
    with threads(3):
        slot, logq = ops.ratio_sample(logprobs, rewards, ids, 1.0, 1.0, seeds, positions, True)
    for row in range(33):
        one = slice(row, row + 1)
        alone = ops.ratio_sample(
            logprobs[one], rewards[one], ids[one], 1.0, 1.0, seeds[one], row, True
        )
        assert torch.equal(alone[0], slot[one]) and torch.equal(alone[1], logq[one])


def test_noise_follows_the_token_not_its_slot():
    logprobs, rewards, ids = candidates(50, 10)
    flip = torch.arange(9, -1, -1)
    slot = ops.ratio_sample(logprobs, rewards, ids, 1.0, 1.0, 3, 4, True)[0]
    flipped = ops.ratio_sample(
        logprobs[:, flip], rewards[:, flip], ids[:, flip], 1.0, 1.0, 3, 4, True
    )[0]
    assert torch.equal(slot, 9 - flipped)


@pytest.mark.parametrize("large", ["ids", "position", "seed"])
def test_the_high_word_of_each_counter_counts(large):
    logprobs, rewards, ids = candidates(200, 10)
    arguments = {"ids": ids, "seed": torch.arange(200), "position": torch.arange(200)}
    chosen = []
    for shift in (0, 2**40):
        changed = {**arguments, large: arguments[large] + shift}
        slots = [
            ops.ratio_sample(
                logprobs, rewards, **changed, beta=1.0, temperature=1.0, do_sample=True, backend=b
            )[0]
            for b in ("cpp", "reference")
        ]
        assert torch.equal(*slots)
        chosen.append(slots[0])
    assert not torch.equal(*chosen)


def test_int_seed_is_split_into_row_seeds():
    logprobs, rewards, ids = candidates(64, 10)
    split = ops.ratio_sample(
        logprobs, rewards, ids, 1.0, 1.0, ops.split_seed(5, 64), torch.full((64,), 2), True
    )
    whole = ops.ratio_sample(logprobs, rewards, ids, 1.0, 1.0, 5, 2, True)
    assert torch.equal(split[0], whole[0])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_greedy_ignores_the_noise_and_takes_the_first_of_ties(backend):
    logprobs = torch.tensor([[-2.0, -1.0, -1.0, -3.0]])
    for seed in range(20):
        slot, _ = draw(logprobs, torch.zeros(1, 4), seed=seed, do_sample=False, backend=backend)
        assert slot.tolist() == [1]


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_undefined_rows_get_slot_minus_one_and_leave_others_alone(backend, do_sample):
    logprobs = torch.full((7, 3), -1.0)
    rewards = torch.zeros(7, 3)
    logprobs[1, 2] = NAN
    rewards[2, 0] = NAN
    rewards[3, 1] = INF
    logprobs[4] = -INF
    rewards[5, 0] = -INF
    slot, logq = draw(logprobs, rewards, seed=torch.arange(7), do_sample=do_sample, backend=backend)
    assert (slot[1:5] == -1).all() and logq[1:5].isnan().all()
    assert slot[5] > 0 and logq[5, 0] == -INF
    good = torch.tensor([0, 5, 6])
    assert (slot[good] >= 0).all() and not logq[good].isnan().any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_zero_beta_times_infinite_reward_is_undefined(backend):
    rewards = torch.tensor([[INF, 0.0]])
    slot, _ = draw(torch.full((1, 2), -1.0), rewards, beta=0.0, backend=backend)
    assert slot.tolist() == [-1]


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("backend", backends_of("ratio_sample"))
def test_a_reward_of_minus_infinity_is_never_chosen_whatever_beta(backend, do_sample):
    """Neither 0 * -inf, which is NaN, nor -1 * -inf, which would be the best of all."""
    rows = 24
    logprobs = torch.tensor([[-0.01, -5.0, -6.0]]).expand(rows, -1)
    rewards = torch.tensor([[-INF, 0.5, -0.5]]).repeat(rows, 1)
    rewards[-1] = -INF
    logprobs = logprobs.where(torch.arange(rows)[:, None] != 1, NAN)  # still seen
    beta = torch.tensor([0.0, 1.0, -1.0]).repeat(rows // 3)
    ids = torch.arange(3).expand(rows, -1).contiguous()
    steps = torch.zeros(rows, dtype=torch.int64)
    per_row = beta, torch.ones(rows), torch.arange(rows), steps
    slot, logq = backend("ratio_sample", logprobs, rewards, ids, *per_row, do_sample)
    assert slot[1] == -1 and slot[-1] == -1
    good = torch.tensor([i for i in range(rows - 1) if i != 1])
    assert (slot[good] > 0).all() and (logq[good, 0] == -INF).all()
    want = (logprobs + beta[:, None] * rewards)[good, 1:].log_softmax(1)
    assert torch.allclose(logq[good, 1:], want, atol=1e-5)


def test_minus_infinity_cannot_be_chosen():
    logprobs = torch.tensor([[-INF, -50.0, -INF]]).expand(1000, -1)
    slot, logq = draw(logprobs, torch.zeros(1000, 3), seed=1)
    assert (slot == 1).all() and logq[0].tolist() == [-INF, 0.0, -INF]


def test_row_strided_inputs():
    logprobs, rewards, ids = candidates(20, 24)
    want = ops.ratio_sample(
        *(t[::2, ::3].contiguous() for t in (logprobs, rewards, ids)), 1.0, 1.0, 3, 4, True
    )
    got = ops.ratio_sample(*(t[::2, ::3] for t in (logprobs, rewards, ids)), 1.0, 1.0, 3, 4, True)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_split_seed_rows_are_distinct_and_do_not_depend_on_the_batch():
    seeds = ops.split_seed(-5, 1000)
    assert seeds.dtype == torch.int64 and seeds.unique().numel() == 1000
    assert torch.equal(ops.split_seed(-5, 3), seeds[:3])
    assert ops.split_seed(2**63 - 1, 1).shape == (1,) and ops.split_seed(-(2**63), 0).shape == (0,)
    assert not torch.equal(ops.split_seed(2**32, 4), ops.split_seed(0, 4))


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_seed_beyond_int64(seed):
    with pytest.raises(ValueError, match=r"does not fit in int64; pass one in -2\*\*63"):
        ops.split_seed(seed, 1)


@pytest.mark.parametrize(("backend", "compiler"), [("auto", "aot_eager"), ("reference", "eager")])
@pytest.mark.parametrize("per_row", [False, True])
def test_compiles_without_graph_breaks(backend, compiler, per_row):
    logprobs, rewards, ids = candidates(16, 10)
    rest = (1.5, 0.7, 3, 4)
    if per_row:
        betas, temperatures = torch.full((16,), 1.5), torch.full((16,), 0.7)
        rest = (betas, temperatures, ops.split_seed(3, 16), torch.full((16,), 4))

    def step(logprobs, rewards, ids):
        return ops.ratio_sample(logprobs, rewards, ids, *rest, True, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    got, want = compiled(logprobs, rewards, ids), step(logprobs, rewards, ids)
    assert torch.equal(got[0], want[0]) and torch.allclose(got[1], want[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0; pass a positive and finite number"),
        ({"temperature": torch.tensor([1.0, NAN])}, r"temperature=.* every element must be posi"),
        ({"beta": math.inf}, r"beta=inf; pass a finite number"),
        ({"beta": torch.ones(3)}, r"beta has shape \[3\]; pass \[2\]"),
        ({"rewards": torch.zeros(2, 4)}, r"rewards has shape \[2, 4\]; pass \[2, 3\]"),
        ({"ids": torch.zeros(2, 3)}, r"ids has dtype torch.float32; pass int64"),
        ({"seed": torch.zeros(2)}, r"seed has dtype torch.float32; pass int64"),
        ({"seed": 2**64}, r"seed=18446744073709551616 does not fit in int64"),
        ({"position": torch.zeros(1, dtype=torch.int64)}, r"position has shape \[1\]; pass \[2\]"),
        ({"logprobs": torch.zeros(2, 0)}, r"logprobs has no candidates"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(change, message):
    arguments = {
        "logprobs": torch.zeros(2, 3),
        "rewards": torch.zeros(2, 3),
        "ids": torch.zeros(2, 3, dtype=torch.int64),
        "beta": 1.0,
        "temperature": 1.0,
        "seed": 0,
        "position": 0,
        "do_sample": True,
    }
    with pytest.raises(ValueError, match=message):
        ops.ratio_sample(**{**arguments, **change})
