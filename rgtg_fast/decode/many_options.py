"""What `generate_many` takes, checked before a prompt is read."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from ..models.foreign import CACHE

# What may be a tensor [N] with a value for each prompt.
OF_PROMPTS = ("beta", "temperature", "max_new_tokens", "seed")
_OF_A_BATCH = "belongs to a batch of one call; every prompt is a row by itself here"
_REFUSED = {
    "num_return_sequences": "give a prompt several times for several answers",
    "return_dict_in_generate": "an answer always has its rewards and KL",
    "attention_mask": "prompts come without padding",
    "reward_input_ids": "the reward model sees each prompt as it is",
    "reward_attention_mask": "the reward model sees each prompt as it is",
    "streamer": "answers come in the order they end; call generate for one",
    **dict.fromkeys(("assistant_model", "speculate"), "its rows take one token at a time"),
    **dict.fromkeys(("cuda_graph", "compile"), "its rows come and go, and no step is like another"),
    "synced_gpus": "ranks would wait for each other's prompts",
    **dict.fromkeys(("output_candidates", "output_scores", "output_logits"), _OF_A_BATCH),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "compact"), _OF_A_BATCH),
    **dict.fromkeys(("inputs", "input_ids", "inputs_embeds", "position_ids"), _OF_A_BATCH),
    **dict.fromkeys((CACHE, "cache", "past_key_values", "cache_implementation"), _OF_A_BATCH),
}
# What of these may be given, as it asks for nothing.
_NO_MATTER = {"speculate": ("auto", False), "compile": ("auto", False), "cuda_graph": (False,)}


def check_options(options: dict[str, Any]) -> None:
    """Refuse those of `generate` that are about its batch."""
    for name, instead in _REFUSED.items():
        given = options.get(name)
        if given is not None and given not in _NO_MATTER.get(name, ()):
            raise ValueError(f"{name}= is not an option of generate_many: {instead}")
    if options.get("speculate", "auto") not in (False, "auto"):
        raise ValueError(
            f"speculate={options['speculate']!r}: rows of generate_many take one token at a time; "
            "leave it out"
        )


def new_tokens(options: dict[str, Any]) -> Tensor | None:
    """`max_new_tokens` where it is a tensor [N]; the least of it then stands in `options`, for what
    is asked before there is a prompt."""
    given = options.get("max_new_tokens")
    if not isinstance(given, Tensor) or given.dim() == 0:
        return None
    if given.dim() != 1 or given.dtype != torch.int64 or not len(given) or given.min() < 1:
        raise ValueError(
            f"max_new_tokens={given!r}; pass an int, or an int64 tensor [N] of at least 1 for each "
            "prompt"
        )
    options["max_new_tokens"] = int(given.min())
    return given


def check_tokenizer(tokenizer: Any) -> None:
    """It must encode texts and decode ids."""
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise ValueError(f"tokenizer must be a transformers tokenizer; got {tokenizer!r}")


def check_prompts(prompts: Any, of_prompts: dict[str, Any]) -> None:
    """`prompts` must be several, and where they can be counted, the options `of_prompts` that are
    tensors [N] must have a value for each."""
    one = isinstance(prompts, (str, bytes, Mapping))
    one = one or (isinstance(prompts, Tensor) and prompts.dim() < 2)
    if one or not (hasattr(prompts, "__iter__") or hasattr(prompts, "__getitem__")):
        raise ValueError(
            "prompts must be an iterable of texts, lists of ids or tensors [P]; got "
            f"{type(prompts).__name__}; pass a list of prompts, with one in it for a single one"
        )
    if not isinstance(prompts, Sized):
        return
    for name, value in of_prompts.items():
        if isinstance(value, Tensor) and value.dim() and len(value) != len(prompts):
            raise ValueError(
                f"{name} has {len(value)} values for {len(prompts)} prompts; pass one for each, or "
                "a number"
            )
