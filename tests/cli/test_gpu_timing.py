"""Device timing by a stand-in for torch.cuda that writes down what is asked of it, in order."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rgtg_fast.cli import gpu_timing, microbench
from rgtg_fast.decode import graphs
from rgtg_fast.ops import OPS

CPU = torch.device("cpu")


class Tape(TorchDispatchMode):
    """What the host asked for: operators by name, and the calls of the stand-ins."""

    def __init__(self):
        super().__init__()
        self.calls, self.clock, self.host_is_slow = [], 0.0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        size = args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0
        name = func._schema.name.removeprefix("aten::")
        self.calls.append("flush" if size == gpu_timing.FLUSH_BYTES // 4 else name)
        if "flush" in self.calls[-1:]:
            assert not func._schema.is_mutable, f"{name} leaves dirty lines in the cache"
        return out


@pytest.fixture
def tape(monkeypatch):
    tape = Tape()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            tape.clock += 0.25  # milliseconds
            self.at = tape.clock
            tape.calls.append("event")

        def query(self):
            return tape.host_is_slow

        def elapsed_time(self, other):
            return other.at - self.at

    class Graph:
        def __init__(self, device):
            self.warmed = 0

        def warm_up(self, step):
            tape.calls.append("warm up")
            step()

        def rehearse(self, step):
            self.warm_up(step)
            return []

        def capture(self, step):
            tape.calls.append("capture")
            self.step = step
            step()

        def replay(self):
            tape.calls.append("replay")

    def sleep(cycles):
        assert cycles >= 1_500_000, "a host call takes several hundred microseconds"
        tape.calls.append("sleep")

    monkeypatch.setattr(gpu_timing, "FLUSH_BYTES", 4096)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: tape.calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setitem(graphs.GRAPHS, "cpu", Graph)
    return tape


def measure(tape, functions, repeat=3):
    inputs = [(torch.full((4,), float(i)),) for i in range(2)]
    with tape:
        return gpu_timing.device_times(functions, inputs, CPU, repeat)


def test_each_timed_call_has_a_read_flush_and_a_sleep_before_its_first_event(tape):
    (taken,) = measure(tape, [torch.sin])
    begin = tape.calls.index("flush")
    timed = [name for name in tape.calls[begin:] if name != "synchronize"]
    end = timed.index("warm up")
    assert timed[:end] == ["flush", "sleep", "event", "sin", "event"] * 3
    assert tape.calls[:begin].count("sin") == 3  # warm-up calls, untimed
    assert not {"zero_", "fill_", "zeros"} & set(tape.calls[begin:])
    assert taken.launched == [250.0] * 3 and taken.late == 0 and taken.note == ""


def test_replays_are_timed_the_same_way_and_the_first_is_left_out(tape):
    (taken,) = measure(tape, [torch.sin])
    after = tape.calls[tape.calls.index("capture") + 2 :]
    replays = [name for name in after if name != "synchronize"]
    assert replays == ["flush", "sleep", "event", "replay", "event"] * 4
    assert tape.calls.count("warm up") == 2 and len(taken.replayed) == 3


def test_contenders_take_turns(tape):
    measure(tape, [torch.sin, torch.cos])
    calls = tape.calls[tape.calls.index("flush") : tape.calls.index("warm up")]
    assert [name for name in calls if name in ("sin", "cos")] == ["sin", "cos"] * 3
    replays = tape.calls[len(tape.calls) - tape.calls[::-1].index("capture") :]
    assert replays.count("replay") == 8


def test_calls_that_the_device_waited_for_are_counted(tape):
    tape.host_is_slow = True
    (taken,) = measure(tape, [torch.sin], repeat=5)
    assert taken.late == 5


def test_what_no_graph_holds_has_launch_times_and_says_why(tape, monkeypatch):
    def capture(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    good = graphs.GRAPHS["cpu"]
    monkeypatch.setitem(graphs.GRAPHS, "cpu", type("Bad", (good,), {"capture": capture}))
    (taken,) = measure(tape, [torch.sin])
    assert taken.replayed is None and len(taken.launched) == 3
    assert taken.note == "no graph: operation not permitted when stream is capturing"
    row = microbench._row(taken, 1000, 100.0, 500.0)
    assert row["note"] == taken.note and "replay" not in row and row["us"] == 250.0


def test_what_makes_the_host_wait_is_not_captured(tape, monkeypatch):
    wait = {"rehearse": lambda self, step: [" in item (somewhere.py:3)"]}
    monkeypatch.setitem(graphs.GRAPHS, "cpu", type("Waits", (graphs.GRAPHS["cpu"],), wait))
    (taken,) = measure(tape, [torch.sin])
    assert taken.replayed is None and "capture" not in tape.calls
    assert taken.note == "no graph: the host waits for the device in item (somewhere.py:3)"


def test_both_times_quantiles_bytes_and_share_of_a_copy_are_in_the_row(tape):
    (taken,) = measure(tape, [torch.sin], repeat=20)
    row = microbench._row(taken, 25_000_000, 200.0, 500.0)
    assert row["us"] == row["replay"] == row["replay p90"] == row["p10"] == 250.0
    assert row["bytes"] == 25_000_000 and row["GB/s"] == 100.0 and row["% of copy"] == 50.0
    assert row["x torch"] == 2.0 and row["late"] == 0
    assert len(taken.host) == 20 and 0 < row["host"] < 1e6


def test_quantiles_lie_within_what_was_measured():
    found = microbench._quantiles("replay", [3.0, 1.0, 2.0])
    assert found["replay least"] == 1.0 <= found["replay p10"] <= found["replay"] == 2.0
    assert found["replay p90"] <= 3.0


@pytest.mark.parametrize("op", OPS)
def test_the_cases_for_a_gpu_can_be_named_without_one(op):
    cases = list(microbench.cases_of(op, "cuda"))
    assert cases and all(case.least_bytes > 0 for case in cases)
    assert len({case.label for case in cases}) == len(cases)
