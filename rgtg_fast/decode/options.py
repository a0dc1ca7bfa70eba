"""What numbers the options of guided decoding may be: checked and made plain, without a model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max
COLDEST = 1e-30  # below it log π / T may be too large for fp32


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int: Python's or numpy's, not a bool; `ValueError` outside least..most."""
    bounds = f">= {least}" if most is None else f"from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an int {bounds}; got {value!r}")
    value = int(value)
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}={value} is out of range; pass an int {bounds}")
    return value


def flags(values: dict[str, Any], or_none: bool = False) -> None:
    """Each of the values by name must be True or False (or None)."""
    for name, value in values.items():
        if not (isinstance(value, bool) or (or_none and value is None)):
            raise ValueError(
                f"{name}={value!r}; pass True{', False or None' if or_none else ' or False'}"
            )


def auto_or_flag(name: str, value: Any) -> None:
    """True, False or "auto"."""
    if not (isinstance(value, bool) or (isinstance(value, str) and value == "auto")):
        raise ValueError(f'{name}={value!r}; pass True, False or "auto"')


def speculate(value: Any, assistant: Any) -> Any:
    """ "auto", False or a number of tokens, 2 to 32; with an `assistant`, not False."""
    if value is False or (isinstance(value, str) and value == "auto"):
        if value is False and assistant is not None:
            raise ValueError(
                "assistant_model drafts for speculation, and speculate=False; leave one of them out"
            )
        return value
    if isinstance(value, (str, bool)):
        raise ValueError(
            f'speculate={value!r}; pass "auto", False, or the tokens of a round, an int >= 2'
        )
    return integer("speculate", value, 2, 32)


def choices(values: dict[str, Any], allowed: Mapping[str, Iterable[str]]) -> None:
    """Each of the values by name must be one of the strings `allowed` for that name."""
    for name, strings in allowed.items():
        if not isinstance(values[name], str) or values[name] not in strings:
            raise ValueError(
                f"{name}={values[name]!r} is unknown; pass one of {', '.join(strings)}"
            )


def number(name: str, value: Any) -> None:
    """A real number, or a float or int64 tensor [B] of one for each row, finite in fp32."""
    if isinstance(value, Tensor) and value.device.type == "meta":
        raise ValueError(f"{name} is a tensor on the meta device, which holds no numbers")
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        value = value.item()
    if isinstance(value, Tensor):
        if value.dim() != 1 or not (value.is_floating_point() or value.dtype == torch.int64):
            raise ValueError(
                f"{name} must be a float or a float tensor [B] with one value per row; got a "
                f"{value.dtype} tensor of shape {list(value.shape)}"
            )
        finite = bool(value.float().isfinite().all())
    elif isinstance(value, Real) and not isinstance(value, bool):  # numpy's floats too
        finite = bool(-LARGEST <= value <= LARGEST)  # type: ignore[operator]
    else:
        raise ValueError(f"{name} must be a float or a float tensor [B]; got {value!r}")
    if not finite:
        raise ValueError(f"{name}={value!r} is not finite in fp32; pass finite numbers")


def temperature(value: Any) -> None:
    """As `number`, and not so small that what it divides is no longer finite."""
    number("temperature", value)
    if isinstance(value, Tensor) and value.numel() == 0:
        return  # its length is found wrong where the rows are known
    lowest = value.min().item() if isinstance(value, Tensor) else value
    if not lowest >= COLDEST:
        raise ValueError(
            f"temperature={value!r} must be > 0 (at least {COLDEST}); for the most likely token "
            "pass do_sample=False"
        )


