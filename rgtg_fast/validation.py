"""Checks at the public edge: what can be known before a forward pass is said before it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from .decode import options
from .models.foreign import CACHE, CACHE_NAMES
from .ops import BACKENDS
from .scorers.factory import EOS_REWARDS, METHODS
from .scorers.rewards import leaves_of

T = TypeVar("T")


_INSTEAD = {
    "generator": "seed= (an int, or int64 [B] with one seed per row)",
    "custom_generate": "model.generate(custom_generate=rgtg_fast.RewardGuided(...))",
    "w": "beta=",
    "weight": "beta=",
    "topk": "k=",
}
# HF switches to another decoding loop for these; each would drop the reward in silence.
_OTHER_MODES = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "token_healing": False,
}


# Options of generation that count something, and the least each may be.
COUNTS = {"max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0}
COUNTS |= {"num_return_sequences": 1, "top_k": 0}
CHOICES = {"eos_reward": EOS_REWARDS, "reward_method": METHODS, "backend": BACKENDS}
CHOICES |= {"candidates": ("lm", "sum")}


def check_options(guide: Any) -> None:
    """The options of a `RewardGuided`, as far as they can be judged without a model; numpy's ints
    become Python's."""
    if guide.k is not None:
        guide.k = options.integer("k", guide.k, 1, 64)
    options.number("beta", guide.beta)
    options.choices(vars(guide), CHOICES)
    if guide.temperature is not None:
        options.temperature(guide.temperature)
    guide.seed = options.seed(guide.seed)
    if guide.sync_every is not None:
        guide.sync_every = options.integer("sync_every", guide.sync_every, 1)
    options.reward_range(guide.reward_range, guide.prune)
    options.steering(guide.beta_schedule, guide.kl_budget, guide.min_entropy)
    options.flags({n: getattr(guide, n) for n in ("output_candidates", "compact")})
    if guide.k is None or guide.candidates == "sum" or guide.guided_top_p is not None:
        options.vocabulary(guide)
    options.flags({n: getattr(guide, n) for n in ("check_nan", "cuda_graph")}, or_none=True)
    options.auto_or_flag("compile", guide.compile)
    guide.speculate = options.speculate(guide.speculate, guide.assistant_model)
    if guide.streamer is not None:
        check_streamers(None, guide.streamer)


def names_checked(cls: type[T]) -> type[T]:
    """The class with a `ValueError` for an unknown keyword that names the one that was meant."""
    init, known = cls.__init__, inspect.signature(cls).parameters

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                hint = options.did_you_mean(name, known)
                raise ValueError(f"{name}= is not an option of {cls.__name__}{hint}")
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


def prunes(scorer: Any, prune: bool | None, all_rewards: bool) -> bool:
    """Whether candidates that cannot win go unscored; `all_rewards`: the caller wants every one."""
    can = bool(getattr(scorer, "can_skip", False))
    if prune and not can:
        raise ValueError(
            f"prune=True, but {type(scorer).__name__} scores all candidates or none; leave prune "
            "out (all are scored), or use reward_method='tree' on a CPU or 'reencode'"
        )
    return (can and not all_rewards) if prune is None else prune


def knows_every_token(reward: Any, k: int | None) -> None:
    """`ValueError` where a part of a reward that is taken apart gives those of candidates alone."""
    for part in leaves_of(reward):
        if not hasattr(part.model, "score_all"):
            model = getattr(part.model, "model", part.model)
            given = "k=None" if k is None else "candidates='sum'"
            raise ValueError(
                f"{given} needs the reward of every token, and {type(model).__name__} gives those "
                "of candidates; pass a causal language model with reward_kind='genarm' or 'farma', "
                "a pair (policy, reference), a VocabHead, a scorer with score_all(), or a sum of "
                "these; or else k=10, candidates='lm'"
            )


def check_model(model: Any) -> None:
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise ValueError(
            f"model must be a causal language model with a generate method; got "
            f"{type(model).__name__}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; pass a decoder-only causal "
            "language model"
        )


