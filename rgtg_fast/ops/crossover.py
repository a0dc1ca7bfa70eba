"""Which GPU backend ``backend="auto"`` takes for an op, by the number of rows B.

SOURCE names the file under ``bench/results`` that the figures come from. It is None: nothing here
has been measured on a GPU yet, and every entry is a prediction. CUDA C++ is expected to win
everywhere because its launch costs the host a few microseconds and Triton's a few tens, and a step
of decoding is bound by launches; ``candidate_attention`` has no CUDA C++ kernel yet.

An op's entry is a list of (rows, backend), ascending: the first whose ``rows`` is at least B holds.
"""

from __future__ import annotations

SOURCE: str | None = None
ANY = 2**63 - 1

FASTER: dict[str, tuple[tuple[int, str], ...]] = {
    "topk_logprobs": ((ANY, "cuda"),),
    "reward_head": ((ANY, "cuda"),),
    "ratio_sample": ((ANY, "cuda"),),
    "ratio_step": ((ANY, "cuda"),),
    "vocab_reward": ((ANY, "cuda"),),
    "candidate_attention": ((ANY, "triton"),),
    "prefix_bt_loss": ((ANY, "cuda"),),
}


def faster(op: str, rows: int) -> str:
    """``"cuda"`` or ``"triton"``: the one to prefer for ``op`` at this many rows."""
    for limit, backend in FASTER[op]:
        if rows <= limit:
            return backend
    raise AssertionError(f"the entry of {op} must end with ANY")
