"""What a run keeps of each step, for `return_dict_in_generate` and its `output_*` flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..models.foreign import CACHE
from .logits import LogitsSource
from .ratio_policy import Choice
from .rows import Rows, with_room


def divergence(logq: Tensor, logprobs: Tensor) -> Tensor:
    """KL of the ratio policy from π over the candidates, [B], of log-probs [B, k]."""
    # An impossible candidate has q = 0 and log q − log π = −inf or NaN: it adds nothing.
    q = logq.exp()
    return torch.where(q > 0, q * (logq - logprobs), 0.0).sum(-1)


@dataclass
class Record:
    """Collects the columns of a `RewardGuidedOutput`; does nothing where only ids are returned."""

    config: GenerationConfig
    output_candidates: bool
    columns: dict[str, Tensor] = field(default_factory=dict)  # [B, T, ...] each

    def __post_init__(self) -> None:
        c = self.config
        self.on = bool(c.return_dict_in_generate)
        self.scores: tuple | None = () if self.on and c.output_scores else None
        self.logits: tuple | None = () if self.on and c.output_logits else None
        self.attentions: tuple | None = () if self.on and c.output_attentions else None
        self.hidden_states: tuple | None = () if self.on and c.output_hidden_states else None

    @property
    def wants_logits(self) -> bool:
        return self.logits is not None or self.scores is not None

    def write(
        self, rows: Rows, source: LogitsSource, logits: Tensor, scores: Tensor, choice: Choice
    ) -> None:
        """Keep a step's results: columns in place; Hugging Face's tuples of tensors grow."""
        if not self.on:
            return
        for name, value in self.of_step(rows.unfinished, choice).items():
            buffer = self.columns.get(name)
            if buffer is None:
                room = rows.room
                buffer = value.new_zeros((value.shape[0], room, *value.shape[1:]))
            elif buffer.shape[1] <= rows.taken:
                buffer = with_room(buffer, rows.taken)
            self.columns[name] = buffer.index_copy_(1, rows.position[:1], value[:, None])
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.attentions is not None:
            self.attentions += (source.attentions,)
        if self.hidden_states is not None:
            self.hidden_states += (source.hidden_states,)

    def write_ragged(self, rows: Rows, choice: Choice, active: Tensor) -> None:
        """Keep the results of a step of the `active` rows [B] alone, each at its own position."""
        if not self.on:
            return
        room = rows.ids.shape[1] - rows.prompt
        for name, value in self.of_step(active, choice).items():
            buffer = self.columns.get(name, value[:, None][:, :0])
            if buffer.shape[1] < room:
                # A row that has ended is never written to again.
                blank = torch.nan if name in ("rewards", "kl", "beta") else 0
                blanks = buffer.new_full((), blank)
                buffer = self.columns[name] = with_room(buffer, room - buffer.shape[1], blanks)
            buffer[active, rows.position[active]] = value[active]

    def of_step(self, unfinished: Tensor, choice: Choice) -> dict[str, Tensor]:
        """A step's columns: rewards, kl and candidates_scored [B], and the candidates' [B, k] where
        asked for."""
        slot, ids, logprobs, rewards, logq, scored, gated, beta, kl, known = choice
        chosen = slot[:, None]
        count = torch.full_like(slot, ids.shape[1]) if known is None else known
        if scored is not None:
            count = scored.sum(-1)
        if self.config.do_sample and kl is None:
            kl = divergence(logq, logprobs)
            if scored is not None:
                # Where a reward that counts is unknown the ratio policy is, and so is its KL.
                unknown = (~scored & (logprobs > -torch.inf)).any(-1)
                if gated is not None:  # theirs has no reward
                    unknown &= ~gated
                kl = kl.masked_fill(unknown, torch.nan)
        elif kl is None:  # all of the policy is on the token taken
            kl = 0.0 - logprobs.gather(1, chosen)[:, 0]
        columns = {"rewards": rewards.gather(1, chosen)[:, 0], "kl": kl}
        if beta is not None:
            columns["beta"] = beta
        columns = {n: c.masked_fill(~unfinished, torch.nan) for n, c in columns.items()}
        columns["candidates_scored"] = count.where(unfinished, 0)
        if self.output_candidates:
            columns |= {
                "candidate_ids": ids,
                "candidate_logprobs": logprobs,
                "candidate_rewards": rewards,
            }
        return columns

    def result(self, sequences: Tensor, steps: int, cache: Any) -> dict[str, Any] | Tensor:
        """The sequences, or where more is wanted the fields of a `RewardGuidedOutput`, of `steps`
        steps; what was run beyond them is dropped."""
        if not self.on:
            return sequences
        columns = {name: c[:, :steps].clone() for name, c in self.columns.items()}
        return dict(
            sequences=sequences,
            scores=self._cut(self.scores, steps),
            logits=self._cut(self.logits, steps),
            attentions=self._cut(self.attentions, steps),
            hidden_states=self._cut(self.hidden_states, steps),
            **{CACHE: cache},
            **columns,
        )

    @staticmethod
    def _cut(column: tuple | None, steps: int) -> Any:
        return None if column is None else column[:steps]
