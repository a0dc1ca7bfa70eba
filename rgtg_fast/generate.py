"""The drop-in: `rgtg_fast.generate` and `model.generate(custom_generate=RewardGuided(...))`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
)

from . import ops
from . import validation as check
from .decoding import Guidance, guided_decode
from .output import RewardGuidedOutput
from .plan import make_plan
from .policy import HFPolicy, LanguageModel, make_policy, plain_language_model
from .record import Record
from .scorers.base import Scorer
from .scorers.factory import is_scorer, make_scorer
from .scorers.on_base import OnBase
from .scorers.reward_model import RewardModel, as_reward_model


@dataclass
class RewardGuided:
    """Reward-guided decoding as a callable for `model.generate(custom_generate=...)`.

    Each step samples from softmax((log π + β r)/T) over the k most likely tokens
    (arXiv 2406.07780); the options are those of `rgtg_fast.generate`, which also takes `streamer=`,
    `stop_strings=` and `synced_gpus=`: transformers drops these on the way to a `custom_generate`
    callable, so a streamer is given as an option of this object. One object can serve many calls.

    Raises `ValueError` for options out of range, at construction.
    """

    reward_model: Any
    k: int = 10
    beta: float | Tensor = 1.0
    seed: int | Tensor | None = None
    temperature: float | Tensor | None = None
    reward_input_ids: Tensor | None = None
    reward_attention_mask: Tensor | None = None
    reward_tokenizer: Any = None
    tokenizer: Any = None
    reward_head: Callable[[Tensor], Tensor] | None = None
    reward_method: str = "auto"
    eos_reward: str = "auto"
    output_candidates: bool = False
    check_nan: bool | None = None
    backend: ops.Backend = "auto"
    streamer: Any = None
    sync_every: int | None = None
    compact: bool = True

    def __post_init__(self) -> None:
        check.check_options(
            self.k,
            self.beta,
            self.temperature,
            self.seed,
            self.eos_reward,
            self.reward_method,
            self.backend,
            self.sync_every,
        )
        self._rm: RewardModel | None = None
        if not is_scorer(self.reward_model):
            self._rm = as_reward_model(self.reward_model, self.reward_head)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        synced_gpus: bool = False,
        keep_cache: bool = False,
        **model_kwargs: Any,
    ) -> RewardGuidedOutput | Tensor:
        """Called by `model.generate` with everything prepared; returns what it is to return.

        `keep_cache`: the caller keeps the cache in `model_kwargs` and will look at it.
        """
        own_streamer = self.streamer if streamer is None else None
        with ended_on_error(own_streamer):
            batch = max(input_ids.shape[0], 1)
            copies = generation_config.num_return_sequences or 1
            prompts = batch // copies
            embedding = model.get_input_embeddings()
            vocab_size = embedding.weight.shape[0]
            check.check_config(model, generation_config, self.k, vocab_size)
            mask = self._lm_mask(model, input_ids, generation_config, model_kwargs, vocab_size)
            reward_ids, reward_mask = self._reward_prompt(input_ids, mask, copies)
            device = input_ids.device
            warper_temperature, processors = take_temperature(logits_processor)
            temperature = warper_temperature if self.temperature is None else self.temperature
            guidance = Guidance(
                k=self.k,
                beta=check.per_row("beta", self.beta, prompts, batch, device),
                temperature=check.per_row("temperature", temperature, prompts, batch, device),
                seeds=self._row_seeds(batch, bool(generation_config.do_sample), device),
                do_sample=bool(generation_config.do_sample),
                check_nan=True
                if self.check_nan is None and device.type == "cpu"
                else self.check_nan,
                backend=self.backend,
            )
            new_tokens = generation_config.max_length - input_ids.shape[1]
            found = plain_language_model(
                model, input_ids, mask, generation_config, model_kwargs, self.backend
            )
            scorer = self._make_scorer(
                reward_ids, reward_mask, new_tokens, generation_config, vocab_size, found
            )
            record = Record(generation_config, self.output_candidates)
            keep_cache = keep_cache or record.on
            policy = make_policy(
                model, found, scorer, mask, generation_config, model_kwargs, self.backend
            )
            plan = make_plan(
                new_tokens,
                device,
                processors,
                stopping_criteria,
                getattr(generation_config, "_pad_token_tensor", None),
                sync_every=self.sync_every,
                compact=self.compact and policy.can_keep_rows() and hasattr(scorer, "keep_rows"),
                # Hugging Face's cache must hold no token beyond the last step when it is returned.
                step_by_step=streamer is not None
                or own_streamer is not None
                or (keep_cache and isinstance(policy, HFPolicy)),
                whole_batch=keep_cache or streamer is not None or own_streamer is not None,
                synced_gpus=synced_gpus,
            )
            scorer.prefill(reward_ids, reward_mask)
            if own_streamer is not None:  # a streamer that HF knows has had the prompt already
                own_streamer.put(input_ids.cpu())
            return guided_decode(
                policy,
                scorer,
                input_ids,
                guidance,
                plan,
                record,
                processors,
                stopping_criteria,
                own_streamer if streamer is None else streamer,
            )

    def _lm_mask(
        self,
        model: Any,
        input_ids: Tensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        vocab_size: int,
    ) -> Tensor:
        """The prompts' mask [B, P], after every check that needs the prompts."""
        mask = model_kwargs.get("attention_mask")
        if input_ids.shape[1] == 0:
            if self.reward_input_ids is None:
                raise ValueError(
                    "inputs_embeds gives the reward model no tokens; pass reward_input_ids= too"
                )
            return input_ids
        check.check_range("input_ids", input_ids, vocab_size, "the language model")
        if mask is None:
            mask = torch.ones_like(input_ids)
        check.check_left_padded("attention_mask", mask)
        seen = max(mask.shape[1], getattr(config, "_mask_length", 0) or 0)
        if seen != input_ids.shape[1] and self.reward_input_ids is None:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens and past_key_values makes them {seen}; "
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

    def _reward_prompt(self, input_ids: Tensor, mask: Tensor, copies: int) -> tuple[Tensor, Tensor]:
        """The prompts as the reward model sees them: ids and mask [B, P]."""
        ids, own_mask = self.reward_input_ids, self.reward_attention_mask
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
                f"reward_input_ids has {ids.shape[0]} rows for {prompts} prompts; "
                "pass one per prompt"
            )
        if own_mask is None:
            own_mask = torch.ones_like(ids)
            pad = getattr(self._rm.text_config, "pad_token_id", None) if self._rm else None
            if pad is not None and ids.shape[0] > 1 and (ids[:, [0, -1]] == pad).any():
                raise ValueError(
                    f"reward_input_ids contains padding (id {pad}) and reward_attention_mask is "
                    "missing; pass reward_attention_mask= as the tokenizer gives it"
                )
        check.check_mask("reward_attention_mask", own_mask, ids)
        if ids.shape[0] != input_ids.shape[0]:
            ids, own_mask = (t.repeat_interleave(copies, dim=0) for t in (ids, own_mask))
        return ids, own_mask

    def _make_scorer(
        self,
        reward_ids: Tensor,
        reward_mask: Tensor,
        new_tokens: int,
        config: GenerationConfig,
        vocab_size: int,
        found: tuple[LanguageModel, str] | None,
    ) -> Scorer:
        if self._rm is None:
            return self.reward_model
        rm = self._rm
        own_prompt = self.reward_input_ids is not None
        name = "reward_input_ids" if own_prompt else "input_ids"
        as_text = check.check_vocabularies(rm, vocab_size, self.tokenizer, self.reward_tokenizer)
        if own_prompt or not as_text:
            check.check_range(name, reward_ids, rm.vocab_size, "reward_model")
        if not as_text:
            limit = check.position_limit(rm.base, rm.text_config)
            check.check_length(name, "reward_model", reward_mask, new_tokens, limit)
        joint = (
            found is not None
            and isinstance(rm, OnBase)
            and rm.base is found[0].base
            and rm.can_share_forwards()
            and not own_prompt
            and self.reward_method in ("auto", "tree")
        )
        return make_scorer(
            rm,
            joint_way=found[1] if joint and found is not None else None,
            k=self.k,
            method=self.reward_method,
            vocab_size=vocab_size,
            tokenizer=self.tokenizer if as_text else None,
            reward_tokenizer=self.reward_tokenizer if as_text else None,
            own_prompt=own_prompt,
            eos_ids=getattr(config, "_eos_token_tensor", None),
            eos_reward=self.eos_reward,
            max_length=reward_ids.shape[1] + new_tokens,
            backend=self.backend,
        )

    def _row_seeds(self, batch: int, do_sample: bool, device: torch.device) -> Tensor:
        seed = self.seed
        if isinstance(seed, Tensor):
            if seed.shape[0] != batch:
                raise ValueError(
                    f"seed has {seed.shape[0]} row seeds for {batch} rows; pass one per row "
                    "(prompts x num_return_sequences) or an int"
                )
            return seed.to(device)
        if seed is None:
            # Greedy decoding draws nothing, and leaves the global generator where it was.
            seed = int(torch.randint(2**63 - 1, ())) if do_sample else 0
        return ops.split_seed(seed, batch).to(device)


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    reward_model: Any,
    k: int = 10,
    beta: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    temperature: float | Tensor | None = None,
    reward_input_ids: Tensor | None = None,
    reward_attention_mask: Tensor | None = None,
    reward_tokenizer: Any = None,
    tokenizer: Any = None,
    reward_head: Callable[[Tensor], Tensor] | None = None,
    reward_method: str = "auto",
    eos_reward: str = "auto",
    output_candidates: bool = False,
    check_nan: bool | None = None,
    backend: ops.Backend = "auto",
    sync_every: int | None = None,
    compact: bool = True,
    **kwargs: Any,
) -> RewardGuidedOutput | Tensor:
    """`model.generate`, guided by `reward_model`: y_t ~ softmax((log π + β r)/T) over k candidates.

    Takes what `model.generate` takes (prompts padded on the left, generation configuration, logits
    processors, stopping criteria, `stop_strings` with `tokenizer`, streamers, caches) and returns
    what it returns: sequences int64 [B, P + T], or with `return_dict_in_generate=True` a
    `RewardGuidedOutput`. As in Hugging Face, decoding is greedy (argmax of log π + β r) unless
    `do_sample=True`. The equation is that of arXiv 2406.07780, section 4.

    Args:
        model: a causal language model (or a PEFT model around one).
        inputs: prompts int64 [B, P]; or `input_ids=`.
        reward_model: a sequence-classification model with one label, any module with a base model
            and a head (`score`, `classifier`, `v_head`, `regression_head`), a `RewardHead` or
            `RewardAdapter` on the language model's own weights, or a scorer object with `prefill`,
            `score` and `commit`. May live on another device and in another dtype.
        k: candidates per step, 1 to 64.
        beta: weight of the reward; a float, or a float tensor with one value per prompt.
        seed: an int, split into one seed per row, or int64 [B] row seeds (B counts
            `num_return_sequences`). None draws one from torch's global generator.
        temperature: T, divides log π + β r; a float > 0 or a tensor like `beta`. It replaces HF's
            temperature warper on the LM logits; None takes the generation configuration's.
        reward_input_ids: the reward model's own rendering of the prompts, int64 [B, P'], with
            `reward_attention_mask` (padding on the left); the answer's tokens are shared.
        reward_tokenizer, tokenizer: the two tokenizers. Where their vocabularies differ, each
            candidate text is decoded and encoded again.
        reward_head: hidden states [..., H] -> rewards [...] or [..., 1], where no head is found.
        reward_method: "tree", "expand", "reencode" or "auto" (the fastest that a numerical probe
            finds right for this model; see `rgtg_fast.scorers.make_scorer`).
        eos_reward: reward of prefix + EOS: "hidden" (the head at the EOS token), "previous" (that
            of the prefix), or "auto": what the model's public forward gives, which is "previous"
            where its padding token is the EOS token.
        output_candidates: also return ids, log-probabilities and rewards of all candidates.
        check_nan: True raises at the step, None (default) at the step on CPU and at the end on
            CUDA, False never (such a row goes on with its most likely token).
        backend: of the ops; see `rgtg_fast.ops`.
        sync_every: steps between two looks at whether every row has ended (default 1 on CPU, 16 on
            CUDA, where looking means waiting). Steps beyond the end are cut off: the result does
            not depend on it. With a streamer, `stop_strings` or a stopping criterion other than
            length and EOS it is every step.
        compact: let rows that have ended leave the batch once they are half of it. It happens only
            where plain sequences are returned and no processor or criterion of the user's may
            count rows. Pass False where an own empty `past_key_values` is given to
            `model.generate(custom_generate=...)` and read afterwards.

    Raises:
        ValueError: an argument out of range, a mode that is not greedy or sampled, a prompt that
            does not fit, models that do not match, a NaN logit or reward (row and step named).
    """
    with ended_on_error(kwargs.get("streamer")):
        guided = RewardGuided(
            reward_model,
            k=k,
            beta=beta,
            seed=seed,
            temperature=temperature,
            reward_input_ids=reward_input_ids,
            reward_attention_mask=reward_attention_mask,
            reward_tokenizer=reward_tokenizer,
            tokenizer=tokenizer,
            reward_head=reward_head,
            reward_method=reward_method,
            eos_reward=eos_reward,
            output_candidates=output_candidates,
            check_nan=check_nan,
            backend=backend,
            sync_every=sync_every,
            compact=compact,
        )
        # transformers hands neither of these to a custom_generate callable: bound here.
        bound = functools.partial(
            guided,
            streamer=kwargs.get("streamer"),
            keep_cache=kwargs.get("past_key_values") is not None,
        )
        if kwargs.get("synced_gpus"):
            bound = functools.partial(bound, synced_gpus=True)
        check.check_call(model, inputs, kwargs)
        with stop_strings_moved(model, tokenizer, kwargs):
            if inputs is not None:
                kwargs["inputs"] = inputs
            return model.generate(custom_generate=bound, **kwargs)


