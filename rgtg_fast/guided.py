"""Reward-guided decoding as a callable for `model.generate(custom_generate=...)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from . import ops
from . import validation as check
from .decode.ahead import choose_speculation
from .decode.call import Call
from .decode.capture import choose_graph
from .decode.compiling import choose_compiled
from .decode.drafters import drafter_of
from .decode.logits import HFLogits, logits_source, plain_language_model
from .decode.loop import decode
from .decode.plan import make_plan
from .decode.ratio_policy import RatioPolicy
from .decode.record import Record
from .decode.speculation import speculate
from .decode.steering import schedule_of
from .decode.warpers import take_temperature, trailing
from .models import foreign
from .models.language_model import LanguageModel
from .models.on_base import OnBase
from .models.reward_model import Label
from .models.vocab_head import VocabHead
from .output import RewardGuidedOutput
from .prompts import check_prompts
from .scorers.base import Scorer
from .scorers.factory import assembled, scorer_of
from .scorers.lazy import LazyScorer, lazily
from .scorers.next_token import NextTokenScorer
from .scorers.rewards import Reward, WeightedRewards, of_rows
from .scorers.rewrite import RewriteScorer, rewriters_of
from .scorers.sources import taken_apart
from .scorers.tree import SiblingScorer
from .scorers.turns import alone


@check.names_checked
@dataclass
class RewardGuided:
    """Reward-guided decoding as a callable for `model.generate(custom_generate=...)`.

    Each step samples from softmax((log π + β r)/T) over the k most likely tokens
    (arXiv 2406.07780); the options are those of `rgtg_fast.generate`, which also takes
    `stop_strings=` and `synced_gpus=`: transformers drops these on the way to a `custom_generate`
    callable. A `streamer` may be given to `model.generate`, or here for all calls. One object can
    serve many calls.

    Raises `ValueError` for options out of range, at construction.
    """

    reward_model: Any
    k: int | None = 10
    beta: float | Tensor = 1.0
    seed: int | Tensor | None = None
    temperature: float | Tensor | None = None
    reward_input_ids: Tensor | None = None
    reward_attention_mask: Tensor | None = None
    reward_tokenizer: Any = None
    tokenizer: Any = None
    reward_head: Callable[[Tensor], Tensor] | None = None
    reward_label: Label = None
    reward_kind: str | None = None
    reward_method: str = "auto"
    eos_reward: str = "auto"
    output_candidates: bool = False
    check_nan: bool | None = None
    backend: ops.Backend = "auto"
    streamer: Any = None
    sync_every: int | None = None
    compact: bool = True
    reward_range: tuple[float, float] | None = None
    prune: bool | None = None
    beta_schedule: Callable[[int], float] | None = None
    kl_budget: float | None = None
    min_entropy: float | None = None
    candidates: str = "lm"
    guided_top_p: float | None = None
    cuda_graph: bool | None = None
    compile: bool | str = "auto"
    speculate: bool | str | int = "auto"
    assistant_model: Any = None

    def __post_init__(self) -> None:
        check.check_options(self)
        self.taken_apart()

    def taken_apart(self) -> Reward | WeightedRewards:
        """The reward as it is now: a model's head or modules may be others at the next call."""
        own = {n: getattr(self, n) for n in Reward.__dataclass_fields__ if n != "model"}
        own_prompt = self.reward_input_ids is not None
        reward = taken_apart(self.reward_model, Reward(None, **own), self.tokenizer, own_prompt)
        if self.k is None or self.candidates == "sum":
            check.knows_every_token(reward, self.k)
        return reward

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
        found = foreign.streamer_of_caller(model) if streamer is None else None
        streamer = found if streamer is None else streamer
        own_streamer = self.streamer if streamer is None else None
        ends = ended_on_error(found, None if self.streamer is streamer else self.streamer)
        with ends, alone(self.reward_model):
            check.check_streamers(streamer, self.streamer)
            call = self.resolve(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_kwargs,
                streamer=own_streamer if streamer is None else streamer,
                synced_gpus=synced_gpus,
                keep_cache=keep_cache,
            )
            if own_streamer is not None:  # Hugging Face has not put the prompt into this one
                own_streamer.put(input_ids.cpu())
            try:
                expect_drafts(call, model, len(input_ids), generation_config)
                result = (speculate if call.speculation else decode)(call, input_ids)
                if isinstance(call.scorer, LazyScorer) and isinstance(result, dict):
                    result["gating"] = call.scorer.report(result, call.policy.k)
            finally:
                if hasattr(call.scorer, "finish"):
                    call.scorer.finish()
        return result if isinstance(result, Tensor) else RewardGuidedOutput(**result)

    def resolve(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *,
        streamer: Any,
        synced_gpus: bool,
        keep_cache: bool,
    ) -> Call:
        """Everything that the run will be made of, after every check that can be made before it."""
        check.check_options(self)  # again: they may have been set since
        reward = self.taken_apart()
        batch = max(input_ids.shape[0], 1)
        copies = config.num_return_sequences or 1
        checked = check_prompts(self, reward, model, input_ids, config, model_kwargs)
        vocab_size, mask, reward_prompt, new_tokens, as_text = checked
        temperature, processors = take_temperature(logits_processor)
        policy = self.ratio_policy(batch, copies, input_ids.device, config, temperature, new_tokens)
        found = plain_language_model(model, input_ids, mask, config, model_kwargs, self.backend)
        max_length = reward_prompt[0].shape[1] + new_tokens
        if isinstance(reward, WeightedRewards):
            of_row = batch // copies, batch, input_ids.device
            reward = of_rows(reward, lambda name, value: check.per_row(name, value, *of_row))
        scorer = self.make_scorer(reward, as_text, max_length, config, vocab_size, found)
        for rewriter in rewriters_of(scorer):
            rewriter.check_drafts(batch // copies)
        policy.prune = check.prunes(scorer, self.prune, self.output_candidates)
        source = logits_source(model, found, scorer, mask, config, model_kwargs, self.backend)
        record = Record(config, self.output_candidates)
        policy.lone = None if record.on else getattr(scorer, "commits_unscored", None)
        given_cache, keep_cache = keep_cache, keep_cache or record.on
        plan = make_plan(
            new_tokens,
            input_ids,
            processors,
            criteria,
            foreign.pad_tensor(config),
            sync_every=self.sync_every,
            compact=self.compact and source.can_keep_rows() and hasattr(scorer, "keep_rows"),
            # Hugging Face's cache must hold no token beyond the last step when it is returned.
            step_by_step=streamer is not None or (keep_cache and isinstance(source, HFLogits)),
            whole_batch=keep_cache or streamer is not None,
            synced_gpus=synced_gpus,
        )
        call = Call(
            source=source,
            scorer=scorer,
            reward_prompt=reward_prompt,
            policy=policy,
            plan=plan,
            record=record,
            processors=processors,
            criteria=criteria,
            streamer=streamer,
            epilogue=policy.reward_range is None
            and policy.kl_budget is None
            and policy.top_p is None
            and isinstance(scorer, SiblingScorer)
            and scorer.is_linear(input_ids.device),
        )
        call.graph = choose_graph(self.cuda_graph, call)
        # A cache of the caller's is filled with views of the call's own.
        call.keeps_graph = not given_cache
        choose_compiled(self.compile, call)
        look = call.graph is None and input_ids.device.type == "cpu"
        if call.graph is not None:
            policy.prune = False  # a captured step asks for the same rewards each time
        if record.scores is None and policy.over == "lm":
            call.processors, policy.warpers = trailing(processors, policy.k, vocab_size, look)
        assistant = drafter_of(
            self.assistant_model, mask, config.max_length, vocab_size, self.backend
        )
        call.speculation = choose_speculation(self.speculate, call, assistant)
        return call

    def ratio_policy(
        self,
        batch: int,
        copies: int,
        device: torch.device,
        config: GenerationConfig,
        temperature: float,
        steps: int,
    ) -> RatioPolicy:
        """The ratio policy of a call of `steps` at most; `temperature` is that of the generation
        configuration."""
        own = temperature if self.temperature is None else self.temperature
        do_sample = bool(config.do_sample)
        if self.kl_budget is not None and not do_sample:
            raise ValueError(
                "kl_budget= is of a policy that is drawn from, and a greedy one always takes its "
                "best token; pass do_sample=True, or beta= alone"
            )
        factor = self.beta_schedule
        low_high = self.reward_range
        return RatioPolicy(
            k=self.k or 1,
            beta=check.per_row("beta", self.beta, batch // copies, batch, device),
            temperature=check.per_row("temperature", own, batch // copies, batch, device),
            seeds=self._row_seeds(batch, do_sample, device),
            do_sample=do_sample,
            # On a GPU a look at every step would make the host wait every time.
            check_nan=True if self.check_nan is None and device.type == "cpu" else self.check_nan,
            backend=self.backend,
            reward_range=None if low_high is None else (float(low_high[0]), float(low_high[1])),
            schedule=None if factor is None else schedule_of(factor, steps, device),
            kl_budget=None if self.kl_budget is None else float(self.kl_budget),
            min_entropy=None if self.min_entropy is None else float(self.min_entropy),
            over="all" if self.k is None else self.candidates,
            top_p=None if self.guided_top_p is None else float(self.guided_top_p),
        )

    def make_scorer(
        self,
        reward: Reward | WeightedRewards,
        as_text: Sequence[bool],
        max_length: int,
        config: GenerationConfig,
        vocab_size: int,
        found: tuple[LanguageModel, str] | None,
    ) -> Scorer:
        """The scorer of a reward; `as_text` says of its parts in order whether they read text."""
        own_prompt = self.reward_input_ids is not None
        texts, shared, eos_ids = iter(as_text), False, foreign.eos_tensor(config)
        k = self.k or 1

        def make(reward: Reward) -> Scorer:
            nonlocal shared
            rm, by_text = reward.model, next(texts)
            if isinstance(rm, SiblingScorer) and k > rm.k:
                raise ValueError(
                    f"k={k} candidates asked for, and reward_model was made for "
                    f"k={rm.k}; pass make_scorer(..., k={k})"
                )
            if isinstance(rm, NextTokenScorer):
                rm.reserve(max_length)
            if isinstance(rm, RewriteScorer) and own_prompt and rm.drafts is None:
                raise ValueError(
                    "reward_input_ids= are prompts of the reward model's own, to which the "
                    "language model makes no drafts; pass RewriteScorer(rm, drafts=...)"
                )
            joint = (
                found is not None
                and not shared  # one part gives the language model's logits
                and isinstance(rm, OnBase)
                and rm.base is found[0].base
                and rm.can_share_forwards()
                and not own_prompt
                and self.min_entropy is None  # its forwards are the language model's
                and reward.reward_method in ("auto", "tree")
            )
            shared |= joint
            of_states = (
                found is not None
                and found[1] == "fused"
                and isinstance(rm, VocabHead)
                and rm.base is found[0].base
                and not own_prompt
            )
            return scorer_of(
                reward if by_text else replace(reward, reward_tokenizer=None),
                joint_way=found[1] if found is not None and (joint or of_states) else None,
                k=k,
                vocab_size=vocab_size,
                tokenizer=self.tokenizer,
                own_prompt=own_prompt,
                eos_ids=eos_ids,
                max_length=max_length,
                backend=self.backend,
            )

        scorer = make(reward) if isinstance(reward, Reward) else assembled(reward, make)
        return scorer if self.min_entropy is None else lazily(scorer)

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
            seed = (
                int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
                if do_sample
                else 0
            )
        return ops.split_seed(seed, batch).to(device)


def expect_drafts(call: Call, model: Any, batch: int, config: GenerationConfig) -> None:
    """Tell scorers that need drafts whose the rows of a call are, and who makes those not given."""
    copies = config.num_return_sequences or 1
    for rewriter in rewriters_of(call.scorer):
        rewriter.draft_by(model, foreign.eos_tensor(config))
        rewriter.expect([row // copies for row in range(batch)], [call.plan.steps] * batch)


class OneCall(RewardGuided):
    """A guide for one call, which checks its options and takes the reward model apart, and not its
    construction too."""

    def __post_init__(self) -> None:
        pass


@contextmanager
def ended_on_error(*streamers: Any) -> Iterator[None]:
    """End the streamers when a call fails: a thread that reads from one must not wait forever."""
    try:
        yield
    except BaseException:
        for streamer in streamers:
            if hasattr(streamer, "end"):
                streamer.end()
        raise
