"""Rewards and next-token logits from one forward: the reward model is made of the language model.

The k candidates run through the language model as siblings, one step ahead: their hidden states
give the rewards (by a head on them, or on those of a second set of rows that carry an adapter), and
the winner's hidden state is the one that the next token's logits come from. A guided token costs
one forward of k tokens (2k with an adapter) and one row of the vocabulary projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.on_base import OnBase
from ..models.padding import at_counts, last_real, without_copies
from ..models.selection import Selection
from .base import put
from .tree import SiblingScorer


class _Both:
    """The base model on the language model's rows, followed by the adapter's rows if any."""

    def __init__(self, parts: OnBase) -> None:
        self.parts = parts
        self.device, self.dtype, self.twins = parts.device, parts.dtype, parts.twins
        self.text_config = parts.text_config
        self.reward_hidden: Tensor  # [B, n, H] of the last forward

    def forward_base(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, self.reward_hidden, out = self.parts.forward_both(input_ids, **kwargs)
        return hidden, out


class JointScorer(SiblingScorer):
    """The scorer's side; `JointLogits` is the language model's. `fused` as for `TreeScorer`."""

    method = "joint"
    parts: OnBase
    state = (*SiblingScorer.state, "both", "hidden", "next_hidden")

    def __init__(self, rm: OnBase, k: int, **options: Any) -> None:
        super().__init__(rm, k, **options)
        self.copies = 2 if rm.own_rows else 1
        self.can_skip = rm.device.type == "cpu"  # as TreeScorer
        self.keeps_text = True  # cropping needs the new last token's hidden state too

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.both = _Both(self.parts)
        self.forward = self._forward(self.both)
        ids, mask, copies = without_copies(input_ids, attention_mask)
        number = len(ids)
        if copies is not None:
            copies = torch.cat([copies + i * number for i in range(self.copies)])
        hidden = self.forward.prefill(self._doubled(ids), self._doubled(mask), copies)
        last = self.parts.rewards(last_real(self.both.reward_hidden, mask), self.backend)[:, 0]
        self.next_hidden = hidden[:number, -1].clone()  # [B, H], updated in place
        if copies is not None:
            own = copies[: len(input_ids)]
            self.next_hidden = self.next_hidden[own.to(hidden.device)]
            last = last[own.to(last.device)]
        return last

    def _join_alike(self, prompts: list[Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        if "forward" not in self.__dict__:
            self.both = _Both(self.parts)
            self.forward = self._forward(self.both)
        known, n = self.__dict__.get("next_hidden"), len(prompts)
        before = 0 if known is None else len(known)
        hidden = self.forward.join(prompts * self.copies)
        if self.copies == 2:  # the language model's rows first, all of them
            order = torch.arange(2 * (before + n), device=ids.device)
            parts = order.split([before, before, n, n])
            self.forward.keep_rows(torch.cat([parts[i] for i in (0, 2, 1, 3)]))
        newest = hidden[:n, -1]
        self.next_hidden = newest.clone() if known is None else torch.cat([known, newest])
        return self.parts.rewards(self.both.reward_hidden[:, -1:], self.backend)[:, 0]

    def _hidden(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        self.selection = None
        hidden = self.forward.siblings(self._doubled(ids), rows=self._both_of(rows))
        self.hidden = hidden[: len(ids)]
        return self.both.reward_hidden

    def _score_kept(self, ids: Tensor, keep: Tensor, rows: Tensor | None) -> Tensor:
        if keep.all():
            return self._score(ids, rows)
        self.selection = own = self._select(keep)
        both = own if self.copies == 1 else Selection(self._doubled(keep), packs=False)
        hidden = self.forward.siblings(self._doubled(ids), both, self._both_of(rows))
        self.hidden = hidden[: len(ids)]
        rewards = self.parts.rewards(self.both.reward_hidden, self.backend)
        return own.put_back(rewards.to(ids.device))

    def _commit(self, slot: Tensor, rows: Tensor | None, at: Tensor | None) -> None:
        if self.selection is not None:
            winner = self.selection.states_of(slot, self.hidden, at)
            slot = self.selection.places_of(slot, at)
        else:
            hidden = self.hidden if at is None else self.hidden[at]
            index = slot.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
            winner = hidden.gather(1, index.to(hidden.device))[:, 0]
        put(self.next_hidden, winner, rows)
        self.forward.commit(self._doubled(slot), self._both_of(rows))

    def _feed(self, ids: Tensor, counts: Tensor, rows: Tensor | None) -> Tensor:
        both, of_reward, of_logits = self._both_of(rows), [], []
        step = ids.shape[1] if self.fused else self.k  # tokens of one forward
        for begin in range(0, ids.shape[1], step):
            chunk = ids[:, begin : begin + step]
            real = (counts - begin).clamp(0, chunk.shape[1])
            hidden = self.forward.extend(self._doubled(chunk), self._doubled(real), both)
            of_logits.append(hidden[: len(ids)])
            of_reward.append(self.both.reward_hidden)
        before = self.next_hidden if rows is None else self.next_hidden[rows]
        newest = at_counts(torch.cat(of_logits, dim=1), counts)[:, 0]
        put(self.next_hidden, newest.where((counts > 0)[:, None].to(before.device), before), rows)
        last = at_counts(torch.cat(of_reward, dim=1), counts)
        return self.parts.rewards(last, self.backend)[:, 0].to(ids.device)

    def _select(self, keep: Tensor) -> Selection:
        # An adapter's rows are told by their place in the batch, so they cannot be packed.
        return Selection(keep, packs=self.fused and self.copies == 1)

    def _comb(self, ids: Tensor, chain: Tensor) -> Tensor:
        both = self.selection
        if both is not None and self.copies == 2:
            both = Selection(self._doubled(both.keep), packs=False)
        hidden = self.forward.comb(self._doubled(ids), self._doubled(chain), both)
        self.hidden = hidden if self.copies == 1 else hidden[: len(hidden) // 2]
        return self.both.reward_hidden

    def _keep_newest(self, counts: Tensor, slot: Tensor, at: Tensor) -> None:
        if self.selection is None:
            newest = self.hidden[at, slot]
        else:
            newest = self.selection.states_of(slot, self.hidden, at)
        self.next_hidden.copy_(newest.where((counts > 0)[:, None], self.next_hidden))

    def _commit_comb(self, counts: Tensor, slot: Tensor, depths: int, siblings: int) -> None:
        self.forward.commit_comb(self._doubled(counts), self._doubled(slot), depths, siblings)

    def look_ahead(self, ids: Tensor, counts: Tensor) -> Tensor:
        """The language model's hidden states [B, n, H] of the next `counts` [B] tokens of every
        row, `ids` int64 [B, n] (padded on the right), which are to be taken back by `look_back`
        before anything is scored."""
        return self.forward.extend(self._doubled(ids), self._doubled(counts))[: len(ids)]

    def look_back(self, lengths: Tensor) -> None:
        """Keep the first `lengths` [B] tokens of every row."""
        self._cut(lengths, None)

    def _cut(self, lengths: Tensor, rows: Tensor | None) -> None:
        self.forward.crop(self._doubled(lengths), self._both_of(rows))

    def _keep(self, rows: Tensor) -> None:
        batch = len(self.next_hidden)
        self.next_hidden = self.next_hidden[rows.to(self.next_hidden.device)]
        self.forward.keep_rows(torch.cat([rows + i * batch for i in range(self.copies)]))

    def _doubled(self, t: Tensor) -> Tensor:
        return t if self.copies == 1 else torch.cat([t, t])

    def _both_of(self, rows: Tensor | None) -> Tensor | None:
        """The forward's rows of the scorer's."""
        if rows is None or self.copies == 1:
            return rows
        return torch.cat([rows, rows + len(self.next_hidden)])
