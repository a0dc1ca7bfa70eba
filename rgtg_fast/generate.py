"""The drop-in: `rgtg_fast.generate` and `model.generate(custom_generate=RewardGuided(...))`."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria

from . import ops
from . import validation as check
from .guided import OneCall, RewardGuided, ended_on_error
from .models.foreign import CACHE
from .models.reward_model import Label
from .output import RewardGuidedOutput


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    reward_model: Any = None,
    k: int | None = 10,
    beta: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    temperature: float | Tensor | None = None,
    reward_input_ids: Tensor | None = None,
    reward_attention_mask: Tensor | None = None,
    reward_tokenizer: Any = None,
    tokenizer: Any = None,
    reward_head: Callable[[Tensor], Tensor] | None = None,
    reward_label: Label = None,
    reward_kind: str | None = None,
    reward_method: str = "auto",
    eos_reward: str = "auto",
    output_candidates: bool = False,
    check_nan: bool | None = None,
    backend: ops.Backend = "auto",
    sync_every: int | None = None,
    compact: bool = True,
    reward_range: tuple[float, float] | None = None,
    prune: bool | None = None,
    beta_schedule: Callable[[int], float] | None = None,
    kl_budget: float | None = None,
    min_entropy: float | None = None,
    candidates: str = "lm",
    guided_top_p: float | None = None,
    cuda_graph: bool | None = None,
    compile: bool | str = "auto",
    speculate: bool | str | int = "auto",
    assistant_model: Any = None,
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
        reward_model: one of these; models may live on another device and in another dtype.
            A sequence-classification model (with several labels: see `reward_label`), or any
            module with a base model and a head (`score`, `classifier`, `v_head`,
            `regression_head`, `regression_layer`).
            A causal language model, with `reward_kind`.
            A pair `(policy, reference)` of causal language models: DPO's implicit reward
            log π_policy - log π_ref of the answer so far (arXiv 2305.18290).
            A function `list[str] -> list[float]` of the texts, or the http(s):// URL of a server
            that has one (`rgtg_fast.RewardEndpoint` has options for it); with `tokenizer`.
            A `RewardHead`, `RewardAdapter` or `VocabHead` on the language model's own weights.
            A scorer: an object with `prefill`, `score` and `commit`.
            `rgtg_fast.WeightedRewards([a, b], [0.7, 0.3])` of any of these, or
            `0.7 * rgtg_fast.Reward(a) + 0.3 * rgtg_fast.Reward(b, reward_label="safe")`.
        k: candidates per step, 1 to 64. None: the whole vocabulary, with rewards that know every
            token: those of a causal language model (`reward_kind`), pairs (policy, reference), a
            `VocabHead`, and sums of these. Each token is one draw from softmax((log π + β r)/T)
            over all tokens (or the best of them), and `kl` that of the whole policy. (Hugging
            Face's own `top_k` is 50 where nobody says otherwise, and cuts π in sampling: `top_k=0`
            for all of it.)
        beta: weight of the reward; a float, or a float tensor with one value per prompt.
        seed: an int, split into one seed per row, or int64 [B] row seeds (B counts
            `num_return_sequences`). None draws one from torch's global generator.
        temperature: T, divides log π + β r; a float > 0 or a tensor like `beta`. It replaces HF's
            temperature warper on the LM logits; None takes the generation configuration's.
        reward_input_ids: the reward model's own rendering of the prompts, int64 [B, P'], with
            `reward_attention_mask` (padding on the left); the answer's tokens are shared.
        reward_tokenizer, tokenizer: the two tokenizers. Where their vocabularies differ, each
            candidate text is decoded and encoded again; a causal reward model runs the tokens that
            are new alone, on k copies of a cache (with `reward_method="auto"`).
        reward_head: hidden states [..., H] -> rewards [...] or [..., 1], where no head is found.
        reward_label: of a model with several labels, the one to be likely: a name in its `id2label`
            ("POSITIVE") or an index. The reward is the label's log-probability: its log-softmax
            over the labels (its log-sigmoid with `problem_type="multi_label_classification"`, its
            logit as it is with `problem_type="regression"` in the reward model's configuration, or
            of a head that is named so). Several labels (ArmoRM, RAD): a list of them is their sum,
            a dict {label: weight} their weighted sum.
        reward_kind: of a causal language model as `reward_model`: "genarm" (its log-probabilities
            are the rewards of tokens, arXiv 2410.08193) or "farma" (its logits are the rewards of
            prefixes, arXiv 2502.04517), "seq2seq" (its log-probabilities where it rewrites the
            language model's greedy answer, arXiv 2409.00162; `rgtg_fast.scorers.RewriteScorer`
            takes other drafts).
        reward_method: "tree", "expand", "reencode" or "auto" (the fastest that a numerical probe
            finds right for this model; see `rgtg_fast.scorers.make_scorer`).
        eos_reward: reward of prefix + EOS: "hidden" (the head at the EOS token), "previous" (that
            of the prefix), or "auto": what the model's public forward gives, which is "previous"
            where its padding token is the EOS token.
        output_candidates: also return ids, log-probabilities and rewards of all candidates.
        check_nan: True raises at the step, None (default) at the step on CPU and at the end on
            CUDA, False never (such a row goes on with its most likely token).
        backend: of the ops; see `rgtg_fast.ops`. The environment variable RGTG_BACKEND stands in
            for "auto", with the same effect.
        sync_every: steps between two looks at whether every row has ended (default 1 on CPU, 16 on
            CUDA, where looking means waiting). Steps beyond the end are cut off: the result does
            not depend on it. With a streamer, `stop_strings` or a stopping criterion other than
            length and EOS it is every step.
        compact: let rows that have ended leave the batch once they are half of it. It happens only
            where plain sequences are returned and no processor or criterion of the user's may
            count rows. Pass False where an own empty cache is given to
            `model.generate(custom_generate=...)` and read afterwards.
        reward_range: (lo, hi), two finite numbers: rewards are clamped to it, as RAD does
            (arXiv 2310.09520).
        prune: do not score candidates that cannot win: those that the logits processors (top-p and
            the like) have put to -inf, and with `reward_range` those that lose even at its best
            reward against another at the worst; the noise of a draw is known beforehand. The
            tokens are the same, as far as the reward model gives the same numbers in smaller
            batches. Exactly: with a_v = log π_v / T + g_v, v goes unscored where its largest
            a_v + β r / T, r in {lo, hi}, is below another's smallest. None: wherever it saves
            something (a reward model on a CPU scored by "tree", or as a head or an adapter on the
            language model, or by "reencode" anywhere; no CUDA graph) and not all rewards are asked
            for (`output_candidates`). False: all k are scored. `candidates_scored` says how many
            were; `kl` of a sampled step is NaN where one that might have won was not. A NaN reward
            of a candidate that is not scored goes unseen. Where plain sequences are returned, a
            candidate without a rival is not scored either: by "reencode" for each row, by "tree"
            at steps where no row has a rival; it then reads those tokens in one forward later.
        beta_schedule: a function of the position in the answer (0, 1, ..): what beta is times
            there. `beta_schedule=lambda t: min(1, t / 16)` lets the reward in slowly. `beta` in the
            output says what beta was.
        kl_budget: nats; at every step each row takes the beta, at most `beta`, at which the KL of
            the ratio policy from π (the output's `kl`) is just that; `beta` where its KL is less,
            0 where it is more without reward already (π has weight outside the candidates). With
            `do_sample=True`. `beta` in the output says what beta was.
        min_entropy: nats; where the entropy of π over the candidates alone is less, a row takes its
            token without reward, and the reward model is not asked: it reads those tokens in one
            forward when it is next. `rewards` is NaN there, `candidates_scored` 0, and `gating` in
            the output says what was saved.
        candidates: "lm": the k most likely tokens of π; "sum": the k best of log π + β r, with
            rewards as for `k=None`.
        guided_top_p: in (0, 1]; draws from the nucleus of the ratio policy alone: its most likely
            tokens that make this probability together (of the candidates, or of the whole
            vocabulary with `k=None`). Hugging Face's `top_p` cuts π, before the reward. Greedy
            decoding takes no notice.
        cuda_graph: capture the whole step in a CUDA graph and replay it: None (default) where that
            is possible, False never; True warns and says why where it is not. The tokens are the
            same. It needs both models on one GPU, each run on the cache of this package, and no
            part of a step on the host: no streamer, no own stopping criterion, no `output_scores`
            or `output_logits`, no `check_nan=True`, and of the logits processors only those that
            see nothing but scores (`decode.plan.SCORES_ALONE`). A call captures once after two
            steps, and again, up to log2(B) times, when half of the rows have left; a capture costs
            the time of a few steps, so none is made for fewer than 16 steps to come. The first one
            is kept for later calls with as many rows and the same options, whatever their lengths
            (up to a multiple of 256 tokens): at most 8 graphs, with key/value caches of up to 4 GiB
            in all, until one of the models goes, or `rgtg_fast.free_graphs()`. Weights changed in
            place are seen; where they were replaced, or a model changed otherwise, it is captured
            anew. None is kept of prompts with masked tokens in between, of a reward head that is
            no module, or where the caller gave a cache.
        compile: run the forwards of a step, of both models, through `torch.compile`, which fuses
            the small kernels between the matrix products. True: wherever that is possible (a
            warning says why where it is not, and the call goes on without); "auto" (default):
            where a CUDA graph serves 64 steps or more; False never. Rewards and logits differ by
            rounding. Compiling takes tens of seconds at the first call, once for one row and once
            for any greater number of rows; it is kept for later calls of any length, until the
            model goes. Weights changed in place and replaced parameters are seen; a model that has
            changed otherwise is compiled anew. Needs a C++ compiler for models on a CPU, and
            models that `torch.compile` takes whole, on the cache of this package (not with
            `cache_implementation`, dense masks, hooks, weights on several devices). Steps with
            pruned candidates run without.
        speculate: several tokens for one forward of the reward model; the same tokens as one by one
            (in bf16 as far as a forward of several tokens rounds like several of one). The language
            model goes ahead, the candidates of all positions are scored at once, and the tokens up
            to the first that the rewards change are kept. "auto" (default): as far ahead as pays,
            by what forwards take and how often rewards change a token; on a CPU, for language
            models of 64 MiB or more and a reward model scored by "tree" (smaller ones, a
            `RewardHead` or a `RewardAdapter` with an `assistant_model`), without `reward_range`,
            for up to 48 candidates of all rows (the cache then has room for up to 96). An int: so
            many positions each time, 2 to 32, anywhere; on a GPU its two forwards are replayed from
            CUDA graphs where steps would be (`cuda_graph`). False never. `speculation` in the
            output says what came of it. As "auto" goes by the clock, the last bits of rewards may
            differ from run to run. What calls learn of the pace and of rewards to expect (at most
            32 MiB) is kept as long as the two models are; it never changes a token.
        assistant_model: who guesses the language model's continuation, for it to look at several
            tokens in one forward too: a smaller causal language model with the same tokens;
            a `SuffixDrafter`, kept over calls whose texts are alike; or any object with the methods
            of `decode.drafters.Drafter`. Without one, what followed the same tokens before in the
            text is the guess (in fp32).

    Raises:
        ValueError: an argument out of range, a mode that is not greedy or sampled, a prompt that
            does not fit, models that do not match, a NaN logit or reward (row and step named).
    """
    with ended_on_error(kwargs.get("streamer")):
        check.check_call(model, inputs, kwargs, inspect.signature(generate).parameters)
        guided = OneCall(
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
            reward_label=reward_label,
            reward_kind=reward_kind,
            reward_method=reward_method,
            eos_reward=eos_reward,
            output_candidates=output_candidates,
            check_nan=check_nan,
            backend=backend,
            sync_every=sync_every,
            compact=compact,
            reward_range=reward_range,
            prune=prune,
            beta_schedule=beta_schedule,
            kl_budget=kl_budget,
            min_entropy=min_entropy,
            candidates=candidates,
            guided_top_p=guided_top_p,
            cuda_graph=cuda_graph,
            compile=compile,
            speculate=speculate,
            assistant_model=assistant_model,
        )
        # transformers hands neither of these to a custom_generate callable: bound here.
        bound = functools.partial(
            guided,
            streamer=kwargs.get("streamer"),
            keep_cache=kwargs.get(CACHE) is not None,
        )
        if kwargs.get("synced_gpus"):
            bound = functools.partial(bound, synced_gpus=True)
        stop_strings_as_criterion(model, tokenizer, kwargs)
        if inputs is not None:
            kwargs["inputs"] = inputs
        return model.generate(custom_generate=bound, **kwargs)


def stop_strings_as_criterion(model: Any, tokenizer: Any, kwargs: dict[str, Any]) -> None:
    """Turn `stop_strings`, of the call or of a configuration, into a criterion in `kwargs`.

    Hugging Face loses the tokenizer on the way to a callable, and then asks for it. An explicit
    None overrides the model's own configuration, and one in a configuration passed does not.
    """
    given, own = kwargs.get("generation_config"), model.generation_config
    configured = [getattr(c, "stop_strings", None) for c in (given, own)]
    stop_strings = kwargs.pop("stop_strings", configured[0] or configured[1])
    if configured[0]:
        kwargs["generation_config"] = copy.deepcopy(given)
        kwargs["generation_config"].stop_strings = None
    if configured[1]:
        kwargs["stop_strings"] = None
    if stop_strings:
        check.check_stop_strings(stop_strings, tokenizer)
        criterion = StopStringCriteria(tokenizer, stop_strings)
        kwargs["stopping_criteria"] = StoppingCriteriaList(
            [*(kwargs.get("stopping_criteria") or []), criterion]
        )


__all__ = ["RewardGuided", "generate"]