def check_call(model: Any, inputs: Any, kwargs: dict[str, Any], own: Iterable[str]) -> None:
    """Refuse arguments of `rgtg_fast.generate` that HF would misread or ignore; `own` are the names
    of its own ones. A cache given under its other name is put under the one that this
    version of transformers has for it."""
    check_model(model)
    for name in CACHE_NAMES:
        if name != CACHE and name in kwargs:
            if CACHE in kwargs:
                raise ValueError(f"{name}= and {CACHE}= are two names of one argument; pass one")
            kwargs[CACHE] = kwargs.pop(name)
    _check_keywords(model, kwargs, own)
    given = kwargs.get("generation_config")
    if not (given is None or isinstance(given, GenerationConfig)):
        raise ValueError(f"generation_config must be a GenerationConfig; got {given!r}")
    check_counts(kwargs, dict.get)
    check_counts(given)
    options.lists({name: kwargs.get(name) for name in ("logits_processor", "stopping_criteria")})
    options.eos(kwargs.get("eos_token_id"))
    check_streamers(kwargs.get("streamer"), None)
    check_mode({name: kwargs.get(name) for name in _OTHER_MODES})
    if kwargs.get("cache_implementation") == "paged":
        raise ValueError(
            "cache_implementation='paged' hands the batch to another decoding loop; leave it out, "
            "or pass 'static' or 'dynamic'"
        )
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if ids is None:
        if kwargs.get("inputs_embeds") is None:
            raise ValueError("input_ids is missing; pass token ids int64 [B, P]")
        return
    check_ids("input_ids", ids)
    check_mask("attention_mask", kwargs.get("attention_mask"), ids, exact=CACHE not in kwargs)


def check_counts(config: Any, get: Any = getattr) -> None:
    """The options in COUNTS, where they are given and not None, must be whole numbers in range."""
    for name, least in COUNTS.items():
        value = get(config, name, None)
        if value is not None and not (type(value) is int and value >= least):
            options.integer(name, value, least)


def check_mode(asked: dict[str, Any]) -> None:
    """Refuse the options that would switch Hugging Face to another decoding loop."""
    for name, value in asked.items():
        if value is not None and value != _OTHER_MODES[name]:
            raise ValueError(
                f"{name}={value!r} selects another decoding mode; guided decoding is greedy or "
                f"sampled: leave {name} out, and pass num_return_sequences= for several answers"
            )


def check_streamers(of_call: Any, of_guide: Any) -> None:
    """A call has one streamer, of its own or of its `RewardGuided`, with `put` and `end`."""
    for streamer in (of_call, of_guide):
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(
                f"streamer must be a transformers streamer, with put and end; got {streamer!r}"
            )
    if of_call is not None and of_guide is not None and of_guide is not of_call:
        raise ValueError(
            "streamer is given to model.generate and to RewardGuided; pass one of them"
        )


def check_stop_strings(stop_strings: Any, tokenizer: Any) -> None:
    """Stop strings must be a text or texts, none of them empty, and come with a tokenizer."""
    texts = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) and t for t in texts):
        raise ValueError(
            f"stop_strings={stop_strings!r}; pass a text or a list of texts, none of them empty"
        )
    if tokenizer is None:
        raise ValueError(f"stop_strings={stop_strings!r} needs the tokenizer; pass tokenizer=")


def _check_keywords(model: Any, kwargs: dict[str, Any], own: Iterable[str]) -> None:
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    known = {*GenerationConfig().to_dict(), *_OTHER_MODES, *own, "return_dict"}
    for function in (inner.generate, inner.forward, inner.prepare_inputs_for_generation):
        known |= set(inspect.signature(function).parameters)
    known -= {"kwargs", "self", "custom_generate"}
    for name in kwargs:
        if name in known and name != "generator":
            continue
        if name in _INSTEAD:
            raise ValueError(f"{name}= is not an argument of guided generate; use {_INSTEAD[name]}")
        hint = options.did_you_mean(name, known)
        raise ValueError(f"{name}= is not an argument of guided generate{hint}")


