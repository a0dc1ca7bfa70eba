"""What is wanted of a GPU: each line reads its figure from the steps' JSON, and judges it."""

import json
import re

import pytest

from rgtg_fast.cli import microbench
from rgtg_fast.cli.gpu_report import page
from rgtg_fast.cli.gpu_report.lines import ATTENTION_CASES, LINES, STEP_CASES, TOPK_64, VOCAB_CASE
from rgtg_fast.cli.gpu_report.results import Results
from rgtg_fast.cli.gpu_report.steps import STEPS

BY_ID = {line.id: line for line in LINES}


class Written:
    """A report's folder with figures as the steps would write them."""

    def __init__(self, out):
        self.out = out
        self.write("run.json", {"dry": False})

    def write(self, name, content):
        file = self.out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))

    def record(self, step, status, **more):
        record = {"name": step, "status": status, "seconds": 1.0, **more}
        self.write(f"steps/{step}/record.json", record)

    def times(self, op, cases, **by_name):
        """Rows of each case; a value is `us`, or a dict of fields, or a list of these by case."""
        rows = []
        for place, case in enumerate(cases):
            for name, value in by_name.items():
                value = value[place] if isinstance(value, list) else value
                row = value if isinstance(value, dict) else {"us": value}
                row = {"us": 1.0, "% of copy": 50.0, "x torch": 2.0, "host": 9.0} | row
                rows.append({"op": op, "case": case, "implementation": name, **row})
        record = {"rows": rows, "empty launch": {"us": 2.0}}
        self.write(f"steps/microbench.{op}/{op}_gpu.json", record)

    def cells(self, batch, **rows_by_k):
        """`k10={"auto": {...}}`"""
        cells = [
            {"batch": batch, "k": int(k[1:]), "rows": [{"name": n, **r} for n, r in rows.items()]}
            for k, rows in rows_by_k.items()
        ]
        self.write(f"steps/generate.b{batch}/generate_b{batch}_gpu.json", {"cells": cells})

    def judge(self, line):
        got, verdict = BY_ID[line].judge(Results(self.out))
        return (None if got is None else got.value), verdict


@pytest.fixture
def report(tmp_path):
    return Written(tmp_path)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.id)
def test_what_was_not_run_says_so(report, line):
    assert report.judge(line.id) == (None, "not run")


def test_ids_are_unique_and_texts_say_what_and_not_where_it_was_asked():
    assert len(BY_ID) == len(LINES)
    for line in LINES:
        assert not re.search(r"issue|#\d|GPU\.md|task", line.text)
        assert line.wanted == "stated" or re.match(r"[≤≥0]", line.wanted)


GPU_CASES = {
    "topk_logprobs": [f"B={b} V=151936 bfloat16 k={k}" for b in (1, 64, 256) for k in (10, 64)],
    "ratio_step": STEP_CASES,
    "vocab_reward": [VOCAB_CASE],
    "candidate_attention": ATTENTION_CASES,
}


@pytest.mark.parametrize("op", GPU_CASES)
def test_the_cases_that_lines_name_are_measured(op):
    labels = {case.label for case in microbench.cases_of(op, "cuda")}
    assert set(GPU_CASES[op]) <= labels and set(TOPK_64) <= set(GPU_CASES["topk_logprobs"])


BOUNDS = {(10, 1): 10, (10, 64): 12, (10, 256): 30, (64, 1): 15, (64, 64): 20, (64, 256): 40}


@pytest.mark.parametrize(("k", "rows"), BOUNDS)
def test_topk_takes_the_fastest_of_our_kernels(report, k, rows):
    case, bound = f"B={rows} V=151936 bfloat16 k={k}", BOUNDS[k, rows]
    report.times("topk_logprobs", [case], cuda=bound, triton=bound + 9, torch=1.0)
    assert report.judge(f"topk-k{k}-b{rows}") == (bound, "met")
    report.times("topk_logprobs", [case], cuda={"us": None}, triton=bound + 0.1)
    assert report.judge(f"topk-k{k}-b{rows}") == (bound + 0.1, "missed")


def test_topk_against_torch_and_flashinfer_is_that_of_the_worst_case(report):
    cuda = [{"us": us, "x torch": x} for us, x in ((9.0, 9.0), (10.0, 4.0), (8.0, 5.0))]
    report.times("topk_logprobs", TOPK_64, cuda=cuda, flashinfer=10.0)
    assert report.judge("topk-torch") == (4.0, "met")
    assert report.judge("topk-flashinfer") == (1.0, "met")
    cuda[2] = {"us": 10.1, "x torch": 3.9}
    report.times("topk_logprobs", TOPK_64, cuda=cuda, flashinfer=10.0)
    assert report.judge("topk-torch") == (3.9, "missed")
    assert report.judge("topk-flashinfer") == (pytest.approx(1.01), "missed")
    report.times("topk_logprobs", TOPK_64[:2], cuda=cuda)
    assert report.judge("topk-torch") == report.judge("topk-flashinfer") == (None, "not run")


def test_the_step_is_held_against_five_microseconds_and_an_empty_launch(report):
    report.times("ratio_step", STEP_CASES, cuda=[2.5, 3.0, 2.0])
    assert report.judge("ratio-step-b8") == (3.0, "met")
    assert report.judge("ratio-step-launch") == (1.5, "met")
    report.times("ratio_step", STEP_CASES, cuda=5.2)
    assert report.judge("ratio-step-b64") == (5.2, "missed")
    assert report.judge("ratio-step-launch") == (2.6, "missed")