def take_temperature(processors: LogitsProcessorList) -> tuple[float, LogitsProcessorList]:
    """The temperature HF would put on the LM logits, and the processors without that warper."""
    kept, temperature = LogitsProcessorList(), 1.0
    for processor in processors:
        if isinstance(processor, TemperatureLogitsWarper):
            temperature = float(processor.temperature)
        else:
            kept.append(processor)
    return temperature, kept


@contextmanager
def ended_on_error(streamer: Any) -> Iterator[None]:
    """End the streamer when a call fails: a thread that reads from it must not wait forever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise


@contextmanager
def stop_strings_moved(model: Any, tokenizer: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Turn `stop_strings` into a criterion in `kwargs`, and keep Hugging Face from seeing them.

    It loses the tokenizer on the way to a callable, and then asks for it. A None in the
    configuration passed is filled from the model's own, so that one is emptied for the call.
    """
    given, own = kwargs.get("generation_config"), model.generation_config
    stop_strings = kwargs.pop("stop_strings", None)
    for config in (given, own):
        stop_strings = stop_strings or getattr(config, "stop_strings", None)
    if not stop_strings:
        yield
        return
    if tokenizer is None:
        raise ValueError(f"stop_strings={stop_strings!r} needs the tokenizer; pass tokenizer=")
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(tokenizer, stop_strings))
    kwargs["stopping_criteria"] = criteria
    if given is not None:
        kwargs["generation_config"] = copy.deepcopy(given)
        kwargs["generation_config"].stop_strings = None
    before, own.stop_strings = own.stop_strings, None
    try:
        yield
    finally:
        own.stop_strings = before


__all__ = ["RewardGuided", "generate"]
