"""Imports go down: ops < models < scorers < decode < the calls < what is built on them."""

import ast
from pathlib import Path

import pytest

import rgtg_fast

PACKAGE = Path(rgtg_fast.__file__).parent
# A module may import from its own layer and those before it. The modules at the root of the package
# are one layer, above `decode`.
LAYERS = (
    "ops",
    "models",
    "scorers",
    "decode",
    "",
    "presets",
    "inspection",
    "sequence",
    "training",
    "evaluation",
    "vllm",
    "jobs",
    "on_policy",
    "demo",
    "cli",
)
CALLS = {"generate", "generate_many", "guided", "prompts", "validation", "vocabularies", "output"}
PUBLIC = {"presets", "inspection", "sequence"}
ROOT = {"__init__", "__main__", *CALLS}


def modules():
    """Dotted name below the package -> path; kernels/ belongs to ops."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        yield name, path


def layer_of(name):
    first = name.split(".")[0]
    if first in ("kernels", "_C"):
        return "ops"
    return first if first in LAYERS else ""


def imports_of(source, name, known):
    """The modules of the package that `source` imports, wherever in the file it does."""
    package = name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["rgtg_fast", *package[: len(package) - node.level + 1]] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] != "rgtg_fast":
                continue
            parts = target.split(".")[1:]
            while parts and ".".join(parts) not in known:
                parts.pop()  # a name in a module, or a module in a package
            found.add(".".join(parts) or "__init__")
    return found


def graph():
    paths = dict(modules())
    known = {name.removesuffix(".__init__") for name in paths} | {"_C", "kernels.library"}
    return {
        name.removesuffix(".__init__"): imports_of(path.read_text(), name, known)
        for name, path in paths.items()
    }


def upward(edges):
    ranks = {layer: rank for rank, layer in enumerate(LAYERS)}
    return [
        f"{name} imports {target}"
        for name, targets in edges.items()
        for target in sorted(targets)
        if name != "__main__"  # the way into the command line
        # Public names, as the calls are.
        and not (name == "__init__" and layer_of(target) in PUBLIC)
        and ranks[layer_of(target)] > ranks[layer_of(name)]
    ]


def test_no_import_goes_up():
    edges = graph()
    assert len(edges) > 60
    assert upward(edges) == []


def test_an_import_turned_upwards_is_found():
    edges = graph()
    source = "from __future__ import annotations\n\ndef f():\n    from ..decode import loop\n"
    edges["ops.reference"] |= imports_of(source, "ops.reference", set(edges))
    assert upward(edges) == ["ops.reference imports decode.loop"]


def test_no_two_modules_import_each_other_in_a_circle():
    edges = {name: targets - {name} for name, targets in graph().items()}
    done, path = set(), []

    def visit(name):
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name in done or name not in edges:
            return
        path.append(name)
        for target in sorted(edges[name]):
            visit(target)
        done.add(path.pop())

    for name in edges:
        visit(name)


def test_the_root_holds_the_calls_and_nothing_else():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT
