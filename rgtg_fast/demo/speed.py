"""Reward-guided decoding as it is published, and how long it takes next to `rgtg_fast.generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

import rgtg_fast
from rgtg_fast.models.foreign import CACHE, cache_of


@torch.no_grad()
def published_decode(
    lm: Any,
    reward_model: PreTrainedModel,
    input_ids: torch.Tensor,
    k: int,
    beta: float,
    max_new_tokens: int,
) -> torch.Tensor:
    """Sample from the ratio policy with k full reward-model forwards per token, one after another.

    `input_ids` is one prompt, int64 [1, L]; returns int64 [1, L + T]. Each candidate's reward comes
    from the reward model's public forward on the whole text so far. The LM keeps its KV cache, so
    the comparison is about the rewards alone.
    """
    past, token = None, input_ids
    for _ in range(max_new_tokens):
        out = lm(input_ids=token, use_cache=True, **{CACHE: past})
        past = cache_of(out)
        logprobs, candidates = out.logits[0, -1].float().log_softmax(-1).topk(k)  # [k], [k]
        rewards = [
            reward_model(input_ids=torch.cat([input_ids, candidate.view(1, 1)], 1)).logits[0, 0]
            for candidate in candidates
        ]
        scores = logprobs + beta * torch.stack(rewards)
        token = candidates[torch.multinomial(scores.softmax(-1), 1)].view(1, 1)
        input_ids = torch.cat([input_ids, token], dim=1)
        if token.item() == lm.config.eos_token_id:
            break
    return input_ids


def _tokens_per_second(decode: Callable[[torch.Tensor], torch.Tensor], prompts: list) -> float:
    """New tokens per second of `decode`, called on one prompt [1, L] after another."""
    decode(prompts[0])  # not timed: probes, thread pools and allocator start up
    started, tokens = time.perf_counter(), 0
    for prompt in prompts:
        tokens += decode(prompt).shape[1] - prompt.shape[1]
    return tokens / (time.perf_counter() - started)


def measure_speed(
    lm: Any,
    reward_model: PreTrainedModel,
    prompts: list[torch.Tensor],
    k: int,
    beta: float,
    max_new_tokens: int,
) -> dict[str, float]:
    """New tokens per second, one prompt [1, L] at a time, on the same prompts:

    `plain` Hugging Face generation without rewards, `guided` by `rgtg_fast.generate`, and
    `published`, guided by k full re-encodes per token (`published_decode`).
    """
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": max_new_tokens}
    guide = rgtg_fast.RewardGuided(reward_model, k=k, beta=beta)
    return {
        "plain": _tokens_per_second(lambda ids: lm.generate(ids, **settings), prompts),
        "guided": _tokens_per_second(
            lambda ids: lm.generate(ids, custom_generate=guide, **settings), prompts
        ),
        "published": _tokens_per_second(
            lambda ids: published_decode(lm, reward_model, ids, k, beta, max_new_tokens), prompts
        ),
    }
