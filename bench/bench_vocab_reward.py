"""vocab_reward in C++ against a gather + product in torch and against the dense head."""

import torch
from _common import arguments, best_microseconds, report, require

from rgtg_fast import ops

VOCAB, K = 32_000, 10


def main() -> None:
    options = arguments(__doc__)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(VOCAB, 1024).to(dtype)
        for batch in (1, 8, 64):
            hidden = torch.randn(batch, 1024).to(dtype)
            ids = torch.randint(0, VOCAB, (batch, K))
            rows.append(measure(hidden, weight, ids, options.repeat))
    report("vocab_reward", rows, options)


def measure(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, repeat: int) -> dict:
    rewards = ops.vocab_reward(hidden, weight, ids, backend="cpp")
    want = ops.vocab_reward(hidden, weight, ids, backend="reference")
    scale = (weight[ids].float().abs() * hidden.float().abs()[:, None]).sum(dim=-1)
    require(bool(((rewards - want).abs() <= 1e-6 * scale).all()), f"rewards at {hidden.shape}")
    cpp, gather = best_microseconds(
        [
            lambda: ops.vocab_reward(hidden, weight, ids, backend="cpp"),
            lambda: (weight[ids] * hidden[:, None]).sum(dim=-1),
        ],
        repeat,
    )
    dense = best_microseconds([lambda: (hidden @ weight.t()).gather(1, ids)], max(3, repeat // 20))
    return {
        "dtype": str(hidden.dtype).removeprefix("torch."),
        "V": weight.shape[0],
        "B": hidden.shape[0],
        "H": hidden.shape[1],
        "cpp us": cpp,
        "gather us": gather,
        "ratio": gather / cpp,
        "dense us": dense[0],
        "ratio dense": dense[0] / cpp,
    }


if __name__ == "__main__":
    main()