@pytest.mark.parametrize(
    ("op", "cases", "name", "low", "high"),
    [
        ("vocab_reward", [VOCAB_CASE], "vocab-reward", 60, 65),
        ("candidate_attention", ATTENTION_CASES, "attention", 70, 75),
    ],
)
def test_shares_of_a_copy(report, op, cases, name, low, high):
    report.times(op, cases, triton={"% of copy": low + 1.0})
    assert report.judge(f"{name}-{low}") == (low + 1.0, "met")
    assert report.judge(f"{name}-{high}") == (low + 1.0, "missed")


def test_the_host_side_of_attention_is_tritons_worst(report):
    triton = [{"host": 15.5}, {"host": 9.0}]
    report.times("candidate_attention", ATTENTION_CASES, cuda={"host": 3.0}, triton=triton)
    assert report.judge("attention-host") == (15.5, "missed")
    report.times("candidate_attention", ATTENTION_CASES, triton={"host": 14.0})
    assert report.judge("attention-host") == (14.0, "met")


def row(ms, **more):
    common = {"ms_per_token": ms, "decode_ms": ms - 1, "floor_ms": 8.0, "over_floor": ms / 8.0}
    return common | {"over_plain": ms / 20, "tokens_per_s": 1000 / ms} | more


def test_a_token_of_two_models_of_eight_billion_weights(report):
    models = {"plain": row(20.0), "static": row(6.0), "auto": row(10.0), "adapter": row(8.1)}
    report.cells(1, k10=models, k40={"auto": row(11.5)})
    assert report.judge("token") == (9.0, "met")
    assert report.judge("floor") == (1.25, "met")
    assert report.judge("plain") == (0.5, "met")
    assert report.judge("k40") == (pytest.approx(10.5 / 9), "missed")
    assert report.judge("adapter-1.4") == (pytest.approx(1.35), "met")
    assert report.judge("adapter-1.3") == (pytest.approx(1.35), "missed")
    assert report.judge("throughput-b1") == (100.0, "stated")


def test_a_compiled_step_counts_where_it_is_the_faster(report):
    report.cells(1, k10={"auto": row(12.0), "compiled": row(9.0)})
    assert report.judge("token") == (8.0, "met") and report.judge("floor") == (9 / 8, "met")
    report.cells(1, k10={"auto": row(9.0), "compiled": row(12.0)})
    assert report.judge("token") == (8.0, "met")


def test_a_contender_that_failed_leaves_its_lines_not_run(report):
    report.cells(1, k10={"auto": row(10.0)})
    assert report.judge("adapter-1.3") == (None, "not run")
    assert report.judge("speculation-b1") == (None, "not run")
    assert report.judge("token") == (9.0, "met")


def test_throughput_and_speculation_are_stated_by_batch(report):
    for batch in (8, 32):
        report.cells(batch, k10={"auto": row(2.0), "speculation": row(1.0)})
        assert report.judge(f"throughput-b{batch}") == (500.0, "stated")
    assert report.judge("speculation-b8") == (0.5, "stated")


@pytest.mark.parametrize(
    ("line", "step"),
    [("tests", "test_gpu"), ("matrix", "matrix"), ("sanitizer-racecheck", "sanitizer.racecheck")],
)
def test_tests_that_ran_on_the_gpu_are_counted(report, line, step):
    report.record(step, "ok", tests={"passed": 7, "failed": 0, "skipped": 1})
    assert report.judge(line) == (0.0, "met")
    report.record(step, "failed", rc=1, tests={"passed": 7, "failed": 3, "skipped": 0})
    assert report.judge(line) == (3.0, "missed")
    report.record(step, "failed", rc=1, tests={"passed": 7, "failed": 0, "skipped": 0})
    assert report.judge(line) == (1.0, "missed"), "what watches the tests found an error"
    report.record(step, "ok", tests={"passed": 0, "failed": 0, "skipped": 9})
    assert report.judge(line) == (None, "not run")
    report.record(step, "timed out", why="killed after 9 s")
    assert report.judge(line) == (None, "not run")


def test_a_dry_run_fills_no_line(report):
    report.record("matrix", "ok", tests={"passed": 7, "failed": 0, "skipped": 1})
    report.write("run.json", {"dry": True})
    assert report.judge("matrix") == (None, "not run")


def test_figures_that_were_cut_off_read_as_not_run(report):
    report.times("ratio_step", STEP_CASES, cuda=3.0)
    file = report.out / "steps" / "microbench.ratio_step" / "ratio_step_gpu.json"
    file.write_text(file.read_text()[:-10])
    assert report.judge("ratio-step-b1") == (None, "not run")


def test_the_page_shows_every_line_and_step_with_what_was_got(report):
    pytest.importorskip("matplotlib")
    report.times("ratio_step", STEP_CASES, cuda={"us": 5.2, "replay": 6.0})
    report.record("microbench.ratio_step", "ok")
    facts = {"gpu": "GPU|H", "driver": "580.1", "commit": None, "versions": {"torch": "2.13"}}
    report.write("steps/environment/environment.json", facts)
    page.write(report.out)
    text = (report.out / "REPORT.md").read_text()
    assert "| ≤ 5 µs | 5.2 µs (cuda, 6.0 µs replayed) | missed |" in text
    assert text.count("| not run |") >= len(LINES) - 4
    assert all(f"| {step.name} | " in text for step in STEPS)
    assert "driver 580.1" in text and "torch 2.13" in text and "commit unknown" in text
    assert "0 met, 4 missed" in text and len(text.splitlines()) < 100
    assert (report.out / "lines.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_page_and_no_plot(report, monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    report.times("ratio_step", STEP_CASES, cuda=5.2)
    page.write(report.out)
    assert (report.out / "REPORT.md").exists() and not (report.out / "lines.png").exists()
