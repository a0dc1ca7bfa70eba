"""Everything a run is made of, resolved once; the loop takes it whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..scorers.base import Scorer
from .graphs import Graph
from .logits import LogitsSource
from .plan import Plan, keep_rows
from .ratio_policy import RatioPolicy
from .record import Record


@dataclass
class Call:
    """A run: logits, rewards, the choice between candidates, the plan, the record.

    `reward_prompt` are the prompts' ids and mask [B, P'] as the scorer sees them. `epilogue`: the
    reward is one linear head, which the draw takes in (`ops.ratio_step`). A `graph` replays the
    steps; `streamer` is given every token. `keeps_graph`: the graph may be left to later calls
    (kept.py).
    """

    source: LogitsSource
    scorer: Scorer
    reward_prompt: tuple[Tensor, Tensor]
    policy: RatioPolicy
    plan: Plan
    record: Record
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    epilogue: bool = False
    streamer: Any = None
    graph: Graph | None = None
    keeps_graph: bool = False
    speculation: Any = None

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with rows `rows` int64 [n] alone: the others have ended."""
        self.source.keep_rows(rows)
        self.scorer.keep_rows(rows)  # type: ignore[attr-defined]
        self.policy = self.policy.keep_rows(rows)
        self.processors = keep_rows(self.processors, rows)

    def caches(self) -> list[Any]:
        """The sibling caches that a step fills; empty before the prompts are in."""
        return [*self.source.caches, *getattr(self.scorer, "caches", ())]
