import pytest
import torch

from rgtg_fast import ops


def step_inputs(rows=3, k=5, width=40):
    generator = torch.Generator().manual_seed(rows * k)
    logprobs = torch.log_softmax(torch.randn(rows, k, generator=generator) * 3, dim=1)
    hidden = torch.randn(rows, k, width, generator=generator)
    weight = torch.randn(width, generator=generator) / width**0.5
    ids = torch.randint(0, 9000, (rows, k), generator=generator)
    return logprobs, hidden, weight, ids


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("do_sample", [True, False])
def test_is_reward_head_followed_by_ratio_sample(backend, do_sample):
    pytest.importorskip("triton")
    logprobs, hidden, weight, ids = step_inputs()
    policy = (2.0, 0.7, 11, 6, do_sample)
    slot, rewards, logq = ops.ratio_step(
        logprobs, hidden, weight, ids, *policy, bias=0.25, backend=backend
    )
    want = ops.reward_head(hidden, weight, 0.25, backend=backend)
    want_slot, want_logq = ops.ratio_sample(logprobs, want, ids, *policy, backend=backend)
    assert torch.equal(rewards, want) and torch.equal(logq, want_logq)
    assert torch.equal(slot, want_slot) and slot.dtype == torch.int64


def test_takes_half_precision_logprobs_and_per_row_arguments():
    logprobs, hidden, weight, ids = step_inputs()
    rows = torch.tensor([0.5, 1.0, 2.0])
    seeds, positions = torch.tensor([3, 4, 5]), torch.tensor([0, 9, 2])
    half = logprobs.to(torch.float16)
    got = ops.ratio_step(half, hidden, weight, ids, rows, rows, seeds, positions, True)
    want = ops.ratio_step(half.float(), hidden, weight, ids, rows, rows, seeds, positions, True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_reference_takes_any_k():
    inputs = step_inputs(k=100)
    _, hidden, weight, _ = inputs
    rewards = ops.ratio_step(*inputs, 1.0, 1.0, 0, 0, True, backend="reference")[1]
    assert torch.equal(rewards, ops.reward_head(hidden, weight, backend="reference"))
    with pytest.raises(ValueError, match=r"k=100 .* at most 64; pass k<=64 or backend='reference"):
        ops.ratio_step(*inputs, 1.0, 1.0, 0, 0, True)


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_compiles_without_graph_breaks(backend):
    pytest.importorskip("triton")

    def step(*inputs):
        return ops.ratio_step(*inputs, 1.5, 0.8, seeds, 3, True, backend=backend)

    inputs, seeds = step_inputs(), torch.arange(3)
    compiler = "eager" if backend == "reference" else "aot_eager"
    got = torch.compile(step, fullgraph=True, backend=compiler)(*inputs)
    for a, b in zip(got, step(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 4, 40)}, r"hidden has shape \[3, 4, 40\]; pass \[3, 5, H\]"),
        ({"weight": torch.zeros(41)}, r"weight has shape \[41\]; pass \[40\]"),
        ({"ids": torch.zeros(3, 5)}, r"ids has dtype torch.float32; pass int64"),
        ({"logprobs": torch.zeros(3, 0)}, r"logprobs has no candidates; pass \[B, k\] with k>=1"),
        ({"beta": float("nan")}, r"beta=nan; pass a finite number"),
        ({"temperature": 0.0}, r"temperature=0.0; pass a positive and finite number"),
        ({"bias": torch.zeros(2)}, r"bias has shape \[2\]; pass a number or one element"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(change, message):
    names = ("logprobs", "hidden", "weight", "ids")
    arguments = dict(zip(names, step_inputs(), strict=True))
    arguments |= {"beta": 1.0, "temperature": 1.0, "seed": 0, "position": 0, "do_sample": True}
    with pytest.raises(ValueError, match=message):
        ops.ratio_step(**{**arguments, **change})