def seed(value: Any) -> Any:
    """None, an int of 64 bits (numpy's made Python's) or an int64 tensor [B]."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.dim() != 1 or value.dtype != torch.int64:
            raise ValueError(
                "seed must be an int or an int64 tensor [B] with one seed per row; got a "
                f"{value.dtype} tensor of shape {list(value.shape)}"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"seed must be an int or an int64 tensor [B]; got {value!r}")
    value = int(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"seed={value} does not fit in 64 bits; pass -2**63 <= seed < 2**63")
    return value


def reward_range(value: Any, prune: Any) -> None:
    """None, or two finite numbers (lo, hi) with lo < hi; pruning needs them."""
    if not (prune is None or isinstance(prune, bool)):
        raise ValueError(f"prune={prune!r}; pass True, False, or None (where it saves something)")
    if value is None:
        if prune:
            raise ValueError(
                "prune=True needs to know what rewards are possible; pass reward_range=(lo, hi)"
            )
        return
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        low = high = math.nan
    if not -LARGEST <= low < high <= LARGEST:
        raise ValueError(f"reward_range={value!r}; pass two finite numbers (lo, hi) with lo < hi")


def steering(schedule: Any, kl_budget: Any, min_entropy: Any) -> None:
    """A function or None, nats > 0 or None, nats >= 0 or None."""
    if schedule is not None and not callable(schedule):
        raise ValueError(
            f"beta_schedule={schedule!r}; pass a function of the position in the answer (an int "
            "from 0) that gives what beta is times there, such as lambda t: min(1, t / 16)"
        )
    for name, value in (("kl_budget", kl_budget), ("min_entropy", min_entropy)):
        if value is None:
            continue
        number(name, value)
        if isinstance(value, Tensor) or value < 0 or (name == "kl_budget" and value == 0):
            raise ValueError(f"{name}={value!r}; pass a positive number of nats, or None")


def vocabulary(guide: Any) -> None:
    """`guided_top_p`, and that nothing asks for candidates where all tokens are drawn from."""
    top_p = guide.guided_top_p
    if top_p is not None:
        number("guided_top_p", top_p)
        if isinstance(top_p, Tensor) or not 0 < top_p <= 1:
            raise ValueError(f"guided_top_p={top_p!r}; pass a number in (0, 1], or None")
        if guide.kl_budget is not None:
            raise ValueError(
                "guided_top_p= cuts the policy, and kl_budget= sets the KL of one that is not cut; "
                "pass one of them"
            )
    if guide.k is None and guide.output_candidates:
        raise ValueError(
            "output_candidates=True, and k=None has no candidates; leave it out, or pass k=64 with "
            "candidates='sum'"
        )
    if guide.k is not None and guide.candidates == "lm":
        return
    given = "k=None" if guide.k is None else "candidates='sum'"
    for name, why in (
        ("kl_budget", "solves for beta over candidates that do not depend on it"),
        ("min_entropy", "is of π's candidates, and lets steps go without reward"),
    ):
        if getattr(guide, name) is not None:
            raise ValueError(
                f"{name}= {why}, and {given} looks at every token's reward; leave one of them out"
            )


def of_prompt(name: str, value: Any, index: int) -> float:
    """What a prompt has of an option that is a number, or a tensor [N] of one for each."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return float(value)
    if index >= len(value):
        raise ValueError(f"{name} has {len(value)} values, and this is prompt {index}")
    return value[index].item()


def prompt_ids(prompt: Any, tokenizer: Any) -> Tensor:
    """Ids [P] of a prompt: a text, a list of ids or a tensor; `ValueError` for anything else."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("the prompt is a text; pass tokenizer=, or token ids")
        prompt = tokenizer(prompt)["input_ids"]
    if not isinstance(prompt, Tensor):
        try:
            dtype = torch.int64 if len(prompt) == 0 else None
            prompt = torch.tensor(prompt, dtype=dtype, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"the prompt must be a text, a list of token ids or int64 [P]; got "
                f"{type(prompt).__name__}: {error}"
            ) from None
    if prompt.device.type == "meta" or prompt.layout is not torch.strided:
        raise ValueError(f"the prompt is a tensor without ids to read: {prompt!r}")
    if prompt.dim() != 1:
        raise ValueError(f"the prompt has shape {list(prompt.shape)}; pass token ids [P]")
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; pass at least one token, for example the BOS token")
    return prompt


def lists(values: dict[str, Any]) -> None:
    """Each of the values by name must be a list or None."""
    for name, value in values.items():
        if not (value is None or isinstance(value, (list, tuple))):
            raise ValueError(f"{name} must be a list; got {value!r}; pass [{name}]")


def eos(value: Any) -> None:
    """None, an id or a list or tensor of ids."""
    if isinstance(value, Tensor):
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    else:
        ids = value if isinstance(value, (list, tuple, set)) else [value]
        whole = all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids)
    if not (value is None or whole):
        raise ValueError(f"eos_token_id={value!r}; pass an id, or a list of ids")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an argument `name` that does not exist."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}=?" if close else "; see help(rgtg_fast.generate)"