def check_ids(name: str, ids: Any) -> None:
    """Token ids must be an int64 or int32 tensor [B, P] with B, P >= 1."""
    if isinstance(ids, Mapping) and "input_ids" in ids:
        raise ValueError(
            f"{name} must be an int64 tensor [B, P]; got a {type(ids).__name__} with "
            f"{', '.join(ids)}: pass generate(model, **enc, ...), with two stars"
        )
    if not isinstance(ids, Tensor):
        raise ValueError(
            f"{name} must be an int64 tensor [B, P]; got {type(ids).__name__}; "
            "pass tokenizer(..., return_tensors='pt') or torch.tensor(...)"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 token ids; got {ids.dtype}; pass {name}.long()")
    if ids.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, which holds no tokens")
    if ids.dim() != 2:
        raise ValueError(
            f"{name} must have shape [B, P]; got {list(ids.shape)}; "
            f"pass {name}[None] for a single prompt"
        )
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(
            f"{name} is empty (shape {list(ids.shape)}); pass at least one row and one token, "
            "for example the BOS token"
        )


def check_mask(name: str, mask: Any, ids: Tensor, exact: bool = True) -> None:
    """A mask must be [B, P] like its ids, 1 for real tokens, padding on the left."""
    if mask is None:
        return
    fits = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == ids.shape[0]
    if not fits or (exact and mask.shape != ids.shape):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must have the shape of its ids {list(ids.shape)}; got {got}")
    check_left_padded(name, mask)


def check_left_padded(name: str, mask: Tensor) -> None:
    if mask.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, which holds no mask")
    empty = (mask == 0).all(-1)
    if empty.any():
        raise ValueError(
            f"{name} row {int(empty.nonzero()[0, 0])} is all zero: an empty prompt; give it at "
            "least one token, for example the BOS token"
        )
    if not (mask[:, -1] != 0).all():
        row = int((mask[:, -1] == 0).nonzero()[0, 0])
        raise ValueError(
            f"{name} row {row} ends in padding; decoding needs padding on the left: set "
            "tokenizer.padding_side = 'left'"
        )


def check_range(name: str, ids: Tensor, rows: int, owner: str) -> None:
    """Every id must have a row in the embedding table of `owner`."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        bad = low if low < 0 else high
        raise ValueError(
            f"{name} contains id {bad}, but {owner} has {rows} tokens (0 to {rows - 1}); "
            "use the tokenizer that belongs to the model"
        )


def check_config(model: Any, config: GenerationConfig, k: int | None, vocab_size: int) -> None:
    """The merged generation configuration, and k against the vocabulary."""
    check_model(model)
    check_counts(config)
    check_mode({name: getattr(config, name, None) for name in _OTHER_MODES})
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"the generation configuration selects {mode.value}; "
            "guided decoding is greedy or sampled"
        )
    if k is not None and k > vocab_size:
        raise ValueError(
            f"k={k} candidates asked for but the vocabulary has {vocab_size} tokens; "
            f"pass k<={vocab_size}"
        )
    for name, low_open in (("top_p", True), ("min_p", False), ("typical_p", True)):
        value = getattr(config, name, None)
        if value is not None and not (0 < value <= 1 or (value == 0 and not low_open)):
            raise ValueError(f"{name}={value} must lie in (0, 1]; leave it out to switch it off")


def check_length(name: str, owner: str, mask: Tensor, new_tokens: int, limit: int | None) -> None:
    """Prompt and answer must fit the positions a model has."""
    prompt = int(mask.sum(-1).max())
    if limit is not None and prompt >= limit:
        raise ValueError(
            f"{name} of {prompt} tokens leaves no room for an answer: {owner} has {limit} "
            "positions; pass shorter prompts"
        )
    if limit is not None and prompt + new_tokens > limit:
        raise ValueError(
            f"{name} of {prompt} tokens and {new_tokens} new ones make {prompt + new_tokens}, but "
            f"{owner} has {limit} positions; pass max_new_tokens<={limit - prompt} "
            "or shorter prompts"
        )


def position_limit(base: nn.Module, config: Any) -> int | None:
    """How many tokens a model has positions for; None where its configuration does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    for name, module in base.named_modules():
        # RoBERTa-like tables start counting after the padding index.
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return module.num_embeddings - module.padding_idx - 1  # type: ignore[operator,return-value]
    return limit if isinstance(limit, int) and limit > 0 else None


def per_row(name: str, value: Any, prompts: int, batch: int, device: torch.device) -> Tensor:
    """A number, or a tensor of one value per prompt or per row, as fp32 [B] on `device`."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return torch.full((batch,), float(value), dtype=torch.float32, device=device)
    if value.shape[0] not in (prompts, batch):
        raise ValueError(
            f"{name} has {value.shape[0]} values for {prompts} prompts and {batch} rows; "
            "pass a float or one value per prompt"
        )
    if value.shape[0] != batch:
        value = value.repeat_interleave(batch // prompts)
    return value.to(device=device, dtype=torch.float32)
