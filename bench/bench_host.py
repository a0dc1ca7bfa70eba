"""What a call of each op costs the host: `pytest bench/bench_host.py` (pytest-benchmark).

The inputs are those of one decode step at batch 1, so small that the time is the wrapper's checks
and the dispatch; kernels are timed by `python -m rgtg_fast bench <op>`. The torch entries are the
cheapest calls of the same kind, for scale.
"""

import pytest
import torch

from rgtg_fast import ops

K, HIDDEN, VOCAB = 10, 64, 512


def step_inputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, VOCAB, generator=generator)
    logprobs, ids = ops.topk_logprobs(logits, K)
    hidden = torch.randn(1, K, HIDDEN, generator=generator)
    weight = torch.randn(HIDDEN, generator=generator)
    table = torch.randn(VOCAB, HIDDEN, generator=generator)
    rewards = ops.reward_head(hidden, weight)
    seeds = ops.split_seed(0, 1)
    weights = torch.tensor([[1.0, 0.5]])
    policy = (ids, 1.0, 1.0, seeds, 0, True)
    return {
        "topk_logprobs": lambda: ops.topk_logprobs(logits, K),
        "mix_logits": lambda: ops.mix_logits([logits, logits], weights, K),
        "reward_head": lambda: ops.reward_head(hidden, weight),
        "ratio_sample": lambda: ops.ratio_sample(logprobs, rewards, *policy),
        "ratio_step": lambda: ops.ratio_step(logprobs, hidden, weight, *policy),
        "vocab_reward": lambda: ops.vocab_reward(hidden[:, 0], table, ids),
        "torch: log_softmax + topk": lambda: torch.log_softmax(logits, -1).topk(K),
        "torch: matmul": lambda: hidden @ weight,
    }


CALLS = step_inputs()


@pytest.mark.parametrize("name", CALLS)
def test_host_cost(benchmark, name):
    benchmark.group = "one call, batch 1"
    benchmark(CALLS[name])
