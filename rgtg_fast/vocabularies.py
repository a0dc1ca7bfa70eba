"""Whether token ids mean the same to the language model and to a reward model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from .models.foreign import name_or_path
from .models.on_base import OnBase
from .models.parts import ModelParts
from .models.vocab_head import VocabHead
from .scorers.factory import same_vocabulary
from .scorers.rewards import Reward

# Of two models that differ by so many rows at most, one has tokens added: padding, rounded up for
# speed to a multiple of 128.
ADDED_ROWS = 128


def check_vocabularies(reward: Reward, rm: ModelParts, model: Any, tokenizer: Any) -> bool:
    """Whether answers must be re-encoded as text, as token ids mean different things."""
    reward_tokenizer = reward.reward_tokenizer
    if reward_tokenizer is not None:
        if tokenizer is None:
            raise ValueError(
                "reward_tokenizer is given without tokenizer; pass tokenizer= (the language "
                "model's) too, so that its answers can be decoded"
            )
        for name, given in (("tokenizer", tokenizer), ("reward_tokenizer", reward_tokenizer)):
            if not (hasattr(given, "get_vocab") and hasattr(given, "decode")):
                raise ValueError(f"{name} must be a transformers tokenizer; got {given!r}")
        as_text = not same_vocabulary(tokenizer, reward_tokenizer)
        if as_text and (reward.reward_kind is not None or isinstance(rm, VocabHead)):
            raise ValueError(
                "tokenizer and reward_tokenizer have different tokens, and a causal language model "
                f"as reward ({type(rm.model).__name__}) gives its rewards to the language model's "
                "tokens; pass a classifier, which reads text, or one with the same tokens"
            )
        if as_text and reward_tokenizer.pad_token_id is None:
            raise ValueError(
                "reward_tokenizer has no padding token, and texts of several lengths are encoded "
                "at once; set reward_tokenizer.pad_token = reward_tokenizer.eos_token"
            )
        return as_text
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if rm.vocab_size == vocab_size:
        return False
    if abs(rm.vocab_size - vocab_size) > ADDED_ROWS or _other_specials(model, rm):
        raise ValueError(
            f"reward_model has a vocabulary of {rm.vocab_size} tokens and the language model one "
            f"of {vocab_size}; pass reward_tokenizer= and tokenizer= (ids are shared where the two "
            "agree, texts re-encoded where they do not)"
        )
    lacks = ""
    if rm.vocab_size < vocab_size:
        lacks = (
            f" (those from {rm.vocab_size} on have no reward and are never chosen, but for a "
            "backspace)"
        )
    warnings.warn(
        f"reward_model has {rm.vocab_size} tokens and the language model {vocab_size}: taken for "
        f"the same with tokens added (padding), and ids are shared{lacks}; pass tokenizer= and "
        "reward_tokenizer= to have them compared",
        stacklevel=3,
    )
    return False


def check_ends(name: str, rows: int, ends: Collection[int]) -> None:
    """`ValueError` where each of `ends`, which are the ids that end an answer, is beyond the `rows`
    of a reward model: none of them would ever be chosen."""
    if ends and all(end >= rows for end in ends):
        raise ValueError(
            f"{name} has {rows} tokens, and what ends an answer (eos_token_id) is {sorted(ends)}: "
            "it has no reward, so no answer would end before max_new_tokens; pass a reward model "
            "that has the token (resize_token_embeddings), or eos_token_id= with one it has"
        )


_compared: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def check_families(model: Any, rm: ModelParts, reward_tokenizer: Any) -> None:
    """Warns, once for a pair of models that share token ids, where neither BOS nor EOS (of those
    that both configurations know) has an id in common. One suffices: the chat models of a family
    often have another EOS than its base models."""
    if reward_tokenizer is not None or isinstance(rm, OnBase | VocabHead):
        return  # the vocabularies were compared, or the tokenizer is one
    others = _compared.setdefault(model, WeakSet())
    if rm.model in others:
        return
    others.add(rm.model)
    differ = _other_specials(model, rm)
    if differ:
        names = [name_or_path(c) or c.model_type for c in (model.config, rm.config)]
        warnings.warn(
            f"the language model ({names[0]}) and reward_model ({names[1]}) have vocabularies of "
            f"one size and other ids for special tokens ({differ}), so an id may mean two texts; "
            "pass tokenizer= and reward_tokenizer=: texts are re-encoded where the two differ",
            stacklevel=3,
        )


def _other_specials(model: Any, rm: ModelParts) -> str:
    """How BOS and EOS differ, where neither (of those that both models' configurations know) has an
    id in common; else nothing."""
    ours = (model.config, model.config.get_text_config(), model.generation_config)
    theirs = (rm.config, rm.text_config, getattr(rm.model, "generation_config", None))
    both = [(k, _ids(k, ours, rm), _ids(k, theirs, rm)) for k in ("bos", "eos")]
    known = [(kind, a, b) for kind, a, b in both if a and b]
    if any(a & b for _, a, b in known):
        return ""
    return " and ".join(f"{kind} {sorted(a)} against {sorted(b)}" for kind, a, b in known)


def _ids(kind: str, configs: Iterable[Any], rm: ModelParts) -> set[int]:
    """The ids that any of `configs` gives; one beyond the vocabulary is a class's default."""
    given = [getattr(config, f"{kind}_token_id", None) for config in configs]
    ids = [i for value in given for i in (value if isinstance(value, (list, tuple)) else [value])]
    return {i for i in ids if isinstance(i, int) and 0 <= i < rm.vocab_size}
