"""Models whose layers transformers splits over processes: the tokens of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensor_parallel
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]


def test_two_processes_give_the_tokens_of_one(tmp_path):
    want, weights = tensor_parallel.answer()
    assert weights == "Parameter"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(Path(tensor_parallel.__file__)), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in "01":
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {"tokens": want, "weights": "DTensor"}
