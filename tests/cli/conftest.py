"""What tests of `rgtg-fast generate` share: a job, and one that needs no models."""

import pytest
from prompt_jobs import Job, fake

from rgtg_fast.jobs import run


@pytest.fixture
def job(tmp_path, capsys):
    return Job(tmp_path, capsys)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(run.ENGINES, "hf", fake())
