"""Rewards from the language model's own weights: a head on them, or an adapter and a head.

Both are reward models like any other (a base and a head, `RewardModel`) whose base happens to be
the language model's: no weight is copied, and the language model is never touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self

from .foreign import name_or_path
from .low_rank import AdapterRows, LowRank, LowRankLayers, find_inputs
from .parts import ModelParts, find_base
from .peft_checkpoint import Checkpoint, read_checkpoint, scaled
from .reward_model import RewardModel


class OnBase(RewardModel):
    """A reward model whose base is that of the language model `lm`."""

    def __init__(self, lm: Any, head: Callable[[Tensor], Tensor], layer: int = -1) -> None:
        inner = check_language_model(lm)
        super().__init__(lm, head)
        self.lm = lm
        layers = self.text_config.num_hidden_layers
        if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
            raise ValueError(
                f"layer={layer!r} is no hidden state of {type(inner).__name__}; pass 0 for the "
                f"embeddings to {layers} for the last, or -1 to {-layers - 1} from the end"
            )
        layer = layer + layers + 1 if layer < 0 else layer
        self.layer = -1 if layer == layers else layer
        # All of them, not a list of layers: transformers 5.17 and 5.23 number those differently.
        self.base_kwargs = {} if self.layer == -1 else {"output_hidden_states": True}

    # Whether the reward model needs rows of its own in a shared forward, as with an adapter.
    own_rows = False

    def forward_both(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Any]:
        """One forward of a twin for language model and reward model: ids [B, n], or [2B, n] where
        the reward model has rows of its own (the second half).

        Returns all rows' last hidden states, the head's hidden states [B, n, H], and the output.
        """
        rows = len(input_ids)
        first = rows // 2 if self.own_rows else 0
        self._begin(first, rows)
        hidden, out = super().forward_base(input_ids, **kwargs, **self.base_kwargs)
        return hidden, self.hidden_of(out)[first:], out

    def can_share_forwards(self) -> bool:
        """Whether `forward_both` is possible."""
        return True

    def hidden_of(self, out: Any) -> Tensor:
        """The head's hidden states [B, n, H] in the base model's output."""
        if self.layer != -1:
            return out.hidden_states[self.layer]
        hidden = getattr(out, "last_hidden_state", None)
        return hidden if hidden is not None else out[0]

    def forward_base(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        self._begin()
        _, out = super().forward_base(input_ids, **kwargs, **self.base_kwargs)
        return self.hidden_of(out), out

    def _begin(self, first: int = 0, rows: int = 1) -> None:
        """The reward model's rows of the forward to come: from `first` on, of `rows`."""

    @torch.no_grad()
    def _check_head(self, what: str, way_out: str) -> torch.device:
        """The device of the hidden states, after one forward of the plain base."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        plain = RewardModel.twin(self)  # without an adapter
        _, out = ModelParts.forward_base(plain, ids, use_cache=False, **self.base_kwargs)
        hidden = self.hidden_of(out)
        try:
            plain.rewards(hidden)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{what} does not give one number for each hidden state of {hidden.shape[-1]} "
                f"elements ({error}); {way_out}"
            ) from error
        return hidden.device


class RewardHead(OnBase):
    """The reward `r = w · h + b` (or an MLP of h) of the language model's own hidden state h.

    Passed as `reward_model=` to `rgtg_fast.generate`.

    Args:
        lm: the language model; its weights are shared, not copied.
        weight: a linear head, float [H] or [1, H]; or a module or function, hidden [..., H] ->
            [...] or [..., 1].
        layer: the hidden state, as `output_hidden_states=True` counts them: 0 are the embeddings,
            i the output of layer i; negative ones count from the end. The last (-1, the default) is
            `last_hidden_state`, after the final norm; the others are not normed.
        bias: of a linear head, a number or a tensor of one element.

    Raises:
        ValueError: a head that does not fit the hidden states, or a layer out of range.
    """

    def __init__(
        self,
        lm: Any,
        weight: Tensor | Callable[[Tensor], Tensor],
        layer: int = -1,
        bias: Tensor | float | None = None,
    ) -> None:
        if not isinstance(weight, Tensor):
            if bias is not None:
                raise ValueError("bias is for a head given as a tensor; put it into the module")
            if not callable(weight):
                raise ValueError(
                    "weight must be a float tensor [H] or [1, H], or a module or function, hidden "
                    f"[..., H] -> [...]; got {type(weight).__name__}"
                )
        head = linear("weight", weight, bias) if isinstance(weight, Tensor) else weight
        super().__init__(lm, head, layer)
        device = self._check_head(
            "weight", "pass a tensor [H], or a module or function, [..., H] -> [...] or [..., 1]"
        )
        if isinstance(head, nn.Linear) and isinstance(weight, Tensor):
            head.to(device)


class RewardAdapter(OnBase):
    """A reward model that is the language model plus a LoRA adapter and a head.

    Made by `from_pretrained`; passed as `reward_model=` to `rgtg_fast.generate`.
    """

    own_rows = True
    rows: AdapterRows  # of a twin

    def __init__(self, lm: Any, checkpoint: Checkpoint) -> None:
        if hasattr(lm, "peft_config"):
            raise ValueError(
                "lm is a PEFT model, and the reward adapter belongs on plain weights; pass "
                "lm.merge_and_unload()"
            )
        head = linear("weight", checkpoint.head_weight, checkpoint.head_bias)
        super().__init__(lm, head)
        parts: dict[nn.Module, LowRank] = {}
        for name, (a, b, scale) in checkpoint.layers.items():
            module = _find_layer(self.base, lm.base_model_prefix, name, a, b, checkpoint.path)
            device, dtype = module.weight.device, _dtype_of(module, self.dtype)
            parts[module] = LowRank(a.to(device, dtype), scaled(b, scale).to(device, dtype))
        head.to(
            self._check_head(f"the head of {checkpoint.path}", "pass the LM that it was trained on")
        )
        _warn_of_another_base(lm, checkpoint)
        twin = RewardModel.twin(self)
        assert twin.twins is not None
        inputs = find_inputs(
            lambda ids: twin.base(ids.to(self.device), use_cache=False), list(parts), twin.twins
        )
        self.low_rank = LowRankLayers(parts, inputs)

    @classmethod
    def from_pretrained(cls, lm: Any, path: str | Path, **hub: Any) -> RewardAdapter:
        """The PEFT LoRA sequence-classification checkpoint at `path`, on the weights of `lm`.

        Plain LoRA on any linear layers (`nn.Linear`, GPT-2's `Conv1D`), with a rank and alpha of
        their own where wanted, rank-stabilised or not, and a linear head of one label. `lm` must be
        the model that it was trained on. peft itself is not needed.

        Args:
            lm: the language model; its weights are neither copied nor changed.
            path: a folder with `adapter_config.json` and `adapter_model.safetensors`, or a Hub id.
            hub: `revision`, `subfolder`, `token`, `cache_dir` for a Hub id.

        Raises:
            ValueError: whatever else the checkpoint holds (DoRA, trained biases or embeddings,
                several labels, ...), and a language model that it does not fit.
        """
        return cls(lm, read_checkpoint(path, **hub))

    def twin(self, eval_mode: bool = True) -> Self:
        own = super().twin(eval_mode)
        assert own.twins is not None
        own.rows = self.low_rank.switch_on(own.twins)
        return own

    def _begin(self, first: int = 0, rows: int = 1) -> None:
        self.rows.next_forward(first, rows)

    def can_share_forwards(self) -> bool:
        return self.low_rank.in_order


def check_language_model(lm: Any) -> PreTrainedModel:
    """The transformers model in `lm`; `ValueError` unless it is a decoder with a base."""
    inner = lm.get_base_model() if hasattr(lm, "peft_config") else lm
    if isinstance(inner, PreTrainedModel) and inner.config.is_encoder_decoder:
        raise ValueError(
            f"lm is {type(inner).__name__}, an encoder-decoder model; pass a decoder-only one"
        )
    if not isinstance(inner, PreTrainedModel) or find_base(inner) is inner:
        raise ValueError(
            f"lm must be a causal language model of transformers; got {type(lm).__name__}"
        )
    return inner


def linear(name: str, weight: Tensor, bias: Tensor | float | None) -> nn.Linear:
    """A frozen linear head of one output; `name` is what its weight is called in errors."""
    if (
        not weight.is_floating_point()
        or weight.dim() not in (1, 2)
        or weight.numel() != weight.shape[-1]
    ):
        raise ValueError(
            f"{name} has shape {list(weight.shape)} and dtype {weight.dtype}; pass a float tensor "
            "[H] or [1, H]"
        )
    if bias is not None:
        bias = torch.as_tensor(bias, dtype=weight.dtype, device=weight.device).detach()
        if bias.numel() != 1:
            raise ValueError(
                f"bias has shape {list(bias.shape)}; pass a number or one element, or None"
            )
    head = nn.Linear(weight.shape[-1], 1, bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight.detach().reshape(1, -1), requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias.reshape(1), requires_grad=False)
    return head.eval()


def _find_layer(base: nn.Module, prefix: str, name: str, a: Tensor, b: Tensor, path: str) -> Any:
    """The layer of the language model's base that the checkpoint calls `name`."""
    try:
        module = base.get_submodule(name.removeprefix(prefix + "."))
    except AttributeError as error:
        raise ValueError(
            f"{path} adapts {name}, which {type(base).__name__} does not have; pass the language "
            "model that it was trained on"
        ) from error
    if isinstance(module, Conv1D):
        shape = list(module.weight.shape[::-1])
    elif isinstance(module, nn.Linear):
        shape = [module.out_features, module.in_features]
    else:
        raise ValueError(
            f"{path} adapts {name}, a {type(module).__name__}; LoRA on nn.Linear and Conv1D layers "
            "is wanted: train with other target_modules, or load it with peft and pass that as "
            "reward_model="
        )
    if [b.shape[0], a.shape[1]] != shape:
        raise ValueError(
            f"{path} adapts {name} as a layer of shape {[b.shape[0], a.shape[1]]}, in "
            f"{type(base).__name__} it has {shape}; pass the language model that it was trained on"
        )
    if module.weight.device.type == "meta":
        raise ValueError(f"{name} is offloaded; load lm with its weights on a device")
    return module


def _dtype_of(module: Any, otherwise: torch.dtype) -> torch.dtype:
    """What the layer computes in; a quantised one in the model's own dtype."""
    dtype = module.weight.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else otherwise


def _warn_of_another_base(lm: Any, checkpoint: Checkpoint) -> None:
    theirs, ours = checkpoint.base_name, name_or_path(lm.config)
    if theirs and ours and Path(theirs).name != Path(ours).name:
        warnings.warn(
            f"{checkpoint.path} was trained on {theirs!r} and lm is {ours!r}: on weights other "
            "than its own an adapter's rewards mean little",
            stacklevel=4,
        )
