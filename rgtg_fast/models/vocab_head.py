"""Rewards of all next tokens from the language model's hidden state: Q and value heads on it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from .foreign import hooked
from .on_base import check_language_model, linear
from .parts import ModelParts
from .twin import Twins

Head = Tensor | nn.Module


class VocabHead(ModelParts):
    """The reward `min_i q_i(h)[v] - value(h)` of a token v, h the language model's last hidden
    state before it (after the final norm): of candidates, k rows of each q_i are read.

    Passed as `reward_model=` to `rgtg_fast.generate`. On the language model that decodes it costs
    no forward; on another one, and where Hugging Face's own loop runs, one of one token a step.

    Args:
        lm: a causal language model; its weights are shared, not copied.
        heads: one or several: a float tensor [V, H]; or a module, hidden [n, H] -> [n, V], of which
            an `nn.Linear`, or an `nn.Sequential` that ends in one, is run for the candidates alone.
            A token that a head has no row for cannot be chosen.
        value: a float tensor [H], or a module, hidden [n, H] -> [n] or [n, 1]. It is the same for
            all candidates: only `rewards` in the output shows it. None: 0.

    Raises:
        ValueError: a language model without output embeddings, or heads that do not fit it.
    """

    def __init__(self, lm: Any, heads: Head | Sequence[Head], value: Head | None = None) -> None:
        check_language_model(lm)
        super().__init__(lm)
        output = getattr(lm, "get_output_embeddings", lambda: None)()
        if output is None:
            raise ValueError(
                f"lm {type(lm).__name__} has no output embeddings over the vocabulary; pass a "
                "causal LM (AutoModelForCausalLM)"
            )
        size, device = output.weight.shape[-1], output.weight.device
        given = list(heads) if isinstance(heads, (list, tuple)) else [heads]
        if not given:
            raise ValueError("heads is empty; pass a head [V, H], or several")
        modules = [_module(f"heads[{i}]", head, "[V, H]", device) for i, head in enumerate(given)]
        self.heads = len(modules)
        if value is not None:
            modules.append(_module("value", value, "[H]", device))
        self.head = nn.ModuleList(modules)
        for i, head in enumerate(modules):
            name, wanted = (f"heads[{i}]", "[n, V]") if i < self.heads else ("value", "[n]")
            _check_output(name, head, size, device, wanted)

    def of_heads(self) -> Self:
        """The same with copies of the heads, in eval mode and sharing their tensors, for a call."""
        own = copy.copy(self)
        own.twins = Twins([self.head], eval_mode=True)
        own.head = own.twins[self.head]
        return own

    def rewards(self, hidden: Tensor, ids: Tensor, backend: ops.Backend = "auto") -> Tensor:
        """Rewards fp32 [n, k] of tokens `ids` int64 [n, k] after hidden states [n, H]; -inf for
        those that a head has no row for."""
        return self._combined([_of_tokens(q, hidden, ids, backend) for q in self._q()], hidden)

    def score_all(self, hidden: Tensor) -> Tensor:
        """Rewards fp32 [n, V] of all tokens that every head has a row for, after states [n, H]."""
        values = [q(_as_input(q, hidden)).float() for q in self._q()]
        rows = min(value.shape[1] for value in values)
        return self._combined([value[:, :rows] for value in values], hidden)

    def _q(self) -> list[Any]:
        return list(self.head)[: self.heads]

    def _combined(self, values: list[Tensor], hidden: Tensor) -> Tensor:
        rewards = functools.reduce(torch.minimum, values)
        baselines: list[Any] = list(self.head)[self.heads :]
        for value in baselines:
            rewards = rewards - value(_as_input(value, hidden)).float().view(-1, 1)
        return rewards


def _of_tokens(head: Any, hidden: Tensor, ids: Tensor, backend: ops.Backend) -> Tensor:
    """What `head` gives tokens `ids` [n, k], fp32."""
    hidden = _as_input(head, hidden)
    last, before = head, None
    if type(head) is nn.Sequential and len(head) and not hooked(head):
        last, before = head[-1], head[:-1]
    if type(last) is nn.Linear and not hooked(last):
        hidden = (hidden if before is None else before(hidden)).contiguous()
        rows = last.out_features
        known = ids.clamp(max=rows - 1)
        rewards = ops.kernel("vocab_reward", backend, hidden.device, len(hidden))(
            hidden, last.weight, known
        )
        if last.bias is not None:
            rewards = rewards + last.bias[known].float()
    else:
        dense = head(hidden)
        rows = dense.shape[-1]
        rewards = dense.gather(1, ids.clamp(max=rows - 1)).float()
    return rewards.masked_fill(ids >= rows, -torch.inf)


def _as_input(head: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states as the head takes them."""
    parameter = next(head.parameters(), None)
    return hidden if parameter is None else hidden.to(parameter.device, parameter.dtype)


def _module(name: str, head: Any, shape: str, device: torch.device) -> nn.Module:
    if isinstance(head, nn.Module):
        return head
    if not isinstance(head, Tensor):
        raise ValueError(f"{name} must be a float tensor {shape} or a module; got {head!r}")
    if name == "value":
        return linear(name, head, None).to(device)
    if head.dim() != 2 or not head.is_floating_point():
        raise ValueError(
            f"{name} has shape {list(head.shape)} and dtype {head.dtype}; pass a float tensor "
            f"{shape}, a row for each token (for one number of prefix and token: RewardHead)"
        )
    rows, size = head.shape
    made = nn.Linear(size, rows, bias=False, device="meta")
    made.weight = nn.Parameter(head.detach().to(device), requires_grad=False)
    return made.eval()


@torch.no_grad()
def _check_output(name: str, head: nn.Module, size: int, device: torch.device, wanted: str) -> None:
    """`ValueError` if the head gives anything but `wanted` of hidden states [n, H]."""
    twins = Twins([head], eval_mode=True)
    hidden = torch.zeros(2, size, device=device)
    try:
        shape = list(twins[head](_as_input(head, hidden)).shape)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{name} does not take the hidden states [n, {size}] of the language model ({error}); "
            f"pass one that gives {wanted} for them"
        ) from error
    fits = len(shape) == 2 and shape[1] > 1 if wanted == "[n, V]" else shape in ([2], [2, 1])
    if shape[:1] != [2] or not fits:
        raise ValueError(
            f"{name} gives shape {shape} for hidden states [2, {size}]; {wanted} is wanted"
        )
