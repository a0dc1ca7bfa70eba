"""topk_logprobs in C++ against torch's log_softmax + topk, logits warm in cache."""

import torch
from _common import arguments, best_microseconds, report, require

from rgtg_fast import ops

K = 10


def main() -> None:
    options = arguments(__doc__)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for vocab in (32_000, 131_072, 262_144):
            for batch in (1, 2, 4, 8, 16):
                rows.append(measure((torch.randn(batch, vocab) * 3).to(dtype), options.repeat))
    report("topk_logprobs", rows, options)


def measure(logits: torch.Tensor, repeat: int) -> dict:
    logprobs, ids = ops.topk_logprobs(logits, K, backend="cpp")
    want, want_ids = ops.topk_logprobs(logits, K, backend="reference")
    require(torch.equal(ids, want_ids), f"ids at {list(logits.shape)} {logits.dtype}")
    require(torch.allclose(logprobs, want, atol=2e-6), f"logprobs at {list(logits.shape)}")
    cpp, plain, widened, read = best_microseconds(
        [
            lambda: ops.topk_logprobs(logits, K, backend="cpp"),
            lambda: torch.log_softmax(logits, dim=-1).topk(K),
            lambda: torch.log_softmax(logits.float(), dim=-1).topk(K),
            lambda: logits.amax(dim=-1),
        ],
        repeat,
    )
    return {
        "dtype": str(logits.dtype).removeprefix("torch."),
        "V": logits.shape[1],
        "B": logits.shape[0],
        "cpp us": cpp,
        "torch us": plain,
        "ratio": plain / cpp,
        "torch .float() us": widened,
        "ratio .float()": widened / cpp,
        "amax us": read,
    }


if __name__ == "__main__":
    main()
