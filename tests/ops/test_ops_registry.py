"""What holds for every op, drawn from the one list of them."""

import importlib
import importlib.util
import re

import pytest
import torch
from cuda_emulated import OPS as EMULATED
from op_cases import Size, arguments
from op_support import FLOATS
from parity import BACKENDS, CHECKS, IN_CPP, IN_CUDA, IN_TRITON, ROOT

from rgtg_fast import ops
from rgtg_fast.ops import registry

over = pytest.mark.parametrize
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
SLOW = pytest.mark.slow
OPERATORS = [pytest.param("rgtg_fast", op, id=f"cpp-{op}") for op in IN_CPP] + [
    pytest.param("rgtg_fast_triton", op, id=f"triton-{op}", marks=needs_triton) for op in IN_TRITON
]
# Interpreting each of opcheck's calls takes its time.
CHECKED = [
    p if p.values[0] == "rgtg_fast" else pytest.param(*p.values, id=p.id, marks=[*p.marks, SLOW])
    for p in OPERATORS
]


def marks_of(backend, op):
    if "triton" not in backend.name:
        return ()
    return (needs_triton, SLOW) if op == "candidate_attention" else needs_triton


ON_CPU = [
    pytest.param(b, op, id=f"{b.name}-{op}", marks=marks_of(b, op))
    for b in BACKENDS
    if b.device == "cpu"
    for op in b.ops
]


def operator(space, op):
    importlib.import_module("rgtg_fast.kernels.library" if "triton" in space else "rgtg_fast._C")
    return getattr(getattr(torch.ops, space), op).default


def over_tensors(given, change):
    """The arguments with every tensor changed, those in lists too."""

    def changed(x):
        if isinstance(x, list):
            return [changed(element) for element in x]
        return change(x) if torch.is_tensor(x) else x

    return [changed(x) for x in given]


@over("op", IN_CPP)
def test_the_operator_has_the_schema_of_its_reference(op):
    declared = str(operator("rgtg_fast", op)._schema).removeprefix(f"rgtg_fast::{op}")
    takes, gives = declared.split(" -> ")
    unnamed = re.sub(r"Tensor \w+", "Tensor", gives)
    assert f"{takes} -> {unnamed}" == registry.schema(op)


@over(("space", "op"), CHECKED)
def test_opcheck(space, op):
    for given in arguments(op, Size(dtype=torch.bfloat16)):
        torch.library.opcheck(operator(space, op), given)


@over(("space", "op"), OPERATORS)
@over("rows", [0, 3])
def test_what_is_traced_is_what_is_computed(space, op, rows):
    """Shapes, dtypes and strides, of inputs that are dense and of views that are not."""
    for given in arguments(op, Size(rows=rows)):
        views = over_tensors(given, lambda x: x.mT.contiguous().mT if x.dim() > 1 else x)
        for inputs in (given, views):
            on_meta = over_tensors(inputs, lambda x: x.to("meta"))
            got, traced = (
                registry.as_tuple(operator(space, op)(*x)) for x in (tuple(inputs), tuple(on_meta))
            )
            for a, b in zip(got, traced, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@over(("backend", "op"), ON_CPU)
def test_every_backend_passes_the_check_of_its_op(backend, op):
    for dtype in FLOATS:
        for given in arguments(op, Size(dtype=dtype)):
            CHECKS[op](backend, *given)


DIFFERENTIABLE = [op for op in ops.OPS if op not in ("ratio_keep", "prefix_bt_loss")]


def is_float(x):
    return torch.is_tensor(x) and x.is_floating_point()


def call_for_gradients(op, given, backend):
    """The inputs that gradients are wanted of, and a loss of all results."""
    taken = over_tensors(given, lambda x: x.clone().requires_grad_() if is_float(x) else x)
    results = registry.as_tuple(getattr(ops, op)(*taken, backend=backend))
    values = [r for r in results if is_float(r)]
    loss = sum((r * (1.0 + torch.arange(r.numel()).view(r.shape))).sum() for r in values)
    flat = [x for a in taken for x in (a if isinstance(a, list) else [a])]
    return [x for x in flat if is_float(x)], loss


@over("backend", ["cpp", pytest.param("triton", marks=needs_triton)])
@over("op", DIFFERENTIABLE)
def test_gradients_are_those_of_the_reference(op, backend):
    for given in arguments(op, Size()):
        gradients = [
            torch.autograd.grad(loss, inputs, materialize_grads=True, allow_unused=True)
            for inputs, loss in (call_for_gradients(op, given, b) for b in ("reference", backend))
        ]
        assert any(gradient.any() for gradient in gradients[0])
        torch.testing.assert_close(gradients[1], gradients[0])


@over("op", DIFFERENTIABLE)
def test_a_second_derivative_is_an_error_that_says_so(op):
    inputs, loss = call_for_gradients(op, arguments(op, Size())[0], "cpp")
    with pytest.raises(RuntimeError, match=f"{op} has no second derivative; .*backend='reference'"):
        torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)


@over("op", DIFFERENTIABLE)
def test_no_gradients_are_followed_under_no_grad(op):
    with torch.no_grad():
        _, loss = call_for_gradients(op, arguments(op, Size())[0], "cpp")
    assert not loss.requires_grad


def test_every_list_of_ops_is_whole():
    """A source, a test and a benchmark of each op lie where its name says."""
    assert set(CHECKS) == set(IN_CPP) == set(ops.OPS)
    assert set(EMULATED) == set(IN_CUDA)
    for op in ops.OPS:
        assert getattr(ops, op).__doc__
        assert (ROOT / "tests/ops" / f"test_{op}.py").exists()
        assert (ROOT / "bench" / f"bench_{op}.py").exists()
