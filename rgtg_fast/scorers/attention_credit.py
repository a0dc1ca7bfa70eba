"""Attention-based credit: the reward model's last-layer attention shares out its reward."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.attention import last_attention
from ..models.reward_model import as_reward_model
from .expand import ExpandScorer
from .probe import probe

_PROBED = 32  # tokens: eager attention over a probe as long as a window of thousands would be slow


def check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}; pass 0 (all at the end) to 1 (all by attention)")


class AttentionCreditScorer(ExpandScorer):
    """The ABC reward (arXiv 2402.00782) of a candidate token v, on the text as far as it goes.

    With R(x, y) the reward model's reward and α_t the last layer's attention from the last token to
    token t, averaged over the heads and normalised over the answer's tokens, ABC gives token t of a
    *finished* answer of T tokens the reward ``β α_t R``, and token T ``(1 - β) R`` more. Guided
    decoding has no finished answer, so each candidate is taken for the last token of its prefix,
    T = t, with R and α computed on it::

        r(v | x, y_<t) = (1 - β + β α_t) R(x, y_<t, v)

    β is `share`. This is an approximation of ours, not a formula of the paper: what earlier tokens
    are given is left out, as only the sum over all tokens, which is R(x, y_<t, v) whatever β is,
    could use it. ``share=0`` is the reward model itself (PARGS, ARGS); a larger share discounts
    candidates from which the reward model looks back, more so the longer the answer is, so rewards
    shrink with t unless β is small.

    Each candidate has its own copy of the cached prefix (k times the memory of "tree"), and
    attention is computed eagerly; there is no CUDA graph. EOS is scored as a token like any other.

    Args:
        model: a causal reward model, as for `generate`, or a `RewardHead`, whose attention is that
            of the layer it reads.
        share: β, 0 to 1.
        backend: of the ops.

    Raises:
        ValueError: a share out of range, a model that a numerical probe finds wrong to score from a
            cache (encoders, recurrent ones), and at the first step one without attention weights.

    Example::

        from rgtg_fast.scorers import AttentionCreditScorer

        out = rgtg_fast.generate(lm, **inputs, reward_model=AttentionCreditScorer(rm, share=0.3))
    """

    method = "attention credit"
    state = (*ExpandScorer.state, "answer")

    def __init__(self, model: Any, share: float = 0.5, backend: ops.Backend = "auto") -> None:
        check_share(share)
        rm = copy.copy(as_reward_model(model))
        rm.attention = "eager"  # only eager attention returns its weights
        why = probe(rm, _PROBED, ("expand",), backend).why_not("expand")
        if why is not None:
            raise ValueError(
                f"{type(rm.model).__name__} cannot be scored from a cache of its prefix ({why}), "
                "so attention-based credit cannot guide; pass a causal transformer"
            )
        super().__init__(rm, 1, backend=backend)
        self.share = share

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.k = 1  # how many candidates there are is known with the first of them
        super().prefill(input_ids, attention_mask)

    def begin(self, rows: int) -> None:
        super().begin(rows)
        self.answer = torch.zeros(rows, dtype=torch.int64, device=self.device)  # [B], its tokens

    def _score(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        hidden, out = self._fed(ids, rows, output_attentions=True)
        rewards = self.parts.rewards(hidden.view(*ids.shape, -1), self.backend)
        weights = last_attention(self.rm, out)[:, :, -1].float().mean(1)  # [n * k, S]
        answer = self.answer if rows is None else self.answer[rows]
        ahead = torch.arange(weights.shape[1] - 1, -1, -1, device=weights.device)
        own = ahead <= answer.to(weights.device)[:, None]  # tokens of the answer, and the candidate
        weights = weights.masked_fill(~own.repeat_interleave(ids.shape[1], 0), 0.0)
        credit = (weights[:, -1] / weights.sum(-1)).view(ids.shape).to(rewards.device)
        return ((1 - self.share + self.share * credit) * rewards).to(ids.device)

    def _join(self, prompts: list[Tensor]) -> None:
        super()._join(prompts)
        self.answer = torch.cat([self.answer, self.answer.new_zeros(len(prompts))])

    def _commit(self, slot: Tensor, rows: Tensor | None, at: Tensor | None) -> None:
        super()._commit(slot, rows, at)
        self.answer[slice(None) if rows is None else rows] += 1

    def _extend(self, ids: Tensor, counts: Tensor, rows: Tensor | None) -> None:
        super()._extend(ids, counts, rows)
        self.answer[slice(None) if rows is None else rows] += counts

    def _crop(self, lengths: Tensor, rows: Tensor | None) -> None:
        own = slice(None) if rows is None else rows
        before = self._tokens()[own]
        super()._crop(lengths, rows)
        self.answer[own] = (self.answer[own] - (before - lengths)).clamp(min=0)

    def _keep(self, rows: Tensor) -> None:
        super()._keep(rows)
        self.answer = self.answer[rows]
