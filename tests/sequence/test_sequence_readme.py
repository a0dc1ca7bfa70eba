"""The README's example of whole sequences."""

import re
from pathlib import Path

import pytest

import rgtg_fast

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_example_runs_with_the_embedded_models(capsys):
    section = README.read_text().split("### Whole sequences\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_the_table_names_every_call_and_its_options():
    section = README.read_text().split("### Whole sequences\n")[1].split("\n## ")[0]
    calls = re.findall(r"^\| `(\w+)\(", section, re.MULTILINE)
    modules = rgtg_fast.sequence
    assert set(calls) == {name for name in modules.__all__ if name.islower()}
