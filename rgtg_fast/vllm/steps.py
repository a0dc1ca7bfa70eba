"""Reward and KL of each token, out of the engine's process: a file that it appends records to.

vLLM gives back tokens and their log-probabilities, and nothing of a logits processor.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

_RECORD = struct.Struct("=qqff")  # request, position in the answer, reward, KL in nats


class StepWriter:
    """Appends the steps of requests that have a number."""

    def __init__(self, path: str) -> None:
        self.file = Path(path).open("ab", buffering=0)  # noqa: SIM115, as long as the engine runs

    def write(self, steps: Iterable[tuple[int | None, int, float, float]]) -> None:
        """Steps as (number, position, reward, KL in nats); those of requests without a number are
        not kept. One write: what another process reads are whole steps."""
        self.file.write(b"".join(_RECORD.pack(*step) for step in steps if step[0] is not None))


class StepReader:
    """The steps that an engine on this machine has written to `path`, which is there already."""

    def __init__(self, path: str) -> None:
        self.file = Path(path).open("rb")  # noqa: SIM115
        self.left = b""
        self.steps: dict[int, dict[int, tuple[float, float]]] = {}

    def take(self, number: int, count: int) -> tuple[list[float], list[float]]:
        """Rewards and KL of a request's first `count` tokens, which are then forgotten.

        A request that was preempted, or that has run a step too far before its end was seen, has
        written more: what it wrote last of a position counts.
        """
        data = self.left + self.file.read()
        whole = len(data) - len(data) % _RECORD.size
        self.left = data[whole:]
        for each, position, reward, kl in _RECORD.iter_unpack(data[:whole]):
            self.steps.setdefault(each, {})[position] = reward, kl
        own = self.steps.pop(number, {})
        if any(position not in own for position in range(count)):
            raise RuntimeError(
                f"{os.fspath(self.file.name)} lacks steps of request {number}, of which it has "
                f"{len(own)} of {count}"
            )
        found = [own[position] for position in range(count)]
        return [reward for reward, _ in found], [kl for _, kl in found]

    def close(self) -> None:
        self.file.close()
