"""What a reward model is made of: a base (hidden states) and a head (a number)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import ops
from .cpu_linear import FastLinears
from .foreign import cache_argument

HEAD_NAMES = ("score", "classifier", "v_head", "regression_head")
BASE_NAMES = ("model", "transformer", "pretrained_model", "base_model", "backbone", "gpt_neox")


class RewardModel:
    """A reward model taken apart: `base(ids) -> hidden [.., H]` and `rewards(hidden) -> fp32 [..]`.

    The public `...ForSequenceClassification` forward pools one position only, so base and head are
    called directly. `model` may be a Hugging Face model, a PEFT model around one, or any module
    that holds a `PreTrainedModel` and a head named `score`, `classifier`, `v_head` or
    `regression_head`; another head is given as `head` (a callable [..., H] -> [...] or [..., 1]).

    Raises `ValueError` where no base or head is found, or the head gives several labels.
    """

    layer = -1  # the hidden state that the head reads; see `RewardHead`

    def __init__(self, model: nn.Module, head: Callable[[Tensor], Tensor] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"reward_model must be a torch module or a scorer with prefill, score and commit; "
                f"got {type(model).__name__}"
            )
        if head is not None and not callable(head):
            raise ValueError(
                f"reward_head must be a module or function, hidden [..., H] -> rewards [...]; "
                f"got {head!r}"
            )
        self.model = model
        inner: Any = model
        if hasattr(model, "get_base_model"):
            inner = inner.get_base_model()
        self.base: Any = find_base(inner)
        self.config = self.base.config
        self.text_config = self.config.get_text_config()
        self.head = head if head is not None else _find_head(inner, self.base)
        self.check_public = head is None
        self._kernels: dict[tuple, Callable[..., Tensor]] = {}  # of reward_head
        self._modules = list(model.modules())
        if isinstance(self.head, nn.Module):
            self._modules += list(self.head.modules())
        self.fast_linears = FastLinears(self.base)
        embedding = self.base.get_input_embeddings()
        self.device: torch.device = embedding.weight.device
        self.vocab_size: int = embedding.weight.shape[0]
        parameters = inspect.signature(self.base.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._cache_argument = cache_argument(self.base.forward)
        self._accepts = None if takes_any and "position_ids" in parameters else set(parameters)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.base.parameters() if p.is_floating_point())

    def forward_base(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """Hidden states [B, n, H] of the base, and the whole output. `cache=` is the key/value
        cache, whatever the model calls it."""
        if "cache" in kwargs:
            kwargs[self._cache_argument] = kwargs.pop("cache")
        if self._accepts is not None:
            kwargs = {name: v for name, v in kwargs.items() if name in self._accepts}
        out = self.base(input_ids, return_dict=True, **kwargs)
        hidden = getattr(out, "last_hidden_state", None)
        return (hidden if hidden is not None else out[0]), out

    def rewards(self, hidden: Tensor, backend: ops.Backend = "auto") -> Tensor:
        """Rewards fp32 [B, n] of hidden states [B, n, H], on the hidden states' device."""
        head = self.head
        if type(head) is nn.Linear and _is_plain(head, hidden.shape[-1]):
            weight, bias = head.weight[0], head.bias
            if weight.device != hidden.device:
                hidden = hidden.to(weight.device)
            key = backend, hidden.device, len(hidden)
            if key not in self._kernels:
                self._kernels[key] = ops.kernel("reward_head", *key)
            return self._kernels[key](hidden.to(weight.dtype), weight, bias)
        parameter = next(head.parameters(), None) if isinstance(head, nn.Module) else None
        if parameter is not None:
            hidden = hidden.to(parameter.device, parameter.dtype)
        out = head(hidden)
        if out.dim() == hidden.dim() and out.shape[-1] == 1:
            out = out.squeeze(-1)
        if out.shape != hidden.shape[:-1]:
            raise ValueError(
                f"reward_head gave shape {list(out.shape)} for hidden states "
                f"{list(hidden.shape)}; it must give one number per position"
            )
        return out.float()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode inside; every module's own training flag restored on the way out."""
        training = [m for m in self._modules if m.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _is_plain(head: nn.Linear, width: int) -> bool:
    hooked = head._forward_hooks or head._forward_pre_hooks
    return head.weight.shape == (1, width) and not hooked


def as_reward_model(model: Any, head: Callable[[Tensor], Tensor] | None = None) -> RewardModel:
    """`model` taken apart, if it is not already. Raises `ValueError` for two heads at once."""
    if not isinstance(model, RewardModel):
        return RewardModel(model, head)
    if head is not None:
        raise ValueError(
            f"reward_head is given beside a {type(model).__name__}, which has a head; leave it out"
        )
    return model


def find_base(model: Any) -> Any:
    if isinstance(model, PreTrainedModel):
        if model.base_model is not model:
            return model.base_model
        # Some classes do not name the attribute that holds their base.
        children = (getattr(model, name, None) for name in BASE_NAMES if name != "base_model")
        return next((c for c in children if isinstance(c, PreTrainedModel)), model)
    for name in BASE_NAMES:
        child: Any = getattr(model, name, None)
        if hasattr(child, "peft_config"):
            child = child.get_base_model()
        if isinstance(child, PreTrainedModel):
            return child.base_model
    raise ValueError(
        f"reward_model {type(model).__name__} holds no transformers model under any of the names "
        f"{', '.join(BASE_NAMES)}; pass a Hugging Face model, or an object with the three methods "
        "prefill, score and commit"
    )


def _find_head(model: nn.Module, base: nn.Module) -> nn.Module:
    owners = [model] + ([base] if base is not model else [])
    heads = (getattr(owner, name, None) for owner in owners for name in HEAD_NAMES)
    head = next((h for h in heads if isinstance(h, nn.Module)), None)
    if head is None and getattr(model, "get_output_embeddings", lambda: None)() is not None:
        raise ValueError(
            f"reward_model {type(model).__name__} is a language model, which has no reward head; "
            "pass rgtg_fast.scorers.AutoregressiveScorer(model) for one trained as GenARM, "
            "VocabRewardScorer(model) for one trained as FaRMA, or reward_head= (hidden [..., H] "
            "-> reward [...])"
        )
    if head is None:
        raise ValueError(
            f"reward_model {type(model).__name__} has no reward head named "
            f"{', '.join(HEAD_NAMES)}; pass reward_head= (hidden [..., H] -> reward [...])"
        )
    # Not config.num_labels: Hugging Face sets it to 2 where a custom class never says.
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    labels = linears[-1].out_features if linears else 1
    if labels != 1:
        raise ValueError(
            f"reward_model gives {labels} labels per position, one is wanted; load it with "
            "num_labels=1, or pass reward_head= to choose the number to use"
        )
    return head
