"""From the engine's settings to a scorer whose rows come and go, and what its rows may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from ..evaluation.rewards import Loaded, guiding_options
from ..models.parts import ModelParts
from ..scorers.base import RowScorer
from ..scorers.factory import make_scorer, same_vocabulary
from ..scorers.next_token import NextTokenScorer
from ..scorers.rewards import WeightedRewards
from ..scorers.weighted import leaves_of
from ..validation import position_limit
from ..vocabularies import ADDED_ROWS
from .rows import RewardRows
from .settings import MOST_CANDIDATES, Settings, leaves

GIB = 1 << 30
K = 10  # candidates, where nothing says how many
# While rows are laid out anew, there are the old store and the new one.
STORES = 2


@dataclass
class Guide:
    """What the settings come to: the rows of the reward, the k and beta of requests that say none,
    and what a preset cuts from the language model's logits, functions of (None, logits)."""

    rows: RewardRows
    k: int
    beta: float
    warpers: list[Callable[[Any, Tensor], Tensor]]


def load_guide(settings: Settings, model_config: Any, device: torch.device) -> Guide:
    """The guide, its reward model on `device`, within the budget.

    `model_config` is vLLM's, of the language model. Raises `ValueError` for a reward that cannot be
    had by rows, does not share the language model's tokens, or has not the positions or the memory
    for a text of `max_model_len` tokens.
    """
    longest = model_config.max_model_len
    tokenizer = _tokenizer(model_config.tokenizer or model_config.model)
    for name, own in _models_of(settings.reward_model):
        _check_tokens(name, own, tokenizer, model_config)
    made = _made(settings, model_config.dtype, device)
    k = made.k
    scorer = make_scorer(
        made.reward,
        k=k,
        method=settings.reward_method,
        label=settings.reward_label,
        kind=made.kind,
        vocab_size=model_config.get_vocab_size(),
        tokenizer=tokenizer,
        eos_ids=_eos(model_config),
        eos_reward=made.eos_reward,
        max_length=longest,
    )
    if not isinstance(scorer, RowScorer):
        raise ValueError(
            f"reward_model={settings.reward_model!r} is scored by {type(scorer).__name__}, whose "
            "rows cannot come and go as requests do; pass a classifier, a causal language model "
            "with reward_kind, a pair or a sum of these, a URL or a function"
        )
    models = [leaf.rm for leaf in leaves_of(scorer) if hasattr(leaf, "rm")]
    for model in models:
        _check_positions(model, longest)
    for leaf in leaves_of(scorer):
        if isinstance(leaf, NextTokenScorer):
            leaf.capacity = longest
    sizes = [rm.vocab_size for rm in models]
    rows = RewardRows(scorer, k, _tokens(settings, k, scorer), min(sizes, default=None))
    if rows.size(longest) > rows.budget:
        need = settings.kv_gib * rows.size(longest) / rows.budget
        raise ValueError(
            f"kv_gib={settings.kv_gib} holds {rows.budget} tokens of the reward model, and one "
            f"request may need {rows.size(longest)}; pass kv_gib>={need:.3g}, or a smaller "
            "--max-model-len"
        )
    return Guide(rows, k, made.beta, made.warpers)


def bytes_per_token(rm: ModelParts) -> int:
    """Bytes of the keys and values of a token."""
    config = rm.text_config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = torch.empty(0, dtype=rm.dtype, device="meta").element_size()
    return 2 * config.num_hidden_layers * kv_heads * width * size


def _tokens(settings: Settings, k: int, scorer: Any) -> int:
    """Tokens that fit the memory; a scorer that keeps no keys is counted as if it did."""
    per_token = 0
    for leaf in leaves_of(scorer):
        if hasattr(leaf, "rm"):
            copies = k if getattr(leaf, "method", "") == "expand" else 1
            per_token += copies * bytes_per_token(leaf.rm)
    return int(settings.kv_gib * GIB / STORES / max(per_token, 8))


