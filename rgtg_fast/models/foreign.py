"""Names of transformers that are private or have moved: all of them stand in this file.

Each is read plainly, so that a rename is an error here and not a wrong text elsewhere;
tests/models/test_foreign.py holds what each must still mean.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from types import FrameType
from typing import Any

from transformers import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

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
