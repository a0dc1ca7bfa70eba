"""A model's twin: copies of its modules that share its tensors, for one call to change freely.

A guided call runs models in eval mode, with attention of its own, faster linear layers, adapters.
On the user's modules each of these would be a switch that another thread sees, and that an
interrupt leaves as it is. On a twin they are set once and thrown away with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .foreign import BUFFERS, COMPILED, HOOKS, MODULES, PARAMETERS, WRAPPED

# Types that hold no module. Most attributes are of these; looking into each would be slow.
_PLAIN = frozenset(
    (bool, int, float, str, type(None), set, OrderedDict, Tensor, nn.Parameter, torch.dtype)
)
_BOUND = (MethodType, partial, FunctionType)  # callables that may refer to a module
_OWN = (PARAMETERS, BUFFERS, MODULES)


class Twins:
    """Copies of all modules under `roots`: new objects of their classes, with their parameters.

    Buffers, hooks and configurations are in containers of the copies' own, so that whatever a
    forward sets (rotary tables, recording hooks) lands there. What is in two places of the original
    is one copy. Bound methods, partials, closures and defaults of functions in instance attributes,
    as accelerate leaves them, are bound to the copies. The dictionaries of parameters are shared:
    what gathers or loads parameters around a forward (DeepSpeed, accelerate) puts them where the
    copies see them. Scripted modules cannot be copied and stay themselves; compiled ones run
    uncompiled.

    `given` has modules that are not to be copied, and what stands for them. With `eval_mode`
    dropout is off; without it each module keeps its training flag.
    """

    # Instance dictionaries that lead back to their own module. They are emptied at the end: a
    # reference cycle would keep its module until Python's collector runs. Empty on the class, as
    # an interrupt ahead of `__init__` leaves an object that `__del__` is called for too.
    cyclic: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(
        self,
        roots: Sequence[nn.Module],
        eval_mode: bool,
        given: dict[nn.Module, nn.Module] | None = None,
    ) -> None:
        self._of: dict[int, Any] = {id(m): twin for m, twin in (given or {}).items()}
        self._configs: dict[int, Any] = {}
        self.cyclic = []
        self._roots = roots  # kept alive, as copies are found by id
        originals = self._walk(list(roots))
        self.modules: list[nn.Module] = [self._of[id(m)] for m in originals]
        self._fill(originals, eval_mode)

    def __getitem__(self, module: nn.Module) -> Any:
        """The copy of `module`; `module` itself where it was under no root."""
        return self._of.get(id(module), module)

    @property
    def configs(self) -> list[Any]:
        """The copies' configurations."""
        return list(self._configs.values())

    def rebound(self, value: Any) -> Any:
        """`value`, a function or a container, with each module in it replaced by its copy; `value`
        itself where it holds none."""
        return self._rebound(value, set())

    def __del__(self) -> None:
        for attributes in self.cyclic:
            attributes.clear()

    def _walk(self, waiting: list[nn.Module]) -> list[nn.Module]:
        """All modules below `waiting`, each with an empty copy made; in one loop, as a call for
        each of hundreds of modules would be slow."""
        of, originals, wrappers = self._of, [], []
        while waiting:
            module = waiting.pop()
            if id(module) in of:
                continue
            children = module.__dict__[MODULES]
            if isinstance(module, torch.jit.ScriptModule):
                of[id(module)] = module
                continue
            if WRAPPED in children:
                wrappers.append(module)
            else:
                of[id(module)] = object.__new__(type(module))
                originals.append(module)
            for child in children.values():
                if child is not None:
                    waiting.append(child)
        for module in reversed(wrappers):  # inner ones first, so that an outer one finds its copy
            of[id(module)] = of[id(module.__dict__[MODULES][WRAPPED])]
        return originals

    def _fill(self, originals: list[nn.Module], eval_mode: bool) -> None:
        """Give each copy its attributes; in one loop, as in `_walk`."""
        of, configs = self._of, self._configs
        for module in originals:
            attributes = of[id(module)].__dict__
            attributes.update(module.__dict__)
            children = attributes[MODULES] = attributes[MODULES].copy()
            for name, child in children.items():
                if child is not None:
                    children[name] = of[id(child)]
            attributes[BUFFERS] = attributes[BUFFERS].copy()
            for name in HOOKS:
                attributes[name] = attributes[name].copy()
            if eval_mode:
                attributes["training"] = False
            if COMPILED in attributes:
                attributes[COMPILED] = None
            for name, value in module.__dict__.items():
                kind = type(value)
                if kind in _PLAIN or name in _OWN:
                    continue
                if isinstance(value, PreTrainedConfig):
                    known = configs.get(id(value))
                    attributes[name] = known or _copy_config(value, configs)
                    continue
                inside, seen = [value], set()  # extended by the contents of its containers
                for part in inside:
                    kind = type(part)
                    if id(part) in seen:  # a container that is in itself
                        continue
                    seen.add(id(part))
                    if kind in (list, tuple):
                        inside += part
                    elif kind is dict:
                        inside += part.values()
                    elif kind in _BOUND or isinstance(part, nn.Module):
                        break
                else:
                    continue
                if kind is not FunctionType or _holds_values(part):
                    new = self.rebound(value)
                    if new is not value:
                        attributes[name] = new
                        self.cyclic.append(attributes)

    def _rebound(self, value: Any, inside: set[int]) -> Any:
        if id(value) in inside:  # a function whose closure holds itself: no endless recursion
            return value
        inside = inside | {id(value)}

        def again(parts: Any) -> tuple[list[Any], bool]:
            new = [self._rebound(part, inside) for part in parts]
            return new, any(n is not p for n, p in zip(new, parts, strict=True))

        kind = type(value)
        if isinstance(value, nn.Module):
            return self[value]
        if kind in (list, tuple):
            new, changed = again(value)
            return kind(new) if changed else value
        if kind is dict:
            new, changed = again(list(value.values()))
            return dict(zip(value, new, strict=True)) if changed else value
        if kind is MethodType:
            (function, owner), changed = again((value.__func__, value.__self__))
            return MethodType(function, owner) if changed else value
        if kind is partial:
            (function, args, kwargs), changed = again((value.func, value.args, value.keywords))
            return partial(function, *args, **kwargs) if changed else value
        if kind is FunctionType:
            return self._rebound_function(value, again)
        return value

    def _rebound_function(self, function: Any, again: Any) -> Any:
        """A function refers to modules in its closure and in its arguments' defaults."""
        cells = function.__closure__ or ()
        try:
            contents = [cell.cell_contents for cell in cells]
        except ValueError:  # an empty cell: the variable is not assigned yet
            return function
        held = [contents, list(function.__defaults__ or ()), function.__kwdefaults__ or {}]
        (contents, defaults, named), changed = again(held)
        if not changed:
            return function
        copy = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            tuple(defaults) or None,
            tuple(CellType(content) for content in contents) or None,
        )
        copy.__kwdefaults__ = named or None
        return copy


def _holds_values(function: FunctionType) -> bool:
    """Whether a function has a closure or defaults, which may refer to a module."""
    return bool(function.__closure__ or function.__defaults__ or function.__kwdefaults__)


def _copy_config(config: Any, copies: dict[int, Any]) -> Any:
    """A copy of a configuration and of the configurations in it."""
    copy = copies[id(config)] = object.__new__(type(config))
    for name, value in config.__dict__.items():
        if isinstance(value, PreTrainedConfig):
            value = copies.get(id(value)) or _copy_config(value, copies)
        copy.__dict__[name] = value
    return copy
