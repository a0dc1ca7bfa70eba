"""Rewards foreseen: a linear head over the vocabulary on the language model's hidden states, fitted
as texts go on.

The language model's continuation is the guided text more often where the choice at each position
takes in what the reward of a candidate will probably be. That is a guess: the reward model is asked
for every candidate all the same.

Normalised least mean squares (Widrow and Hoff, 1960): with the unit vector x of a hidden state and
a constant, a candidate v's reward above the mean of its position is foreseen as w_v · x, and
w_v += RATE (r - w_v · x) x once it is known.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

RATE = 0.3
LARGEST = 32 << 20  # bytes of weights; tokens beyond are foreseen as 0


class FittedHead:
    """Weights of the tokens that were candidates so far. Threads may share it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.weights: Tensor | None = None  # fp32 [n, H + 1]; row 0 stays zero
        self.places: Tensor  # int64 [V], a token's row; 0 before it has any
        self.count = 1

    def __call__(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Rewards fp32 [n, k] to expect of candidates int64 [n, k] behind hidden states [n, H]."""
        if self.weights is None:
            return torch.zeros_like(ids, dtype=torch.float32)
        at = self.places[ids]  # before the weights: another thread may add rows to those
        return _products(self.weights[at], _inputs(hidden))

    def observe(self, hidden: Tensor, ids: Tensor, rewards: Tensor, vocab_size: int) -> Tensor:
        """The rewards fp32 [n, k] are known (but for those that are not finite). How far off they
        were [n, k], from what was foreseen."""
        x = _inputs(hidden)
        known = rewards.isfinite() & x.isfinite().all(1, keepdim=True)
        count = known.sum(1, keepdim=True).clamp(min=1)
        mean = rewards.where(known, 0.0).sum(1, keepdim=True) / count
        with self.lock:
            self._make_rows(ids[known], x.shape[1], vocab_size)
            assert self.weights is not None
            at = self.places[ids]
            error = (rewards - mean - _products(self.weights[at], x)).where(known, 0.0)
            moves = known & (at > 0)
            places = at[moves]
            # The mean of a token's steps where it was a candidate several times: their sum can be
            # too large a step.
            times = torch.bincount(places, minlength=1)[places]
            steps = (RATE * error[..., None] * x.nan_to_num()[:, None])[moves] / times[:, None]
            self.weights.index_add_(0, places, steps)
        return error

    def _make_rows(self, ids: Tensor, width: int, vocab_size: int) -> None:
        """Rows for those of the tokens that have none, as far as there is room."""
        # What is made in inference mode could not be changed outside of it.
        with torch.inference_mode(False):
            if self.weights is None:
                self.places = torch.zeros(vocab_size, dtype=torch.int64, device=ids.device)
                self.weights = torch.zeros((1, width), dtype=torch.float32, device=ids.device)
            new = ids.clone()
            new = new[self.places[new] == 0].unique()[: LARGEST // (4 * width) - self.count]
            count = self.count + len(new)
            if count > len(self.weights):
                grown = self.weights.new_zeros((2 * count, width))
                grown[: len(self.weights)] = self.weights
                self.weights = grown
            self.places[new] = torch.arange(self.count, count, device=new.device)
            self.count = count


def _inputs(hidden: Tensor) -> Tensor:
    """Vectors [n, H + 1] of length 1."""
    x = torch.nn.functional.normalize(hidden.float(), dim=-1)
    return torch.nn.functional.pad(x, (0, 1), value=1.0) * 0.5**0.5


def _products(weights: Tensor, x: Tensor) -> Tensor:
    return (weights * x.nan_to_num()[:, None]).sum(-1)
