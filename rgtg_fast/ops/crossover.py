"""Which GPU backend ``backend="auto"`` takes for an op, by the number of rows B.

SOURCE names the file under ``bench/results`` that the figures come from. It is None: nothing here
has been measured on a GPU yet. Until it is, CUDA C++ is taken wherever an op has it: its launch
costs the host a few microseconds and Triton's a few tens, and a step of decoding is bound by
launches. Where a step is replayed from a CUDA graph the host does not count, and for attention the
machine code of the two is about even: there a measurement has to say.

FASTER holds the measured exceptions: op -> list of (rows, backend), rows ascending; the first entry
whose ``rows`` is at least B decides.
"""

from __future__ import annotations

SOURCE: str | None = None
ANY = 2**63 - 1

FASTER: dict[str, tuple[tuple[int, str], ...]] = {}


def faster(op: str, rows: int) -> str:
    """``"cuda"`` or ``"triton"``: the one to prefer for ``op`` at this many rows."""
    for limit, backend in FASTER.get(op, ((ANY, "cuda"),)):
        if rows <= limit:
            return backend
    raise AssertionError(f"the entry of {op} must end with ANY")
