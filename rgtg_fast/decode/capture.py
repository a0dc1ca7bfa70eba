"""Whether the steps of a call can be captured in a CUDA graph, and if not, why."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..models.foreign import hooks_of
from ..scorers.weighted import leaves_of
from .call import Call
from .graphs import GRAPHS, Graph
from .plan import SCORES_ALONE


def choose_graph(asked: bool | None, call: Call) -> Graph | None:
    """A graph for this call, or None where it was not `asked` for or is not possible (with a
    warning that says why where `asked` is True)."""
    if asked is False:
        return None
    device = call.policy.seeds.device
    reason = (
        _why_not_host(call, device)
        or next((why for p in call.processors if (why := _why_not_processor(p, device))), None)
        or _why_not_models(call.source, call.scorer, device)
    )
    if reason is None:
        return GRAPHS[device.type](device)
    if asked:
        warnings.warn(f"cuda_graph=True has no effect: {reason}", stacklevel=3)
    return None


def _why_not_host(call: Call, device: torch.device) -> str | None:
    """What in a step has to run on the host."""
    if device.type not in GRAPHS:
        return f"the prompts are on a {device.type} device"
    if call.streamer is not None:
        return "a streamer takes each token as it comes"
    if call.plan.synced_gpus:
        return "synced_gpus=True counts the other ranks' steps"
    if call.plan.foreign is not None:
        return f"the stopping criterion {call.plan.foreign} runs on the host"
    if call.policy.check_nan is True:
        return "check_nan=True looks at every step"
    if call.policy.prune and call.policy.reward_range is not None:
        return "prune=True asks for other candidates at every step"
    if call.policy.over == "all" and call.policy.top_p is not None:
        return "guided_top_p= of the whole vocabulary looks where the nucleus ends"
    if call.record.wants_logits:
        return "output_scores and output_logits keep new tensors at every step"
    return None


def _why_not_processor(processor: Any, device: torch.device) -> str | None:
    name = type(processor).__name__
    if type(processor) not in SCORES_ALONE:
        return f"the logits processor {name} may look at the step, or make the host wait"
    ids = getattr(processor, "suppress_tokens", None)
    if ids is not None and (ids.device != device or ids.numel() >= 10):
        # From about ten ids on, depending on the vocabulary, torch.isin sorts and the host waits.
        return f"{name} with {ids.numel()} tokens on {ids.device} makes the host wait"
    return None


def _why_not_models(source: Any, scorer: Any, device: torch.device) -> str | None:
    if not source.capturable:
        return "the language model runs on Hugging Face's own cache"
    of_reward: list[Any] = []
    for part in leaves_of(scorer):
        if not getattr(part, "capturable", False):
            kind = getattr(part, "method", type(part).__name__)
            return f"scoring by {kind!r} does not keep its state in place on the device"
        rm = getattr(part, "rm", None)
        of_reward += [] if rm is None else [rm.model, getattr(rm, "head", None)]
    for what, modules in (("language", (source.view.model,)), ("reward", of_reward)):
        for part in modules:
            why = why_not_module(part, device) if isinstance(part, nn.Module) else None
            if why is not None:
                return f"the {what} model {why}"
    return None


def why_not_module(model: nn.Module, device: torch.device) -> str | None:
    """What of a model a step would not find again that is kept: replayed, or compiled."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device != device:
            return f"has weights on {tensor.device}, the prompts are on {device}"
    for name, module in model.named_modules():
        hooks = hooks_of(module)
        # transformers leaves its own on a model once hidden states were asked for; they do nothing
        # in these forwards.
        if any(not getattr(h, "__module__", "").startswith("transformers.") for h in hooks):
            return f"has hooks (on {name or 'itself'}), which replays would pass by"
        rope = getattr(module, "rope_type", None)
        kinds = rope.values() if isinstance(rope, dict) else (rope,)
        if any(isinstance(kind, str) and kind in ("dynamic", "longrope") for kind in kinds):
            return f"has rotary embeddings ({name}) that the host sets by the length"
    return None
