"""The low-rank part of an adapter, added to some rows of a batch whose base products all share.

An adapted layer gives `W x` for every row and `W x + B (A x)` for the rows of the adapter: the base
weights are read once for both. Layers that read the same tensor (query, key and value; gate and up)
share one product with their A's stacked; each B adds into the base product in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .twin import Twins


class LowRank(NamedTuple):
    """What one layer adds to its output: `b @ (a @ x)`."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r], the scale included


class LayerInputs(NamedTuple):
    """Which layers share an input, as `find_inputs` observed."""

    groups: list[list[nn.Module]]  # layers that read one and the same tensor
    in_order: bool  # every layer sees the batch's rows in their order, flattened or not


class LowRankLayers:
    """The adapted layers of a model; `switch_on` has a twin's run the adapter."""

    def __init__(self, parts: dict[nn.Module, LowRank], inputs: LayerInputs) -> None:
        self.in_order = inputs.in_order
        # Per shared input: the A's stacked, and each reader with its B and its columns.
        self._groups: list[tuple[Tensor, list[tuple[nn.Module, Tensor, slice]]]] = []
        for members in inputs.groups:
            readers, start = [], 0
            for module in members:
                part = parts[module]
                columns = slice(start, start + part.a.shape[0])
                readers.append((module, part.b.t().contiguous(), columns))
                start = columns.stop
            self._groups.append((torch.cat([parts[m].a for m in members]), readers))

    def switch_on(self, twins: Twins) -> AdapterRows:
        """Put the adapter on a twin for good: each layer's copy becomes one of a class around its
        own (hooks and faster kernels stay in force)."""
        rows = AdapterRows(self.in_order)
        for a, readers in self._groups:
            shared = _SharedInput(a, len(readers), rows)
            rows.inputs.append(shared)
            for module, b, columns in readers:
                twin = twins[module]
                patched = twin.__dict__.pop("forward", None)  # by accelerate and others
                twin.__dict__[_ADAPTER] = _Adapter(patched, b, shared, columns)
                kind: Any = type(twin)
                twin.__class__ = _adapted(kind)
        return rows


class AdapterRows:
    """The rows of a batch that the adapter is on: those from `first` on, of `total`."""

    def __init__(self, in_order: bool) -> None:
        self.in_order, self.first, self.total = in_order, 0, 1
        self.inputs: list[_SharedInput] = []

    def next_forward(self, first: int = 0, total: int = 1) -> None:
        """The rows of the forward to come.

        Raises `ValueError` for a part of the batch where a layer does not see the batch's rows in
        their order (experts that are sent some of the tokens).
        """
        if first and not self.in_order:
            raise ValueError(
                f"first={first}: a layer of the adapter does not see the rows of the batch in "
                "their order; run base and adapter rows as two forwards"
            )
        self.first, self.total = first, total
        for shared in self.inputs:
            if shared.left:  # the last forward did not run all layers: drop what it kept
                shared.forget()

    def of(self, x: Tensor) -> Tensor:
        """The adapter's rows of x [total, n, in] or [total * n, in], as a matrix [.., in]."""
        if self.first:
            x = x[x.shape[0] * self.first // self.total :]
        return x.reshape(-1, x.shape[-1])


class _SharedInput:
    """The product of one tensor with the A's of all layers that read it, made once."""

    def __init__(self, a: Tensor, readers: int, rows: AdapterRows) -> None:
        self.a, self.readers, self.rows = a, readers, rows
        self.forget()

    def forget(self) -> None:
        self.input: Tensor | None = None
        self.product: Any = None
        self.left = 0

    def times_a(self, x: Tensor) -> Tensor:
        """[adapter rows * n, sum of ranks]; x is kept until the last layer has asked."""
        if self.input is not x:
            self.input, self.left = x, self.readers
            self.product = torch.mm(self.rows.of(x), self.a.t())
        product: Tensor = self.product
        self.left -= 1
        if self.left == 0:
            self.forget()
        return product


_ADAPTER = "rgtg_adapter"  # attribute of an adapted layer


class _Adapter:
    """What one adapted layer adds to what it is `patched` to give, or its class gives."""

    def __init__(
        self,
        patched: Callable[[Tensor], Tensor] | None,
        b: Tensor,
        shared: _SharedInput,
        columns: slice,
    ) -> None:
        self.patched, self.b, self.shared = patched, b, shared
        self.start, self.stop = columns.start, columns.stop
        self.alone = shared.readers == 1
        # bf16 and fp16 `addmm_` on CPU takes 3 to 7 times as long as `mm` and `add_`.
        self.fused = b.device.type != "cpu" or b.dtype in (torch.float32, torch.float64)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        product = self.shared.times_a(x)
        if not self.alone:
            product = product[:, self.start : self.stop]
        if not out.is_contiguous():
            out = out.contiguous()
        mine = self.shared.rows.of(out)
        if self.fused and mine.dtype is self.b.dtype:
            mine.addmm_(product, self.b)
        else:
            mine.add_(torch.mm(product, self.b))
        return out


@functools.cache
def _adapted(kind: Any) -> type[nn.Module]:
    """The class of linear layers `kind` with an adapter. (A class, not a function in the instance:
    dynamo compiles anew for every such function.)"""

    def forward(self: Any, x: Tensor) -> Tensor:
        adapter = self.__dict__[_ADAPTER]
        out = kind.forward(self, x) if adapter.patched is None else adapter.patched(x)
        return adapter.add_to(out, x)

    return type(kind.__name__, (kind,), {"forward": forward})


@torch.no_grad()
def find_inputs(
    forward: Callable[[Tensor], Any], modules: list[nn.Module], twins: Twins
) -> LayerInputs:
    """Which of `modules` read the same tensor, seen in one `forward(ids [2, 3])` of their twins."""
    seen: list[tuple[nn.Module, Tensor]] = []
    for module in modules:

        def note(_: Any, args: Any, module: nn.Module = module) -> None:
            seen.append((module, args[0]))

        twins[module].register_forward_pre_hook(note)
    forward(torch.zeros((2, 3), dtype=torch.int64, device="cpu"))
    groups: dict[Any, list[nn.Module]] = {}
    place: dict[nn.Module, Any] = {}
    in_order = True
    for module, x in seen:  # ids are unique, as `seen` keeps the tensors alive
        in_order &= module not in place and x.shape[:-1] in ((2, 3), (6,))
        place.setdefault(module, (id(x), module.weight.device))
    for module in modules:
        in_order &= module in place
        groups.setdefault(place.get(module, id(module)), []).append(module)
    return LayerInputs(list(groups.values()), in_order)
