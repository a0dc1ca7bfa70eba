import pytest
import torch
from op_cases import Size, arguments

from rgtg_fast import ops


def test_what_is_kept_holds_every_choice_for_rewards_within_the_bounds():
    logprobs, ids, *policy, sample, _, _ = arguments("ratio_keep", Size(rows=40, k=12))[0]
    low, high = -0.2, 0.1
    kept = ops.ratio_keep(logprobs, ids, *policy, sample, low, high)
    assert kept.any(dim=1).all() and not kept.all()
    for turn in range(20):
        noise = torch.Generator().manual_seed(turn)
        rewards = low + (high - low) * torch.rand(logprobs.shape, generator=noise)
        slot, _ = ops.ratio_sample(logprobs, rewards, ids, *policy, sample)
        assert kept.gather(1, slot[:, None]).all()


def test_equal_bounds_leave_the_one_that_ratio_sample_chooses():
    logprobs, ids, *policy, sample, _, _ = arguments("ratio_keep", Size(rows=9))[0]
    kept = ops.ratio_keep(logprobs, ids, *policy, sample, 0.5, 0.5)
    slot, _ = ops.ratio_sample(
        logprobs, torch.full_like(logprobs, 0.5), ids, *policy, sample, backend="reference"
    )
    assert torch.equal(kept.nonzero()[:, 1], slot)


def test_there_is_no_gpu_kernel_and_asking_for_one_says_so():
    given = arguments("ratio_keep", Size())[0]
    with pytest.raises(ops.BackendUnavailable, match="no Triton kernel of ratio_keep"):
        ops.ratio_keep(*given, backend="triton")
    kernel = ops.kernel_or_auto("ratio_keep", "triton", torch.device("cuda"))
    assert kernel is ops.OPS["ratio_keep"]


def test_bounds_the_wrong_way_round():
    given = arguments("ratio_keep", Size())[0]
    with pytest.raises(ValueError, match=r"low=1.0 and high=0.0; pass low <= high"):
        ops.ratio_keep(*given[:-2], 1.0, 0.0)
