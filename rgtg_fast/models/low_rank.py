"""The low-rank part of an adapter, added to some rows of a batch whose base products all share.

An adapted layer gives `W x` for every row and `W x + B (A x)` for the rows of the adapter: the base
weights are read once for both. Layers that read the same tensor (query, key and value; gate and up)
share one product with their A's stacked; each B adds into the base product in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LowRank(NamedTuple):
    """What one layer adds to its output: `b @ (a @ x)`."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r], the scale included


class LayerInputs(NamedTuple):
    """What `find_inputs` saw."""

    groups: list[list[nn.Module]]  # layers that read one and the same tensor
    in_order: bool  # every layer sees the batch's rows in their order, flattened or not


class LowRankLayers:
    """The adapted layers of a model; `active()` switches the adapter on.

    Inside, each layer has an instance attribute `forward` around the one it had (hooks, and the
    faster kernels of `FastLinears`, stay in force); on the way out all is as before.
    """

    def __init__(self, parts: dict[nn.Module, LowRank], inputs: LayerInputs) -> None:
        self.in_order = inputs.in_order
        self._rows = _Rows()
        self._groups: list[_SharedInput] = []
        self._patches: list[_Patch] = []
        for members in inputs.groups:
            group = _SharedInput(torch.cat([parts[m].a for m in members]), len(members), self._rows)
            self._groups.append(group)
            start = 0
            for module in members:
                part = parts[module]
                columns = slice(start, start + part.a.shape[0])
                self._patches.append(_Patch(module, part.b.t().contiguous(), group, columns))
                start = columns.stop

    @contextmanager
    def active(self, first_row: int = 0, rows: int = 1) -> Iterator[None]:
        """The adapter for one forward: on the rows from `first_row` on, of a batch of `rows`.

        Raises `ValueError` for a part of the batch where a layer does not see the batch's rows in
        their order (experts that are sent some of the tokens).
        """
        if first_row and not self.in_order:
            raise ValueError(
                f"first_row={first_row}: a layer of the adapter does not see the rows of the batch "
                "in their order; run base and adapter rows as two forwards"
            )
        self._rows.first, self._rows.total = first_row, rows
        before = [patch.switch_on() for patch in self._patches]
        try:
            yield
        finally:
            for patch, forward in zip(self._patches, before, strict=True):
                patch.switch_off(forward)
            for group in self._groups:
                group.forget()


class _Rows:
    """The rows of the adapter: those from `first` on, of `total`."""

    first, total = 0, 1

    def of(self, x: Tensor) -> Tensor:
        """Their part of x [total, n, in] or [total * n, in], as a matrix."""
        if self.first:
            x = x[x.shape[0] * self.first // self.total :]
        return x.reshape(-1, x.shape[-1])


class _SharedInput:
    """The product of one tensor with the A's of all layers that read it, made once."""

    def __init__(self, a: Tensor, readers: int, rows: _Rows) -> None:
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


class _Patch:
    """One layer's `forward` while the adapter is on."""

    def __init__(self, module: nn.Module, b: Tensor, group: _SharedInput, columns: slice) -> None:
        self.module, self.b, self.group = module, b, group
        self.alone = group.readers == 1
        self.columns = columns
        # bf16 and fp16 `addmm_` on CPU takes 3 to 7 times as long as `mm` and `add_`.
        self.fused = b.device.type != "cpu" or b.dtype in (torch.float32, torch.float64)
        self.base: Callable[[Tensor], Tensor] = module.forward

    def switch_on(self) -> Any:
        before = self.module.__dict__.get("forward")
        self.base = self.module.forward
        self.module.__dict__["forward"] = self
        return before

    def switch_off(self, before: Any) -> None:
        if before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = before

    def __call__(self, x: Tensor) -> Tensor:
        out = self.base(x)
        product = self.group.times_a(x)
        if not self.alone:
            product = product[:, self.columns]
        if not out.is_contiguous():
            out = out.contiguous()
        mine = self.group.rows.of(out)
        if self.fused and mine.dtype is self.b.dtype:
            mine.addmm_(product, self.b)
        else:
            mine.add_(torch.mm(product, self.b))
        return out


@torch.no_grad()
def find_inputs(forward: Callable[[Tensor], Any], modules: list[nn.Module]) -> LayerInputs:
    """Which of `modules` read the same tensor, seen in one `forward(ids [2, 3])`."""
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
        for module in modules
    ]
    try:
        forward(torch.zeros(2, 3, dtype=torch.int64))
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[Any, list[nn.Module]] = {}
    place: dict[nn.Module, Any] = {}
    in_order = True
    for module, x in seen:  # `seen` keeps the tensors, so an id stands for one of them
        in_order &= module not in place and x.shape[:-1] in ((2, 3), (6,))
        place.setdefault(module, (id(x), module.weight.device))
    for module in modules:
        in_order &= module in place
        groups.setdefault(place.get(module, id(module)), []).append(module)
    return LayerInputs(list(groups.values()), in_order)
