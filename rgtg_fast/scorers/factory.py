"""From a reward model to the scorer that fits it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..models.on_base import OnBase
from ..models.reward_model import Label, RewardModel
from ..models.vocab_head import VocabHead
from .base import RewardModelScorer, Scorer
from .expand import ExpandScorer
from .joint import JointScorer
from .own_states import of_vocab_head
from .probe import WAYS, Verdict, probe
from .reencode import ReencodeScorer
from .retokenize import RetokenizeScorer
from .rewards import Reward, WeightedRewards
from .sources import taken_apart
from .tree import TreeScorer
from .weighted import combined

METHODS = ("auto", "tree", "expand", "reencode")
EOS_REWARDS = ("auto", "hidden", "previous")

_COST = {
    "expand": "k copies of the prefix cache in memory",
    "reencode": "a full forward over prefix and answer for each of the k candidates of every token",
}


def make_scorer(
    reward_model: Any,
    *,
    k: int,
    method: str = "auto",
    head: Callable[[Tensor], Tensor] | None = None,
    label: Label = None,
    kind: str | None = None,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    reward_tokenizer: Any = None,
    own_prompt: bool = False,
    eos_ids: Tensor | None = None,
    eos_reward: str = "auto",
    max_length: int | None = None,
    joint_way: str | None = None,
    backend: ops.Backend = "auto",
) -> Scorer:
    """The scorer for `reward_model`, its method chosen by a numerical probe.

    `tree` is used where it agrees with full forwards of the model, else `expand`, else `reencode`
    (with one `UserWarning` per model that names the reason and the cost). `method` asks for one; it
    raises `ValueError` where the probe says it would be wrong. `max_length` bounds prompt + answer,
    `vocab_size` is the language model's. Two tokenizers with different vocabularies mean that texts
    are decoded and encoded again, by a `RetokenizeScorer` where `method` is "auto" and a cache is
    right for the model; `own_prompt` says that the prompt is in the reward model's ids.
    A `reward_model` that is a scorer already is returned as it is: `help(rgtg_fast.scorers)` lists
    the kinds of those. It may be all that `generate` takes, sums of rewards too; `head`, `label`
    and `kind` are `generate`'s `reward_head`, `reward_label` and `reward_kind`.
    `joint_way` ("fused" or "masked") makes a `JointScorer`, which shares the forwards of the
    language model: for a `RewardHead` or `RewardAdapter` on the model that decodes; its logits are
    then taken from a `JointLogits`.

    Example: `make_scorer(rm, k=10).method` is "tree" for a Llama-like reward model.
    """
    defaults = Reward(None, label, kind, head, reward_tokenizer, method, eos_reward)
    options: dict[str, Any] = {
        "k": k,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "own_prompt": own_prompt,
        "eos_ids": eos_ids,
        "max_length": max_length,
        "joint_way": joint_way,
        "backend": backend,
    }
    apart = taken_apart(reward_model, defaults, tokenizer, own_prompt)
    return assembled(apart, lambda reward: scorer_of(reward, **options))


def assembled(reward: Reward | WeightedRewards, make: Callable[[Reward], Scorer]) -> Scorer:
    """The scorer of a reward that is taken apart; `make` makes those of its parts, in order."""
    if isinstance(reward, WeightedRewards):
        return combined([assembled(part, make) for part in reward.parts], reward.combination)
    return make(reward)


def scorer_of(
    reward: Reward,
    *,
    k: int,
    vocab_size: int | None,
    tokenizer: Any,
    own_prompt: bool,
    eos_ids: Tensor | None,
    max_length: int | None,
    joint_way: str | None,
    backend: ops.Backend,
) -> Scorer:
    """The scorer of a reward whose model is taken apart, or is one."""
    rm = reward.model
    if isinstance(rm, VocabHead):
        return of_vocab_head(rm, joint_way is not None, max_length or 0, backend)
    if not isinstance(rm, RewardModel):
        return rm
    method, reward_tokenizer = reward.reward_method or "auto", reward.reward_tokenizer
    as_text = reward_tokenizer is not None and not same_vocabulary(tokenizer, reward_tokenizer)
    tried = {"auto": ("tree", "expand"), "reencode": ()}.get(method, (method,))
    if as_text:
        tried = ("tree",) if method == "auto" else ()
    shared = joint_way is not None and isinstance(rm, OnBase)
    verdict = probe(rm, max_length, () if shared else tried, backend)
    chosen = "joint" if shared else _choose(rm, verdict, method, as_text)
    of_text = as_text or verdict.pooled
    common: dict[str, Any] = {
        "eos_ids": eos_ids,
        "eos_reward": _resolve_eos(rm, eos_ids, reward.eos_reward or "auto", of_text),
        "capacity": max_length or 0,
        "backend": backend,
    }
    scorer: RewardModelScorer
    if isinstance(rm, OnBase) and joint_way is not None:
        scorer = JointScorer(rm, k, fused=joint_way == "fused", **common)
    elif chosen == "reencode":
        if as_text:
            common |= {
                "tokenizer": tokenizer,
                "reward_tokenizer": reward_tokenizer,
                "prompt_tokenizer": reward_tokenizer if own_prompt else tokenizer,
            }
        way = verdict.way("tree") if as_text and method == "auto" else None
        if way is not None:
            common["capacity"] = 0  # in the language model's tokens, and these are others
            scorer = RetokenizeScorer(rm, k, fused=way == "fused", **common)
        else:
            scorer = ReencodeScorer(rm, k, pooled=verdict.pooled, **common)
    elif chosen == "tree":
        scorer = TreeScorer(rm, k, fused=verdict.way("tree") == "fused", **common)
    else:
        scorer = ExpandScorer(rm, k, **common)
    if not as_text:
        scorer.largest_id = (vocab_size or 0) - 1
    return scorer


def same_vocabulary(tokenizer: Any, reward_tokenizer: Any) -> bool:
    """Whether every token of the language model has the same id for the reward model."""
    if tokenizer is reward_tokenizer:
        return True
    theirs = reward_tokenizer.get_vocab()
    return all(theirs.get(token) == i for token, i in tokenizer.get_vocab().items())


def _choose(rm: RewardModel, verdict: Verdict, method: str, as_text: bool) -> str:
    if as_text:
        if method not in ("auto", "reencode"):
            raise ValueError(
                f"reward_method={method!r} shares token ids between the two models, but their "
                "tokenizers differ; use reward_method='auto' or 'reencode'"
            )
        return "reencode"
    if method != "auto":
        why = verdict.why_not(method)
        if why is not None:
            raise ValueError(
                f"reward_method={method!r} is wrong for {type(rm.model).__name__}: {why}; "
                "use reward_method='auto'"
            )
        return method
    chosen = verdict.method
    if chosen != "tree":
        reasons = "; ".join(f"{m}: {why}" for m in WAYS if (why := verdict.why_not(m)))
        _warn_once(
            rm,
            f"{type(rm.model).__name__} is scored by {chosen!r}, which costs {_COST[chosen]} "
            f"({reasons})",
        )
    return chosen


_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def _warn_once(rm: RewardModel, message: str) -> None:
    said = _warned.setdefault(rm.model, set())
    if message not in said:
        said.add(message)
        warnings.warn(message, stacklevel=4)


def _resolve_eos(rm: RewardModel, eos_ids: Tensor | None, eos_reward: str, whole: bool) -> str:
    if eos_reward != "auto" or eos_ids is None:
        return "hidden" if eos_reward == "auto" else eos_reward
    pad = getattr(rm.text_config, "pad_token_id", None)
    # whole: the text goes through the public forward, which applies its own rule for EOS.
    if whole or pad is None or pad not in eos_ids.tolist():
        return "hidden"
    _warn_once(
        rm,
        f"{type(rm.model).__name__} has pad_token_id == EOS ({pad}): its public forward gives "
        "prefix + EOS the reward of the prefix, and so does eos_reward='auto'; pass "
        "eos_reward='hidden' if it was trained to judge the EOS token itself",
    )
    return "previous"
