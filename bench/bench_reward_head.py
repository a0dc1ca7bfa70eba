"""reward_head in C++ against torch's linear layer on the same hidden states."""

import torch
from _common import arguments, best_microseconds, report, require

from rgtg_fast import ops

K = 10


def main() -> None:
    options = arguments(__doc__)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, width in ((1, 768), (8, 768), (1, 4096), (8, 4096), (64, 4096)):
            hidden, weight = torch.randn(batch, K, width).to(dtype), torch.randn(width).to(dtype)
            rows.append(measure(hidden, weight, options.repeat))
    report("reward_head", rows, options)


def measure(hidden: torch.Tensor, weight: torch.Tensor, repeat: int) -> dict:
    rewards = ops.reward_head(hidden, weight, backend="cpp")
    want = ops.reward_head(hidden, weight, backend="reference")
    scale = hidden.float().abs() @ weight.float().abs()
    require(bool(((rewards - want).abs() <= 1e-6 * scale).all()), f"rewards at {hidden.shape}")
    cpp, linear, widened = best_microseconds(
        [
            lambda: ops.reward_head(hidden, weight, backend="cpp"),
            lambda: torch.nn.functional.linear(hidden, weight[None]),
            lambda: torch.nn.functional.linear(hidden.float(), weight.float()[None]),
        ],
        repeat,
    )
    return {
        "dtype": str(hidden.dtype).removeprefix("torch."),
        "B": hidden.shape[0],
        "H": hidden.shape[2],
        "cpp us": cpp,
        "linear us": linear,
        "ratio": linear / cpp,
        "linear .float() us": widened,
        "ratio .float()": widened / cpp,
    }


if __name__ == "__main__":
    main()