@dataclass
class _Made:
    """The reward of the settings, and what a preset says about it."""

    reward: Any
    kind: str | None
    eos_reward: str
    k: int
    beta: float
    warpers: list[Any]


def _made(settings: Settings, dtype: torch.dtype, device: torch.device) -> _Made:
    """The reward, its models loaded. The settings go over what the preset says."""
    own = str(dtype).removeprefix("torch.") if settings.dtype == "auto" else settings.dtype
    given = {"reward_kind": settings.reward_kind, "k": settings.k, "beta": settings.beta}
    given = {name: value for name, value in given.items() if value is not None}
    found = guiding_options(
        settings.reward_model, settings.preset, given, Loaded(None, None, own, str(device))
    )
    said = (settings.preset or {}).get("name")
    k, beta = found.get("k", K), found.get("beta", 1.0)
    if k is None:
        raise ValueError(
            f"preset={said!r} is over the whole vocabulary, and here {MOST_CANDIDATES} candidates "
            f"are the most; pass k={MOST_CANDIDATES} for the likeliest tokens of the language model"
        )
    if found.get("temperature", 1.0) != 1.0:
        raise ValueError(
            f"preset={said!r} is at temperature={found['temperature']:.4g}, and the temperature is "
            f"a request's; leave the preset out, pass k={k} and beta={beta:.4g}, and have requests "
            f"pass temperature={found['temperature']:.4g}"
        )
    reward, bounds = found["reward_model"], found.get("reward_range")
    if bounds is not None:
        reward = WeightedRewards([reward], bounds=bounds)
    eos_reward = settings.eos_reward
    if eos_reward == "auto":
        eos_reward = found.get("eos_reward", eos_reward)
    warpers = found.get("logits_processor", [])
    return _Made(reward, found.get("reward_kind"), eos_reward, k, beta, warpers)


def _models_of(reward: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names of the models in a reward, each with that of its tokenizer."""
    found = []
    for leaf in leaves(reward):
        names = [leaf[name] for name in ("model", "policy", "reference") if name in leaf]
        found += [(name, leaf.get("tokenizer", name)) for name in names]
    return found


def _check_positions(rm: ModelParts, longest: int) -> None:
    limit = position_limit(rm.base, rm.text_config)
    if limit is not None and limit < longest:
        raise ValueError(
            f"reward_model {type(rm.model).__name__} has {limit} positions, and requests may have "
            f"{longest} tokens; start vLLM with --max-model-len {limit}"
        )


def _tokenizer(name: str) -> Any:
    """A tokenizer by its name, or None."""
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (ImportError, OSError, ValueError):
        return None


def _check_tokens(name: str, of: str, tokenizer: Any, model_config: Any) -> None:
    """`ValueError` where the reward model's token ids, of the tokenizer `of`, are not the language
    model's."""
    own = _tokenizer(of)
    if own is not None and tokenizer is not None:
        if not same_vocabulary(tokenizer, own):
            raise ValueError(
                f"reward_model={name!r} has other tokens than the language model, and rewards are "
                "of the language model's token ids; pass one with the same tokenizer, or serve it "
                "and pass its URL: texts are then sent to it"
            )
        return
    try:
        rows = transformers.AutoConfig.from_pretrained(name).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise ValueError(f"reward_model={name!r} cannot be loaded: {error}") from None
    if abs(rows - model_config.get_vocab_size()) > ADDED_ROWS:
        raise ValueError(
            f"reward_model={name!r} has {rows} tokens and the language model "
            f"{model_config.get_vocab_size()}; pass one with the same tokenizer"
        )


def _eos(model_config: Any) -> Tensor | None:
    """The ids that end an answer, of the generation configuration, int64 [n]."""
    found = (model_config.try_get_generation_config() or {}).get("eos_token_id")
    if found is None:
        found = getattr(model_config.hf_text_config, "eos_token_id", None)
    if found is None:
        return None
    ids = list(found) if isinstance(found, (list, tuple)) else [found]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")
