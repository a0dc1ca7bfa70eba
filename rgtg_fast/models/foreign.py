"""Names of transformers and torch that are private or have moved: all of them stand in this file.

Each is read without a default, so that a rename raises here instead of giving wrong text elsewhere;
tests/models/test_foreign.py checks that each still means the same.
"""

from __future__ import annotations

import dataclasses
import inspect
import platform
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput


class Unsupported(ValueError):
    """A model's structure does not allow a way of running it. That holds for every call, so the
    probe keeps such a verdict."""


# What generation calls the key/value cache, in its arguments and in its output: transformers 5.24
# renamed `past_key_values` to `cache`, and takes the old name, with a warning, until 5.40.
CACHE_NAMES = ("cache", "past_key_values")
CACHE: str = next(
    f.name for f in dataclasses.fields(GenerateDecoderOnlyOutput) if f.name in CACHE_NAMES
)


def cache_argument(forward: Any) -> str:
    """What a model's `forward` calls its cache; models from elsewhere keep the old name."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The key/value cache in a model's output, or None."""
    cache = getattr(output, CACHE, None)
    return output.get("past_key_values") if cache is None else cache


_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


def streamer_of_caller(model: Any) -> Any:
    """The `streamer` of the `model.generate` that this is called from, or None.

    A `custom_generate` callable is not handed it (transformers 5.17 to 5.24), though it has had the
    prompt: its reader would wait for ever. It is the argument of that name in the nearest frame of
    `GenerationMixin.generate`.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _GENERATE and frame.f_locals["self"] is model:
            return frame.f_locals["streamer"]
        frame = frame.f_back
    return None


# Configurations. `config._attn_implementation` is a property over `_attn_implementation_internal`;
# its setter would refuse our function's name and set sub-configurations too. No longer needed once
# transformers lets attention be set on a configuration (`set_attn_implementation` is a method of
# models, and refuses functions that it has not checked).


def attention_of(config: Any) -> str | None:
    """The attention implementation in use; None before transformers has chosen one."""
    return config.__dict__["_attn_implementation_internal"]


def set_attention(config: Any, name: str | None) -> None:
    """Have the modules of `config` attend by the registered function `name`."""
    attention_of(config)  # raises if the attribute was renamed; the assignment would not
    config.__dict__["_attn_implementation_internal"] = name


def name_or_path(config: Any) -> str:
    """Where a model was loaded from, "" where it was not."""
    return config._name_or_path


# What `generate` prepares in its generation configuration; transformers 5.24 has no public access.


def eos_tensor(config: GenerationConfig) -> Tensor | None:
    """All EOS ids int64 [n] of a prepared generation configuration; None where it has none."""
    return config._eos_token_tensor


def pad_tensor(config: GenerationConfig) -> Tensor | None:
    """The id int64 [] that ended rows are filled with; None where there is none."""
    return config._pad_token_tensor


def mask_length(config: GenerationConfig) -> int:
    """The length of an attention mask that `generate` dropped because it hides nothing, tokens of a
    given cache included; 0 where it kept the mask (always, before transformers 5.23)."""
    if _DROPS_MASKS:
        # Raises if it was renamed, which the `get` below would not.
        GenerationConfig.__annotations__["_mask_length"]
    return vars(config).get("_mask_length") or 0


_DROPS_MASKS = Version(transformers.__version__) >= Version("5.23")


# Helpers of `GenerationMixin` that its own decoding loops are made of.


def prefill(
    model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Any:
    """The output of the forward on the prompt, in chunks where the configuration says so."""
    return model._prefill(input_ids, config, model_kwargs)


def updated_kwargs(model: Any, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the next forward: cache, mask and positions one token on."""
    return model._update_model_kwargs_for_generation(outputs, model_kwargs)


# torch.nn.Module: keys of a module's instance dictionary.

PARAMETERS, BUFFERS, MODULES = "_parameters", "_buffers", "_modules"
COMPILED = "_compiled_call_impl"  # what `module.compile()` made, or None
WRAPPED = "_orig_mod"  # the child of a `torch.compile(module)`
FORWARD_HOOKS, PRE_HOOKS = "_forward_hooks", "_forward_pre_hooks"
HOOKS = (
    FORWARD_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    PRE_HOOKS,
    "_forward_pre_hooks_with_kwargs",
)


def hooked(module: nn.Module) -> bool:
    """Whether something runs before or after the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def hooks_of(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    """What runs before or after the module's forward."""
    return (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def untouched(*modules: nn.Module) -> bool:
    """Whether nothing was put on the modules that calling their parts would pass by: hooks, a
    forward of the instance, `module.compile()`."""
    return not any(
        "forward" in m.__dict__
        or m._forward_hooks
        or m._forward_pre_hooks
        or m._compiled_call_impl is not None
        for m in modules
    )


def forward_of(module: nn.Module) -> tuple[Any, Any]:
    """What tells one forward of a module from another that replaces it: the function of its class,
    and a weak reference to that of the instance, which may hold the module itself."""
    own = module.__dict__.get("forward")
    return type(module).forward, None if own is None else weakref.ref(own)


# torch.compile.


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Have what is compiled for `tensor` serve every size of its dimension `dim`, from 2 on."""
    torch._dynamo.mark_dynamic(tensor, dim)


# oneDNN's linear and its packed weights, which torch's inductor emits; torch has no public name for
# either.


def has_onednn_linear() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, for fp32 or bf16 on x86; `weight` may be one of `onednn_pack`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_pack(weight: Tensor, rows: int) -> Tensor:
    """A copy of `weight` [out, in] in the order in which oneDNN reads it for so many rows of input;
    a tensor for `onednn_linear` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


# CUDA graphs. A capture whose end raises does not end its allocations; torch has no public way to.


def leave_pool(device: int, pool: tuple[int, int]) -> None:
    """Stop allocating into a graph's memory pool, and release the capture's hold on it, where the
    end of a capture raised before it had done so."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it had, or the capture had not begun
        return
    torch._C._cuda_releasePool(device, pool)


def generation_defaults() -> dict[str, Any]:
    """What `generate` takes for options that neither the model's configuration nor the caller says;
    the configuration itself has None for them. With do_sample, top_k=50 is among them."""
    return GenerationConfig._get_default_generation_params()
