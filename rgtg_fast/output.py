"""What a guided run returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class RewardGuidedOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with the rewards and the price paid for them.

    `scores` are the processed LM logits before the reward, `logits` the raw ones.

    Attributes:
        rewards: fp32 [B, T], reward of prompt + answer up to and with each chosen token; NaN after
            the row ended.
        kl: fp32 [B, T] in nats, KL(q || π) of the step's policy q from π, the full-vocabulary
            softmax of the processed logits; NaN after the row ended. Sampled, q is the ratio policy
            and KL is Σ q (log q − log π) over the candidates; NaN at a step where a candidate that
            `reward_range` ruled out was not scored; over the whole vocabulary with `k=None`.
            Greedy, q is certain of the chosen token and KL is −log π of it. Without other NaN,
            `kl.nansum(-1)` is a row's total: greedy, −log π of its answer.
        candidates_scored: int64 [B, T], candidates that the reward model was asked for (k, fewer
            where some could not win: see `prune=`; the vocabulary with `k=None`); 0 after the row
            ended.
        beta: fp32 [B, T], that of each step, where `beta_schedule` or `kl_budget` changes it; NaN
            after the row ended.
        candidate_ids: int64 [B, T, k], most likely first, or with `candidates="sum"` the best of
            log π + β r (with `output_candidates=True`).
        candidate_logprobs: fp32 [B, T, k], log π of the candidates.
        candidate_rewards: fp32 [B, T, k], rewards of prefix + candidate, NaN if not scored.
            After a row's end its candidates mean nothing.
        speculation: where several tokens were taken at once (`speculate=`), a dict: forwards of
            the two models (`reward_forwards`, `lm_forwards`; without the prompts), `tokens` of all
            rows, and `acceptance`, the share of the language model's drafts that the rewards left
            as they were, or None where none was drafted.
        gating: with `min_entropy=`, a dict: `steps` of all rows that went without reward, and
            `tokens_saved`, that the reward model did not read for it.
    """

    rewards: Tensor | None = None
    kl: Tensor | None = None
    candidates_scored: Tensor | None = None
    beta: Tensor | None = None
    candidate_ids: Tensor | None = None
    candidate_logprobs: Tensor | None = None
    candidate_rewards: Tensor | None = None
    speculation: dict[str, Any] | None = None
    gating: dict[str, int] | None = None


@dataclass
class Answer:
    """The answer to one of the prompts of `generate_many`.

    Attributes:
        index: of the prompt, counted from 0.
        tokens: of the answer, without prompt and padding; EOS included where it ended it.
        text: of the tokens without special ones, where a tokenizer was given.
        rewards: for each token, the reward of the prompt and the answer up to it.
        kl: for each token, as in `RewardGuidedOutput`, in nats.
        logprobs: log π of each token, under the full vocabulary.
        log_ratio: log q − log π of each token, q being what it was drawn from, as in `kl`.
        beta: of each token's step.
        error: why there is no answer, or none beyond `tokens`; None for an answer.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    rewards: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    log_ratio: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)
    error: str | None = None
