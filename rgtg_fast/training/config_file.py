"""YAML config files with `key=value` overrides, checked against the fields of a dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_yaml(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with `key=value` overrides put in.

    Raises `ValueError` for a file that is missing, not YAML or no mapping, and for a malformed
    override.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no config file at {str(file)!r}; write one (YAML) or mend the path")
    try:
        values = _load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}; write `key: value` lines")
    return values | read_overrides(overrides)


def read_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """The mapping of `key=value` texts, values as YAML has them; `ValueError` for a malformed
    one."""
    import yaml

    values = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r}; write key=value")
        try:
            values[key] = _load(value)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise ValueError(f"override {override!r:.200} is not YAML: {error}") from None
    return values


def _load(text: str) -> Any:
    """The value of a YAML text; of a key given twice PyYAML would take the last in silence."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for at, key in enumerate(keys):
                if isinstance(key, str) and key in keys[:at]:
                    raise ValueError(f"{key!r} is given twice; drop one of the two")
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)


def check_keys(values: Mapping[Any, Any], known: Iterable[str], where: str = "") -> None:
    """Raises `ValueError` for keys that are not `known`, each with the nearest one that is."""
    names = list(known)
    wrong = []
    for key in map(str, values):
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(names)}"
            wrong.append(f"unknown key {where}{key}: {hint}")
    if wrong:
        raise ValueError("; ".join(wrong))


def type_names(field: dataclasses.Field[Any]) -> list[str]:
    """The names of the types that a field allows."""
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    return [name.strip() for name in kind.split("|")]


def typed(key: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    """`value` as the field's type has it, for fields of bool, int, float and str (and None).

    YAML reads 5e-6 as text: text that is a number becomes one where a number is wanted. Raises
    `ValueError` for any other kind.
    """
    names = type_names(field)
    if value is None and "None" in names:
        return None
    if isinstance(value, str) and "str" not in names:
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool):
        fits = "bool" in names
    elif isinstance(value, numbers.Real):
        number: Any = value  # numpy's too
        # What is beyond 64 bits ends as an overflow deep in torch, or in a run without end.
        if not -(2**63) < number < 2**63:  # a NaN neither
            raise ValueError(f"{key}: {number!s:.40} is out of range; pass a finite number")
        if "float" in names:
            return float(number)
        fits = "int" in names and float(number).is_integer()
        value = int(number) if fits else number
    else:
        fits = type(value).__name__ in names
    if not fits:
        raise ValueError(f"{key}: {value!r} is no {' or '.join(n for n in names if n != 'None')}")
    return value
