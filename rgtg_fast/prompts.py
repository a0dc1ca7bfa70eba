"""The prompts of a call: what is known of them, after every check that needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from . import validation as check
from .models import foreign
from .models.parts import ModelParts
from .models.reward_model import RewardModel
from .models.vocab_head import VocabHead
from .scorers.rewards import Reward, leaves_of
from .scorers.rewrite import RewriteScorer
from .vocabularies import check_ends, check_families, check_vocabularies


class CheckedPrompts(NamedTuple):
    """Prompts of a call: the language model's vocabulary, their mask [B, P], ids and mask as the
    reward model sees them, the tokens an answer may have, and of each part of the reward whether it
    reads text."""

    vocab_size: int
    mask: Tensor
    reward_prompt: tuple[Tensor, Tensor]
    new_tokens: int
    as_text: tuple[bool, ...]


def check_prompts(
    guide: Any,
    reward: Any,
    model: Any,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> CheckedPrompts:
    """What is known of the prompts of a call of `guide` with a reward that is taken apart, after
    every check of them."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    check.check_config(model, config, guide.k, vocab_size)
    mask = _lm_mask(guide, model, input_ids, config, model_kwargs, vocab_size)
    parts = [reward] if isinstance(reward, Reward) else leaves_of(reward)
    rms = [parts_of(part) for part in parts]
    copies = config.num_return_sequences or 1
    reward_prompt = _reward_prompt(guide, rms, input_ids, mask, copies)
    new_tokens = config.max_length - input_ids.shape[1]
    as_text = []
    for part, rm in zip(parts, rms, strict=True):
        by_text = rm is not None and check_vocabularies(part, rm, model, guide.tokenizer)
        if rm is not None:
            own_prompt = guide.reward_input_ids is not None
            _check_reward_prompt(rm, *reward_prompt, new_tokens, own_prompt, by_text)
            check_families(model, rm, part.reward_tokenizer)
        if isinstance(part.model, RewriteScorer):
            _check_drafts(part.model, reward_prompt[1], new_tokens)
        rows = rm.vocab_size if rm is not None else getattr(part.model, "vocabulary", None)
        if rows is not None and rows < vocab_size and not by_text:
            eos = foreign.eos_tensor(config)
            check_ends("reward_model", rows, [] if eos is None else eos.tolist())
        as_text.append(by_text)
    return CheckedPrompts(vocab_size, mask, reward_prompt, new_tokens, tuple(as_text))


def parts_of(reward: Reward) -> ModelParts | None:
    """The model of a part of a reward, taken apart, where its ids and positions are to be checked:
    of a scorer of the caller's, they are the caller's."""
    if isinstance(reward.model, RewardModel | VocabHead):
        return reward.model
    return reward.model.rm if reward.reward_kind is not None else None


def _lm_mask(
    guide: Any,
    model: Any,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    vocab_size: int,
) -> Tensor:
    """The prompts' mask [B, P], after every check that needs the prompts."""
    mask = model_kwargs.get("attention_mask")
    if input_ids.shape[1] == 0:
        if guide.reward_input_ids is None:
            raise ValueError(
                "inputs_embeds gives the reward model no tokens; pass reward_input_ids= too"
            )
        return input_ids
    check.check_range("input_ids", input_ids, vocab_size, "the language model")
    if mask is None:
        mask = torch.ones_like(input_ids)
    check.check_left_padded("attention_mask", mask)
    seen = max(mask.shape[1], foreign.mask_length(config))
    if seen != input_ids.shape[1] and guide.reward_input_ids is None:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} tokens and the cache given makes them {seen}; "
            "the reward model needs the whole text: pass all ids in input_ids, or "
            "reward_input_ids="
        )
    check.check_length(
        "input_ids",
        "the language model",
        mask,
        config.max_length - input_ids.shape[1],
        check.position_limit(model, model.config.get_text_config()),
    )
    return mask


