"""Published decoders that mix whole language models, as keyword arguments of `rgtg_fast.generate`.

π is the language model that is decoded. Decoding is greedy or, with `do_sample=True`, sampled, as
the call says, where the paper leaves both open. The models share π's tokens; one that a model lacks
is never drawn. Scores may differ from a paper's by what is the same for every token of a step.

`top_k=0` is there because Hugging Face otherwise cuts π to 50 tokens in sampling; what the paper
cuts is a logits processor, so that it cuts greedy decoding too.
"""

from __future__ import annotations

from typing import Any

from transformers import MinPLogitsWarper, TopPLogitsWarper

_WHOLE = {"k": None, "top_k": 0}


def genarm(arm: Any, alpha: float = 1.0) -> dict[str, Any]:
    """GenARM: log π + α log π_r over the whole vocabulary (arXiv 2410.08193, whose β is 1/α).

    `arm`: an autoregressive reward model, a causal language model.
    """
    return {"reward_model": arm, "reward_kind": "genarm", "beta": alpha, **_WHOLE}


def farma(rm: Any, beta: float = 1.0) -> dict[str, Any]:
    """FaRMA: log π(v) + β r(x, y_<t, v), r a logit of `rm` at every token v (arXiv 2502.04517).

    `rm`: a causal language model whose output layer is the reward head.
    """
    return {"reward_model": rm, "reward_kind": "farma", "beta": beta, **_WHOLE}


def dpo_implicit(policy: Any, reference: Any, beta: float = 1.0) -> dict[str, Any]:
    """DPO's implicit reward: log π + β (log π_policy - log π_reference) (arXiv 2305.18290).

    With π a larger model than the two, and β = 1, it is emulated fine-tuning, or up-scaling
    (arXiv 2310.12962).
    """
    return {"reward_model": (policy, reference), "beta": beta, **_WHOLE}


def dexperts(
    expert: Any, anti_expert: Any, alpha: float = 2.0, filter_p: float = 0.9
) -> dict[str, Any]:
    """DExperts: z + α (z⁺ - z⁻), on the nucleus `filter_p` of π (arXiv 2105.03023).

    α = 2.0 is the paper's for toxicity, 3.2 for sentiment; the nucleus is of its code. 1.0: all.
    """
    cut = {} if filter_p >= 1.0 else {"logits_processor": [TopPLogitsWarper(filter_p)]}
    return {"reward_model": (expert, anti_expert), "beta": alpha, **_WHOLE, **cut}


def proxy_tuning(tuned: Any, untuned: Any, alpha: float = 1.0) -> dict[str, Any]:
    """Proxy-tuning: z + α (z_tuned - z_untuned), of small models beside π (arXiv 2401.08565)."""
    return {"reward_model": (tuned, untuned), "beta": alpha, **_WHOLE}


def contrastive(
    amateur: Any, alpha: float = 0.1, amateur_temperature: float = 1.0
) -> dict[str, Any]:
    """Contrastive decoding: log π - log π_amateur of tokens with π >= α max π (arXiv 2210.15097).

    The amateur's logits are divided by `amateur_temperature` (the paper's: 1.0 for OPT, 0.5 for
    GPT-2). The paper searches this sum by beams; here it is greedy or drawn from.
    """
    return {
        "reward_model": amateur,
        "reward_kind": "genarm",
        "beta": -1 / amateur_temperature,
        "logits_processor": [MinPLogitsWarper(alpha)],
        **_WHOLE,
    }


def pad(
    personalized: Any, reference: Any = None, weight: float = 0.8, k: int = 10
) -> dict[str, Any]:
    """PAD: argmax of log π + w (log π_p - log π_ref) over the k most likely tokens of π
    (arXiv 2410.04070; w = 0.8, k = 10 and π_ref = π as in its code).

    `personalized` sees the preference in its prompt: give `reward_input_ids=`, or the same prompt
    to both. `reference=None` is π itself: (1 - w) log π + w log π_p, for which w < 1.
    """
    if reference is not None:
        how = {"reward_model": (personalized, reference), "beta": weight}
    else:
        beta, _ = _shares("weight", weight)
        how = {"reward_model": personalized, "reward_kind": "genarm", "beta": beta}
    return {**how, "k": k, "do_sample": False}


def nash_md(mu: Any, mixture: float = 0.125, temperature: float = 1.0) -> dict[str, Any]:
    """Nash-MD's mixture π^(1-b) μ^b, tempered by T, b = `mixture` (arXiv 2312.00886).

    Said as log π + b/(1-b) log μ at temperature T/(1-b): the same policy.
    """
    beta, share = _shares("mixture", mixture)
    how = {"reward_model": mu, "reward_kind": "genarm", "beta": beta}
    return {**how, "temperature": temperature / share, **_WHOLE}


def aad(reference: Any, alpha: float = 0.1) -> dict[str, Any]:
    """Alignment-aware decoding: argmax of log π - log π_reference over the tokens with
    π >= α max π (arXiv 2509.26169). π is a model after DPO, `reference` the one before."""
    return {**contrastive(reference, alpha), "do_sample": False}


def _shares(name: str, weight: float) -> tuple[float, float]:
    """w/(1-w) and 1-w; `ValueError` where there is nothing left of π."""
    if not 0 <= weight < 1:
        raise ValueError(f"{name}={weight!r} is the other model's share beside π; pass 0 <= x < 1")
    return weight / (1 - weight), 1 - weight
