"""A model taken apart: its base, which gives hidden states, and what is known of it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from .cpu_linear import quicken
from .foreign import attention_of, cache_argument, set_attention
from .twin import Twins

BASE_NAMES = ("model", "transformer", "pretrained_model", "base_model", "backbone", "gpt_neox")


class ModelParts:
    """`model` and its `base`, with `config` and `text_config` (the base's, and what of it is about
    text), `device` and `vocab_size` of its embeddings, and `dtype`.

    `model` may be a Hugging Face model, a PEFT model around one, or any module that holds a
    `PreTrainedModel`. Forwards are run on a `twin`: nothing here changes the model.

    Raises `ValueError` where no base is found.
    """

    layer = -1  # the hidden state in use; see `RewardHead`
    attention: str | None = None  # what a twin attends by at first; None: as the model does
    twins: Twins | None = None  # of a twin

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.base: Any = find_base(inner)
        self.config = self.base.config
        self.text_config = self.config.get_text_config()
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

    @property
    def implementation(self) -> str | None:
        """The attention implementation that a twin begins with."""
        return self.attention or attention_of(self.text_config)

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

    def twin(self, eval_mode: bool = True) -> Self:
        """The same parts of a copy of the model that shares its tensors, to run forwards on; where
        torch has faster linear layers for CPUs, with them. Nothing done to it reaches the model."""
        twins = Twins(self._roots(), eval_mode)
        own = copy.copy(self)
        own.twins = twins
        own.model, own.base = twins[self.model], twins[self.base]
        own.config = own.base.config
        own.text_config = own.config.get_text_config()
        if self.attention is not None:
            for config in twins.configs:
                set_attention(config, self.attention)
        quicken(twins.modules)
        return own

    def _roots(self) -> list[nn.Module]:
        return [self.model, self.base]


def find_base(model: Any) -> Any:
    """The `PreTrainedModel` without head in `model`."""
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


def numerics(device: torch.device) -> tuple[torch.dtype | None, torch.dtype]:
    """Autocast's dtype on `device` (None where it is off) and torch's default dtype. They change
    what a forward computes, so the probe keeps verdicts by them."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else None
    return dtype, torch.get_default_dtype()


def computing_dtype(parts: ModelParts) -> torch.dtype:
    """The dtype whose precision the hidden states have."""
    autocast = numerics(parts.device)[0]
    return autocast if autocast is not None and parts.dtype == torch.float32 else parts.dtype