def _reward_prompt(
    guide: Any, rms: list[ModelParts | None], input_ids: Tensor, mask: Tensor, copies: int
) -> tuple[Tensor, Tensor]:
    """The prompts as the reward model sees them: ids and mask [B, P]."""
    ids, own_mask = guide.reward_input_ids, guide.reward_attention_mask
    if ids is None:
        if own_mask is not None:
            raise ValueError(
                "reward_attention_mask is given without reward_input_ids; pass both, or "
                "neither to let the reward model see input_ids and attention_mask"
            )
        return input_ids, mask
    check.check_ids("reward_input_ids", ids)
    prompts = input_ids.shape[0] // copies
    if ids.shape[0] not in (prompts, input_ids.shape[0]):
        raise ValueError(
            f"reward_input_ids has {ids.shape[0]} rows for {prompts} prompts; pass one per prompt"
        )
    if own_mask is None:
        own_mask = torch.ones_like(ids)
        for rm in rms:
            pad = getattr(rm.text_config, "pad_token_id", None) if rm else None
            if pad is not None and ids.shape[0] > 1 and (ids[:, [0, -1]] == pad).any():
                raise ValueError(
                    f"reward_input_ids contains padding (id {pad}) and reward_attention_mask is "
                    "missing; pass reward_attention_mask= as the tokenizer gives it"
                )
    check.check_mask("reward_attention_mask", own_mask, ids)
    if ids.shape[0] != input_ids.shape[0]:
        ids, own_mask = (t.repeat_interleave(copies, dim=0) for t in (ids, own_mask))
    return ids, own_mask


def _check_reward_prompt(
    rm: ModelParts, ids: Tensor, mask: Tensor, new_tokens: int, own_prompt: bool, as_text: bool
) -> None:
    """A prompt must fit a reward model, which is given text or ids."""
    name = "reward_input_ids" if own_prompt else "input_ids"
    if own_prompt or not as_text:
        check.check_range(name, ids, rm.vocab_size, "reward_model")
    if not as_text:
        limit = check.position_limit(rm.base, rm.text_config)
        check.check_length(name, "reward_model", mask, new_tokens, limit)


def _check_drafts(rewriter: RewriteScorer, mask: Tensor, new_tokens: int) -> None:
    """The longest prompt, draft and answer must fit the positions of the model that rewrites."""
    limit = check.position_limit(rewriter.rm.base, rewriter.rm.text_config)
    prompt, draft = int(mask.sum(-1).max()), rewriter.longest_draft(new_tokens)
    if limit is not None and prompt + draft + 1 + new_tokens > limit:
        raise ValueError(
            f"a prompt of {prompt} tokens, a draft of up to {draft}, the separator and "
            f"{new_tokens} new tokens make {prompt + draft + 1 + new_tokens}, and reward_model has "
            f"{limit} positions; pass a smaller max_new_tokens, shorter prompts or shorter drafts"
        )


class Prepared(NamedTuple):
    """What Hugging Face's `generate` makes of the options for one prompt [1, P]."""

    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]


def prepared_for(model: Any, ids: Tensor, options: dict[str, Any]) -> Prepared:
    """What Hugging Face's `generate` makes of its `options` for the prompt int64 [P]."""

    def taken(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        prepared = logits_processor, stopping_criteria, generation_config, model_kwargs
        return Prepared(input_ids, *prepared)

    return model.generate(
        ids[None],
        attention_mask=torch.ones_like(ids)[None],
        custom_generate=taken,
        return_dict_in_generate=True,
        **options,
    )


def within_positions(bound: int, model: Any, reward: Any, as_text: Sequence[bool]) -> int:
    """`bound` tokens, or as many as the language model and the reward models have positions for;
    those that read texts (`as_text`) see to it themselves."""
    limits = [check.position_limit(model, model.config.get_text_config())]
    for part, by_text in zip(leaves_of(reward), as_text, strict=True):
        rm = parts_of(part)
        if rm is not None and not by_text:
            limits.append(check.position_limit(rm.base, rm.text_config))
    return min([bound, *(limit for limit in limits if limit is not None)])
