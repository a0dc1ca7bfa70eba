"""ratio_sample in C++ against the usual chain in torch: softmax, then the exponential race."""

import torch
from _common import arguments, best_microseconds, report, require

from rgtg_fast import ops


def main() -> None:
    options = arguments(__doc__)
    rows = [measure(batch, k, options.repeat) for k in (10, 64) for batch in (1, 8, 64, 256)]
    report("ratio_sample", rows, options)


def measure(batch: int, k: int, repeat: int) -> dict:
    logprobs = torch.log_softmax(torch.randn(batch, k) * 3, dim=1)
    rewards, ids = torch.randn(batch, k), torch.randint(0, 128_000, (batch, k))
    seeds = ops.split_seed(1, batch)

    def sample(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.ratio_sample(logprobs, rewards, ids, 1.5, 0.8, seeds, 3, True, backend=backend)

    def race() -> tuple[torch.Tensor, torch.Tensor]:
        logq = torch.log_softmax((logprobs + 1.5 * rewards) / 0.8, dim=1)
        return (logq - torch.empty_like(logq).exponential_().log()).argmax(dim=1), logq

    slot, logq = sample("cpp")
    want_slot, want_logq = sample("reference")
    require(torch.equal(slot, want_slot), f"slots at B={batch} k={k}")
    require(torch.allclose(logq, want_logq, atol=1e-6), f"logq at B={batch} k={k}")
    cpp, torch_race = best_microseconds([lambda: sample("cpp"), race], repeat)
    return {"B": batch, "k": k, "cpp us": cpp, "torch us": torch_race, "ratio": torch_race / cpp}


if __name__ == "__main__":
    main()
