"""Log-probabilities of whole answers, of which DPO's implicit reward is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .autoregressive import AutoregressiveScorer


class LogprobScorer(AutoregressiveScorer):
    """Rewards log p(y_1..t | x) of a causal LM: the sum over the answer so far, candidate included.

    `AutoregressiveScorer`'s, plus a constant for each row, which the ratio policy does not see. The
    difference of two of them, π_policy's and π_ref's, is the implicit reward of DPO
    (arXiv 2305.18290): what `reward_model=(policy, reference)` is. `score` gives float64, as that
    difference is far smaller than the two.
    """

    method = "logprob"
    notes = True
    sums: Tensor  # float64 [B, n], of each token of `texts`, from the answer's first one to it

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        super().prefill(input_ids, attention_mask)
        self.sums = torch.zeros_like(self.texts.ids, dtype=torch.float64)

    @torch.no_grad()
    def score(
        self, ids: Tensor, keep: Tensor | None = None, handles: Sequence[int] | None = None
    ) -> Tensor:
        """As `AutoregressiveScorer`, the sums, float64 [n, k]."""
        rewards = super().score(ids, keep, handles).double()
        _, rows = self.rows_of(handles)
        last = self._totals(rows)[:, None].to(rewards.device)
        self.rewards = (rewards + last).to(self.device)
        return self.rewards.to(ids.device)

    def _rewards_of_all(self, state: Tensor) -> Tensor:
        rewards = super()._rewards_of_all(state).double()
        return rewards + self._totals(None)[:, None].to(rewards.device)

    def _committed(self, slot: Tensor, rows: Tensor | None, at: Tensor | None) -> None:
        rewards = self.rewards if at is None else self.rewards[at]
        self._put(rewards.gather(1, slot[:, None]), self._last(rows), rows)

    def finish(self) -> None:
        for name in ("sums", "rewards"):
            self.__dict__.pop(name, None)
        super().finish()

    def _join(self, prompts: list[Tensor]) -> None:
        super()._join(prompts)
        none = torch.zeros((0, 1), dtype=torch.float64, device=self.device)
        self.sums = self._as_wide(self.__dict__.get("sums", none))
        self.sums = torch.cat([self.sums, self.sums.new_zeros((len(prompts), self.sums.shape[1]))])

    def _note(self, states: Tensor, ids: Tensor, places: Tensor, rows: Tensor) -> None:
        before = self.sums[rows].gather(1, places[:, None] - 1)
        added = self._rewards(states, ids[:, None].clamp(max=states.shape[-1] - 1)).double()
        self._put(before + added.to(before.device), places[:, None], rows)

    def _keep_rows(self, rows: Tensor) -> None:
        super()._keep_rows(rows)
        self.sums = self.sums[rows]

    def _totals(self, rows: Tensor | None) -> Tensor:
        sums = self.sums if rows is None else self.sums[rows]
        return sums.gather(1, self._last(rows))[:, 0]

    def _last(self, rows: Tensor | None) -> Tensor:
        """Where in `texts` the last tokens of the rows are, int64 [n, 1]."""
        return (self.texts.counts if rows is None else self.texts.counts[rows])[:, None] - 1

    def _put(self, sums: Tensor, places: Tensor, rows: Tensor | None) -> None:
        """Write sums [n, 1] to places [n, 1] of rows, in place as long as there is room."""
        self.sums = self._as_wide(self.sums)
        if rows is None:
            self.sums.scatter_(1, places, sums)
        else:
            self.sums[rows[:, None], places] = sums

    def _as_wide(self, sums: Tensor) -> Tensor:
        more = self.texts.ids.shape[1] - sums.shape[1]
        return pad(sums, (0, more)) if more > 0 else sums
