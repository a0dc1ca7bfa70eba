"""prefix_bt_loss in C++, forward and backward, against the same composed of torch's functions."""

import torch
from _common import arguments, best_microseconds, report, require

from rgtg_fast.cli.microbench import draw_pairs, pair_step, torch_pair_step


def main() -> None:
    options = arguments(__doc__)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for pairs, width in ((8, 64), (64, 128), (64, 512), (256, 512)):
            rows.append(measure(draw_pairs(pairs, width, dtype), options.repeat))
    report("prefix_bt_loss", rows, options)


def measure(pairs: tuple, repeat: int) -> dict:
    chosen, rejected, *masks = pairs
    got, want = (pair_step(*pairs, backend=name) for name in ("cpp", "reference"))
    room = 1e-2 if chosen.dtype == torch.bfloat16 else 1e-5
    for a, b in zip(got, want, strict=True):
        require(bool((a - b).abs().max() <= room * b.abs().max()), f"loss at {chosen.shape}")
    cpp, composed = best_microseconds(
        [lambda: pair_step(*pairs, backend="cpp"), lambda: torch_pair_step(*pairs)], repeat
    )
    lengths = [mask.sum(dim=1) for mask in masks]
    constants = torch.ones(chosen.shape[1]), torch.zeros(chosen.shape[0])
    rewards = chosen.detach(), rejected.detach()
    (kernel,) = best_microseconds(
        [lambda: torch.ops.rgtg_fast.prefix_bt_loss(*rewards, *lengths, *constants, 0.0, 0.0, 1)],
        repeat,
    )
    # Read both rewards, write both gradients, all in the rewards' type.
    gigabytes = 4e-9 * chosen.numel() * chosen.element_size()
    return {
        "dtype": str(chosen.dtype).removeprefix("torch."),
        "N": chosen.shape[0],
        "L": chosen.shape[1],
        "cpp us": cpp,
        "torch us": composed,
        "ratio": composed / cpp,
        "kernel us": kernel,
        "kernel GB/s": gigabytes / (1e-6 * kernel),
    }


if __name__ == "__main__":
    main()
