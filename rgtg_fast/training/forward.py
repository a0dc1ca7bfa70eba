"""A model taken apart for training: hidden states of all positions, and differentiable heads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.reward_model import RewardModel

_ROWS = 1024  # positions per block of logits over the vocabulary; more would take more memory


class TrainedParts:
    """Base and head of a reward model under training; every method is differentiable.

    `head="scalar"` takes a `...ForSequenceClassification` with one label (or another model that
    `RewardModel` can take apart); `head="vocab"` takes a causal LM, whose output embeddings are the
    head. PEFT models with injected adapters are both.

    `reference` is the frozen language model that some objectives need beside it.

    Raises `ValueError` where the model has no such head, or prompt-learning adapters.
    """

    def __init__(self, model: nn.Module, head: str, reference: nn.Module | None = None) -> None:
        configs = getattr(model, "peft_config", None) or {}
        if any(getattr(c, "is_prompt_learning", False) for c in configs.values()):
            raise ValueError(
                "the adapter adds virtual tokens, which the base model does not see when it is "
                "called directly; use an injected one such as LoRA"
            )
        self.model, self.reference = model, reference
        inner: Any = model.get_base_model() if configs else model  # type: ignore[operator]
        self.inner = inner
        embeddings = getattr(inner, "get_output_embeddings", lambda: None)()
        if head == "vocab":
            if embeddings is None:
                raise ValueError(
                    f"{type(inner).__name__} has no output embeddings over the vocabulary; this "
                    "loss_type trains a causal LM (AutoModelForCausalLM)"
                )
            self.rm = RewardModel(model, head=embeddings)
        else:
            if embeddings is not None and not hasattr(inner, "score"):
                raise ValueError(
                    f"{type(inner).__name__} is a language model; this loss_type trains a model "
                    "with one label (AutoModelForSequenceClassification, num_labels=1)"
                )
            self.rm = RewardModel(model)
        self.head: Any = self.rm.head

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [B, L, H] of ids [B, L], padded on the right."""
        hidden, _ = self.rm.forward_base(input_ids, attention_mask=attention_mask, use_cache=False)
        return hidden

    def scalar(self, hidden: Tensor) -> Tensor:
        """Rewards [..] of hidden states [.., H], fp32 unless they are wider."""
        weight = next(self.head.parameters(), None)
        # Outside of autocast: in bf16 rewards around 10 are multiples of 1/16.
        with torch.autocast(hidden.device.type, enabled=False):
            if type(self.head) is nn.Linear:
                bias = self.head.bias if self.head.bias is None else at_least_fp32(self.head.bias)
                out = F.linear(at_least_fp32(hidden), at_least_fp32(self.head.weight), bias)
            else:
                out = self.head(hidden if weight is None else hidden.to(weight.dtype))
        if out.dim() == hidden.dim() and out.shape[-1] == 1:
            out = out.squeeze(-1)
        return at_least_fp32(out)

    def token(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The vocabulary head's outputs [..] for tokens [..] at hidden states [.., H]."""
        if type(self.head) is not nn.Linear:  # an adapter on the head: no plain rows to gather
            return at_least_fp32(self.head(hidden).gather(-1, ids[..., None])[..., 0])
        rows = F.embedding(ids, self.head.weight)
        out = (at_least_fp32(hidden) * at_least_fp32(rows)).sum(-1)
        return out if self.head.bias is None else out + self.head.bias[ids]

    def best_token(self, hidden: Tensor) -> Tensor:
        """The largest output over the vocabulary [M] at hidden states [M, H]."""
        parts = [self.head(part).amax(-1) for part in hidden.split(_ROWS)]
        return at_least_fp32(torch.cat(parts))

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor, first: int) -> Tensor:
        """Logits [B, L - first, V] that the tokens from position `first` >= 1 on are drawn from."""
        return self._logits(self.model, first - 1, input_ids, attention_mask)[:, :-1]

    def node_logits(
        self, input_ids: Tensor, mask: Tensor, position_ids: Tensor | None, first: int
    ) -> Tensor:
        """Logits [B, L - first, V] at positions `first` on of ids [B, L]; with a mask [B, 1, L, L]
        that is added to attention scores, those of the nodes of trees."""
        places = {} if position_ids is None else {"position_ids": position_ids}
        return self._logits(self.model, first, input_ids, mask, **places)

    @torch.no_grad()
    def reference_logprobs(self, input_ids: Tensor, attention_mask: Tensor, first: int) -> Tensor:
        """The reference's log-probs [B, L - first, V] there, of every token."""
        logits = self._logits(self.reference, first - 1, input_ids, attention_mask)[:, :-1]
        return logits.log_softmax(-1)

    def _logits(self, model: Any, first: int, ids: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        keep = ids.shape[1] - first
        if "logits_to_keep" in inspect.signature(self.inner.forward).parameters:
            kwargs["logits_to_keep"] = keep
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs)
        return at_least_fp32(out.logits[:, -keep:])

    def token_logprobs(self, input_ids: Tensor, attention_mask: Tensor, first: int) -> Tensor:
        """Log-probs [B, L - first] of the tokens from position `first` >= 1 on, each given what is
        before it."""
        logits = self.next_logits(input_ids, attention_mask, first)
        picked = logits.gather(-1, input_ids[:, first:, None])[..., 0]
        return picked - logits.logsumexp(-1)


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout of the model to zero, except in adapters, whose dropout is an option of
    their own."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        for rate in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)


def call_inside(wrapped: nn.Module, inner: nn.Module, function: Callable[[], Any]) -> Any:
    """`function()` run as the forward of `wrapped` (DistributedDataParallel and its like, or the
    model itself with its hooks), so that gathering of weights and reduction of gradients see it,
    while `function` is free to call the parts of `inner`.
    """
    own = inner.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.__dict__["forward"] = own

    def forward(*_: Any, **__: Any) -> Any:
        restore()
        return function()

    inner.__dict__["forward"] = forward
    try:
        return wrapped()
    finally:
        restore()


@torch.no_grad()
def check_causal(parts: TrainedParts) -> None:
    """Changes the last of a few tokens and checks that earlier hidden states stay the same.

    Raises `ValueError` where they change: one forward then does not give the prefixes' rewards.
    """
    ids = torch.arange(7, device=parts.rm.device)[None] % parts.rm.vocab_size
    changed = ids.clone()
    changed[0, -1] = parts.rm.vocab_size // 2
    twin, mask = parts.rm.twin(), torch.ones_like(ids)
    one, two = (
        twin.forward_base(i, attention_mask=mask, use_cache=False)[0][0, :-1].float()
        for i in (ids, changed)
    )
    least = 1e-5 if parts.rm.dtype in (torch.float32, torch.float64) else 1e-2
    if one.shape[0] != 6 or (one - two).abs().max() > least * one.abs().max():
        raise ValueError(
            f"{type(parts.inner).__name__} looks ahead: what follows a prefix changes its hidden "
            "states, so one forward cannot give the rewards of all prefixes; train a causal model "
            "(GPT-2, Llama, Qwen, ... ForSequenceClassification)"
        )
