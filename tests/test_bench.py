import json

import pytest
import torch

from rgtg_fast import microbench, ops
from rgtg_fast.cli import main


def test_an_op_is_measured_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "deep" / "raw.json"
    main(["bench", "ratio_sample", "--repeat", "3", "--device", "cpu", "--json", str(out)])
    record = json.loads(out.read_text())
    assert {row["implementation"] for row in record["rows"]} == {"cpp", "torch"}
    assert all(row["p10"] <= row["us"] <= row["p90"] for row in record["rows"])
    assert record["versions"]["torch"] == torch.__version__
    assert "% of copy" in capsys.readouterr().out


def test_no_speed_for_a_wrong_result(monkeypatch, capsys):
    right = ops.ratio_sample

    def wrong(*arguments, backend):
        slot, logq = right(*arguments, backend=backend)
        return (slot + 1, logq) if backend == "cpp" else (slot, logq)

    monkeypatch.setattr(ops, "ratio_sample", wrong)
    with pytest.raises(SystemExit, match="differs from the reference"):
        main(["bench", "ratio_sample", "--repeat", "3", "--device", "cpu"])
    cpp = [line for line in capsys.readouterr().out.splitlines() if " cpp " in line]
    assert cpp and all("no speed" in line for line in cpp)


def test_a_missing_backend_is_an_error(monkeypatch):
    monkeypatch.setattr(microbench, "unavailable_reason", lambda op, backend: f"no {backend} here")
    with pytest.raises(ops.BackendUnavailable, match="cannot run reward_head: no cpp here"):
        main(["bench", "reward_head", "--backend", "cpp", "--device", "cpu"])


def test_every_op_has_cases():
    assert set(microbench.CASES) == set(ops.OPS)
