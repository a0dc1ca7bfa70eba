"""Which of many like cases `make test-slow` runs; `make test-exhaustive` runs the others."""

import pytest


def some_slow(cases, slow=1, ids=None):
    """The cases (tuples of arguments), the first `slow` of them marked slow and the rest
    exhaustive; `ids` names them."""
    names = ids or [None] * len(cases)
    marks = [pytest.mark.slow] * slow + [pytest.mark.exhaustive] * (len(cases) - slow)
    given = zip(cases, names, marks, strict=True)
    return [pytest.param(*case, id=name, marks=mark) for case, name, mark in given]
