"""Decoders that add a reward of each candidate to the language model's log-probabilities.

π is the language model, C its k most likely next tokens, z their logits. As log π = z - log Σ exp z
differs from z by the same number for all of a row, adding a reward to either one gives the same
argmax and the same softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..models.reward_model import Label, RewardModel, is_causal
from ..models.vocab_head import Head, VocabHead
from ..scorers.rewards import Reward, WeightedRewards

Number = float | Tensor  # a tensor [B]: a value for each prompt


def pargs(
    reward_model: Any, *, beta: Number = 2.0, k: int = 10, temperature: Number = 1.0
) -> dict[str, Any]:
    """PARGS: y ~ softmax((log π(v) + β r(x, y_<t, v)) / T) over the k most likely tokens v.

    `reward_model`, whatever `rgtg_fast.generate` takes as such, is to be trained on prefixes.
    Published: k = 10, β = 2.0. arXiv 2406.07780, github.com/ahmadrash/PARGS.
    """
    return _sampled(reward_model, beta, k, temperature)


def pargs_greedy(reward_model: Any, *, beta: Number = 1.0, k: int = 10) -> dict[str, Any]:
    """PARGS-G: y = argmax log π(v) + β r(x, y_<t, v) over the k most likely tokens v.

    As `pargs`. Published: k = 10, β = 1.0. arXiv 2406.07780, github.com/ahmadrash/PARGS.
    """
    return _greedy(reward_model, beta, k)


def args(reward_model: Any, *, weight: Number = 1.0, k: int = 10) -> dict[str, Any]:
    """ARGS-greedy: y = argmax z(v) + w r(x, y_<t, v) over the k most likely tokens v.

    The reward model is one trained on whole answers. The published code adds the reward to the
    logits (the paper writes LM(v | x)), and goes on behind EOS for as many tokens as it is asked
    for; here EOS ends an answer. Published: k = 10, w = 1.0 in the code's example.
    arXiv 2402.01694, github.com/deeplearning-wisc/args (`method="greedy"`; its "greedy_large" is
    the same rule).
    """
    return _greedy(reward_model, weight, k)


def args_stochastic(
    reward_model: Any, *, weight: Number = 1.0, k: int = 10, temperature: Number = 0.7
) -> dict[str, Any]:
    """ARGS-stochastic: y ~ softmax((z(v) + w r(x, y_<t, v)) / T) over the k most likely tokens v.

    As `args`. Published: k = 10, T = 0.7; the script that made the paper's answers reads
    `sample_temp` and does not pass it on, so it always ran at 0.7. arXiv 2402.01694,
    github.com/deeplearning-wisc/args (`method="topk"`).
    """
    return _sampled(reward_model, weight, k, temperature)


def rad(
    reward_model: Any,
    *,
    beta: Number = 30.0,
    k: int = 20,
    attribute: Label = None,
    inverse: bool = False,
    temperature: Number = 1.0,
) -> dict[str, Any]:
    """RAD: y ~ softmax((z(v) + β min(max(r(x, y_<t, v), 0), 1)) / T) over the k most likely v.

    r is the model's output as it is. `attribute` is the label of a model with several, as
    `reward_label` of `rgtg_fast.generate`; `inverse` steers away from it, by 1 - r. EOS has the
    reward of the text before it, as the published code decodes without special tokens.

    Published: k = 20, β = 30 (its toxicity evaluation: β = 10, `inverse=True`, the first of seven
    attributes), T = 1. Its cached path gives each candidate a position one too high, which is not
    done here. arXiv 2310.09520, github.com/r-three/RAD. There the reward model is a GPT-2 whose
    `lm_head` has a row for each attribute; `clf = GPT2ForSequenceClassification(config)`, with
    `clf.transformer, clf.score = rm.model.transformer, rm.model.lm_head`, is the same one.
    """
    model = _classifier("rad", reward_model, attribute, "regression")
    reward = 1.0 - (model if isinstance(model, WeightedRewards) else Reward(model))
    chosen = _sampled(reward if inverse else model, beta, k, temperature)
    return chosen | {"reward_range": (0.0, 1.0), "eos_reward": "previous"}


def cd_fudge(
    reward_model: Any,
    *,
    attribute: Label = None,
    strength: Number = 1.0,
    k: int = 64,
    temperature: Number = 1.0,
) -> dict[str, Any]:
    """FUDGE, CD-FUDGE: y ~ softmax((log π(v) + λ log p(attribute | x, y_<t, v)) / T) over k tokens.

    log p is the log-sigmoid of a classifier with one number, or, with `attribute` (a name or an
    index), the log-probability of that label: its log-softmax, or its log-sigmoid where the
    configuration says `problem_type="multi_label_classification"`. What is no model (a function of
    texts, an endpoint, a scorer, a sum) is to give log p itself.

    Published: λ = 1, T = 1; FUDGE asks about 200 candidates and draws from the 10 best sums (its
    formality task takes the best one), here k <= 64 and all of them may be drawn.
    arXiv 2104.05218, github.com/yangkevin2/naacl-2021-fudge-controlled-generation; with a prefix
    scorer for rewards, as CD-FUDGE in arXiv 2310.17022: without repository, there `pargs` is it.
    """
    kind = "multi_label_classification" if attribute is None else None
    model = _classifier("cd_fudge", reward_model, attribute, kind)
    return _sampled(model, strength, k, temperature)


def cd_q(
    lm: Any,
    q: Head,
    *,
    strength: Number = 1.0,
    k: int | None = None,
    temperature: Number = 1.0,
) -> dict[str, Any]:
    """CD-Q: y ~ softmax((log π(v) + λ q_v · h) / T) over all tokens v, or the k most likely.

    h is the hidden state of `lm` behind x, y_<t, and q_v · h the value of going on with v, which
    the paper learns by Bellman updates; `q` is a head [V, H] or a module (see `VocabHead`). It
    costs no forward. A value of prefix and token from a model of its own, V(x, y_<t, v), is
    `pargs(value_model, beta=λ)`; one from the states of `lm`, `pargs(RewardHead(lm, weight))`.

    Published: λ is swept, over the whole vocabulary. arXiv 2310.17022, no repository.
    """
    return _sampled(VocabHead(lm, q), strength, k, temperature)


def ilql(
    lm: Any,
    q: Head | Sequence[Head],
    value: Head,
    *,
    beta: Number = 1.0,
    k: int | None = None,
    temperature: Number = 1.0,
) -> dict[str, Any]:
    """ILQL: y ~ softmax((log π(v) + β (min(Q1(h)_v, Q2(h)_v) - V(h))) / T) over all tokens v, or
    the k most likely.

    h is the hidden state of `lm` behind x, y_<t; `q` are the target heads, one or two of them (a
    tensor [V, H], or a module such as the published linear - ReLU - linear), `value` is V: it is
    the same for all v, so `rewards` in the output shows it, and nothing else does. No forward.

    Published: β = 1 (8 in its toxicity evaluation), T = 1, the whole vocabulary (trlx: of the sum,
    the 20 best). Where the policy is a model of its own, as in that evaluation, `lm`
    is that of the heads, and runs one token a step. arXiv 2206.11871,
    github.com/Sea-Snell/Implicit-Language-Q-Learning (`score` with `exp_weights=True`).
    """
    return _sampled(VocabHead(lm, q, value), beta, k, temperature)


def _greedy(reward_model: Any, beta: Number, k: int) -> dict[str, Any]:
    return {"reward_model": reward_model, "beta": beta, "k": k, "do_sample": False}


def _sampled(reward_model: Any, beta: Number, k: int | None, temperature: Number) -> dict[str, Any]:
    # A model's own generation configuration may cut π, which none of these decoders does.
    whole = {"top_k": 0, "top_p": 1.0}
    chosen = {"reward_model": reward_model, "beta": beta, "k": k, "temperature": temperature}
    return chosen | {"do_sample": True} | whole


def _classifier(preset: str, model: Any, attribute: Label, problem_type: str | None) -> Any:
    """`model` with the output that a decoder takes; what is no model as it is."""
    if not isinstance(model, nn.Module):
        if attribute is not None:
            raise ValueError(
                f"presets.{preset}: attribute={attribute!r} is a label of a classifier, and "
                f"reward_model is {type(model).__name__}; leave it out"
            )
        return model
    if is_causal(model):
        raise ValueError(
            f"presets.{preset} takes a classifier, and {type(model).__name__} is a causal language "
            "model; pass an AutoModelForSequenceClassification, or see presets.genarm and "
            "presets.farma"
        )
    try:
        return RewardModel(model, label=attribute, problem_type=problem_type)
    except ValueError as error:
        raise ValueError(f"presets.{preset}, where reward_label is attribute: {error}") from None
