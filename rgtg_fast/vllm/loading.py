"""From the engine's settings to a scorer whose rows come and go, and what its rows may take."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from ..models.parts import ModelParts
from ..scorers.base import RowScorer
from ..scorers.factory import make_scorer, same_vocabulary
from ..scorers.next_token import NextTokenScorer
from ..scorers.weighted import leaves_of
from ..validation import position_limit
from ..vocabularies import ADDED_ROWS
from .rows import RewardRows
from .settings import Settings

GIB = 1 << 30
# While rows are laid out anew, there are the old store and the new one.
STORES = 2


def load_rows(settings: Settings, model_config: Any, device: torch.device) -> RewardRows:
    """The rows of the reward model, on `device`, within the budget.

    `model_config` is vLLM's, of the language model. Raises `ValueError` for a reward that cannot be
    had by rows, does not share the language model's tokens, or has not the positions or the memory
    for a text of `max_model_len` tokens.
    """
    longest, k = model_config.max_model_len, settings.k
    tokenizer = _tokenizer(model_config.tokenizer or model_config.model)
    reward = settings.reward_model
    if not settings.is_endpoint:
        names = [reward] if isinstance(reward, str) else list(reward)
        for name in names:
            _check_tokens(name, tokenizer, model_config)
        loaded = [_load(name, settings, model_config.dtype, device) for name in names]
        for model in loaded:
            _check_positions(model, longest)
        reward = loaded[0] if isinstance(settings.reward_model, str) else loaded
    scorer = make_scorer(
        reward,
        k=k,
        method=settings.reward_method,
        label=settings.reward_label,
        kind=settings.reward_kind,
        vocab_size=model_config.get_vocab_size(),
        tokenizer=tokenizer,
        eos_ids=_eos(model_config),
        eos_reward=settings.eos_reward,
        max_length=longest,
    )
    if not isinstance(scorer, RowScorer):
        raise ValueError(
            f"reward_model={settings.reward_model!r} is scored by {type(scorer).__name__}, whose "
            "rows cannot come and go as requests do; pass a classifier, a causal language model "
            "with reward_kind, a pair of these, or a URL"
        )
    models = [leaf.rm for leaf in leaves_of(scorer) if hasattr(leaf, "rm")]
    for leaf in leaves_of(scorer):
        if isinstance(leaf, NextTokenScorer):
            leaf.capacity = longest
    sizes = [rm.vocab_size for rm in models]
    rows = RewardRows(scorer, k, _tokens(settings, scorer), min(sizes, default=None))
    if rows.size(longest) > rows.budget:
        need = settings.kv_gib * rows.size(longest) / rows.budget
        raise ValueError(
            f"kv_gib={settings.kv_gib} holds {rows.budget} tokens of the reward model, and one "
            f"request may need {rows.size(longest)}; pass kv_gib>={need:.3g}, or a smaller "
            "--max-model-len"
        )
    return rows


def bytes_per_token(rm: ModelParts) -> int:
    """Bytes of the keys and values of a token."""
    config = rm.text_config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = torch.empty(0, dtype=rm.dtype, device="meta").element_size()
    return 2 * config.num_hidden_layers * kv_heads * width * size


def _tokens(settings: Settings, scorer: Any) -> int:
    """Tokens that fit the memory; a scorer that keeps no keys is counted as if it did."""
    per_token = 0
    for leaf in leaves_of(scorer):
        if hasattr(leaf, "rm"):
            copies = settings.k if getattr(leaf, "method", "") == "expand" else 1
            per_token += copies * bytes_per_token(leaf.rm)
    return int(settings.kv_gib * GIB / STORES / max(per_token, 8))


def _load(name: str, settings: Settings, dtype: torch.dtype, device: torch.device) -> Any:
    causal = settings.is_pair or settings.reward_kind is not None
    kind = "CausalLM" if causal else "SequenceClassification"
    own = dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    loader = getattr(transformers, f"AutoModelFor{kind}")
    try:
        model = loader.from_pretrained(name, dtype=own)
    except (OSError, ValueError) as error:
        raise ValueError(f"reward_model={name!r} cannot be loaded: {error}") from None
    return model.to(device).eval().requires_grad_(False)


def _check_positions(model: Any, longest: int) -> None:
    parts = ModelParts(model)
    limit = position_limit(parts.base, parts.text_config)
    if limit is not None and limit < longest:
        raise ValueError(
            f"reward_model {type(model).__name__} has {limit} positions, and requests may have "
            f"{longest} tokens; start vLLM with --max-model-len {limit}"
        )


def _tokenizer(name: str) -> Any:
    """A tokenizer by its name, or None."""
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (ImportError, OSError, ValueError):
        return None


def _check_tokens(name: str, tokenizer: Any, model_config: Any) -> None:
    """`ValueError` where the reward model's token ids are not the language model's."""
    own = _tokenizer(name)
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
