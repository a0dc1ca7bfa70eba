"""From what people have as a reward to reward models and scorers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ..models.reward_model import RewardModel, as_reward_model, is_causal
from ..models.vocab_head import VocabHead
from .base import Scorer
from .endpoint import RewardEndpoint
from .implicit import LogprobScorer
from .registry import KINDS
from .rewards import Reward, WeightedRewards, leaves_of
from .text import TextScorer

# What a causal language model is as a reward model, by the loss that trained it.
CAUSAL_KINDS: dict[str, Callable[[Any], Any]] = {
    loss: kind.make
    for kind in KINDS.values()
    if kind.holds == "CausalLM"
    for loss in kind.loss_types
}
_OF_ONE = ("reward_label", "reward_kind", "reward_head")


def is_scorer(reward_model: Any) -> bool:
    """Whether the object keeps the prefill / score / commit contract itself."""
    return isinstance(reward_model, Scorer)


def taken_apart(
    reward_model: Any, options: Reward, tokenizer: Any = None, own_prompt: bool = False
) -> Reward | WeightedRewards:
    """The same reward, of parts whose `model` is a `RewardModel` or a scorer.

    `options` (with any `model`) are the call's; `tokenizer` decodes for functions of texts. A part
    whose ids must be the language model's keeps its `reward_kind`; "logprob" is a pair's.

    Raises `ValueError` for what is no reward, and options that do not go with it.
    """
    if isinstance(reward_model, WeightedRewards):
        scorers_in(reward_model)
        for name in _OF_ONE:
            if getattr(options, name) is not None:
                raise ValueError(
                    f"{name} is given beside a sum of rewards, and is of one of them; pass "
                    f"rgtg_fast.Reward(part, {name}=...) as that part"
                )
        parts = [taken_apart(p, options, tokenizer, own_prompt) for p in reward_model.parts]
        return reward_model.of(parts, reward_model.combination)
    own = reward_model
    if not isinstance(own, Reward):
        own = Reward(own)
    elif isinstance(own.model, (Reward, WeightedRewards)):
        raise ValueError("Reward(...) is around one reward that is no Reward and no sum itself")
    given = {name: value for name, value in vars(own).items() if value is not None}
    return _one(Reward(**vars(options) | {"model": own.model} | given), tokenizer, own_prompt)


def _one(reward: Reward, tokenizer: Any, own_prompt: bool) -> Reward | WeightedRewards:
    model, kind = reward.model, reward.reward_kind
    if isinstance(model, (list, tuple)):
        return _pair(reward)
    if kind is not None:
        return replace(reward, model=_causal(reward))
    if is_scorer(model) or isinstance(model, VocabHead):
        _refuse_options(reward, type(model).__name__)
        return reward
    by_text = isinstance(model, str) or (
        callable(model) and not isinstance(model, (nn.Module, RewardModel))
    )
    if not by_text:
        rm = as_reward_model(model, reward.reward_head, reward.reward_label)
        return replace(reward, model=rm)
    function = RewardEndpoint(model) if isinstance(model, str) else model
    _refuse_options(reward, "a function of texts" if function is model else model)
    if not hasattr(tokenizer, "decode"):
        raise ValueError(
            "reward_model is a function of texts, which needs the language model's tokenizer to "
            f"decode its answers; got tokenizer={tokenizer!r}: pass tokenizer="
        )
    own = reward.reward_tokenizer if own_prompt else None
    return replace(reward, model=TextScorer(function, tokenizer, own))


def _causal(reward: Reward) -> Any:
    """The scorer of a causal language model."""
    kind, model = reward.reward_kind, reward.model
    if kind not in CAUSAL_KINDS:
        raise ValueError(
            f"reward_kind={kind!r}; pass one of {', '.join(CAUSAL_KINDS)} for a causal language "
            "model, or leave it out for a classifier"
        )
    if not isinstance(model, nn.Module) or not is_causal(model):
        raise ValueError(
            f"reward_kind={kind!r} is for a causal language model, and reward_model is "
            f"{type(model).__name__}; pass one (AutoModelForCausalLM), or leave reward_kind out"
        )
    _refuse_options(reward, f"reward_kind={kind!r}")
    return CAUSAL_KINDS[kind](model)


def _pair(reward: Reward) -> WeightedRewards:
    """The implicit reward of DPO: log π_policy - log π_ref of the answer."""
    models = list(reward.model)
    if len(models) != 2 or not all(isinstance(m, nn.Module) and is_causal(m) for m in models):
        names = ", ".join(type(m).__name__ for m in models)
        raise ValueError(
            f"reward_model is a {type(reward.model).__name__} of ({names}); pass a pair (policy, "
            "reference) of causal language models for DPO's implicit reward, or "
            "rgtg_fast.WeightedRewards([a, b], [0.7, 0.3]) for several rewards"
        )
    _refuse_options(reward, "a pair (policy, reference)")
    if reward.reward_kind is not None:
        raise ValueError(
            f"reward_kind={reward.reward_kind!r} is for one causal language model, and "
            "reward_model is a pair (policy, reference); leave it out"
        )
    parts = [replace(reward, model=LogprobScorer(m), reward_kind="logprob") for m in models]
    return WeightedRewards(parts, [1.0, -1.0])


def _refuse_options(reward: Reward, what: str) -> None:
    for name in ("reward_head", "reward_label"):
        if getattr(reward, name) is not None:
            raise ValueError(
                f"{name} is for a classifier, and reward_model is {what}; leave it out"
            )


def scorers_in(reward_model: Any) -> list[Any]:
    """The scorer objects of the caller's that a reward is made of; `ValueError` where one is there
    twice."""
    given = [leaf.model for leaf in leaves_of(reward_model) if is_scorer(leaf.model)]
    for i, one in enumerate(given):
        if any(one is other for other in given[:i]):
            raise ValueError(
                f"the scorer {type(one).__name__} stands twice in reward_model, and holds the text "
                "of one part; add up its weights, or make another scorer object"
            )
    return given
