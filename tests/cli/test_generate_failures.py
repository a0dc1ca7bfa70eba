"""`rgtg-fast generate`: each answer is there once and whole, whatever happens on the way."""

import fcntl
import json
import random
import resource

import pytest
import torch
from interrupts import interrupted
from prompt_jobs import ASSETS, PROMPTS, fake

from rgtg_fast.decode.refill import Refill
from rgtg_fast.jobs import output, run


def test_a_file_cut_anywhere_is_made_whole_again(job, quick):
    job.write({"id": f"ü{i}", "prompt": f"p{i}"} for i in range(2))
    assert job() == 0
    whole = job.output.read_bytes()
    for size in range(len(whole)):
        job.output.write_bytes(whole[:size])
        assert job() == 0
        assert job.output.read_bytes() == whole, size


def test_what_a_crash_leaves_of_a_line_is_cut_off(job, quick):
    job.write({"prompt": f"p{i}"} for i in range(5))
    assert job() == 0
    whole = job.output.read_bytes()
    lines = whole.splitlines(keepends=True)
    job.output.write_bytes(lines[0] + b"\0" * 40 + b'"}\n' + lines[2])
    assert job() == 0 and "line 2 is torn" in job.said
    assert job.output.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "number"), [('{"id": 1}', 6), ('{"id": 9}', 6), ("[1]", 6), ('{"id": [1]}', 6)]
)
def test_a_line_that_is_no_answer_of_this_job_is_named_and_left(job, quick, line, number):
    job.write({"prompt": f"p{i}"} for i in range(5))
    job()
    job.output.write_bytes(job.output.read_bytes() + f"{line}\n".encode())
    before = job.output.read_bytes()
    assert job() == 2 and f"line {number} is no answer to a row of this job" in job.said
    assert job.output.read_bytes() == before


def test_another_job_is_refused_with_what_has_changed(job, quick):
    job.write({"prompt": f"p{i}"} for i in range(3))
    job()
    before = job.output.read_bytes()
    assert job(beta=3.0) == 2 and "a job with another beta (2.0, now 3.0); give" in job.said
    assert job(seed=1, k=4) == 2 and "seed (0, now 1), k (None, now 4)" in job.said
    assert job(reward_model=ASSETS / "rm_full") == 2 and "another reward_model;" in job.said
    assert job(batch_size=1) == 0, "the batch changes no answer"
    job.write({"prompt": f"q{i}"} for i in range(3))
    assert job() == 2 and "another input; give" in job.said and "--overwrite" in job.said
    assert job.output.read_bytes() == before
    assert job(overwrite=True) == 0
    assert [row["text"] for row in job.rows()] == ["é q0", "é q1", "é q2"]
    output.key_file(job.output).unlink()
    assert job() == 2 and "out.jsonl.job.json beside it does not say of what job" in job.said


def test_a_second_process_is_refused(job, quick):
    job.write([{"prompt": "a"}])
    with job.output.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert job() == 2 and "is being written by another process" in job.said
        assert job(overwrite=True) == 2
    assert job() == 0


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(job, monkeypatch):
    job.write({"prompt": prompt} for prompt in PROMPTS[:10])
    assert job(output=job.folder / "whole.jsonl", do_sample=True) == 0
    whole = {row["id"]: row["tokens"] for row in job.rows(job.folder / "whole.jsonl")}
    advance, steps = Refill.advance, 0

    def interrupted(self):
        nonlocal steps
        steps += 1
        if steps == 30:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Refill, "advance", interrupted)
    assert job(do_sample=True) == 130
    kept = len(job.rows())
    assert 0 < kept < 10
    assert f"stopped. {kept} of 10 answers are in {job.output}; the same command" in job.said
    assert job(do_sample=True) == 0 and f"{kept} answered already" in job.said
    assert {row["id"]: row["tokens"] for row in job.rows()} == whole


@pytest.mark.parametrize("stop", range(1, 6))
def test_an_interrupt_at_any_answer_loses_none(job, monkeypatch, stop):
    job.write({"prompt": f"p{i}"} for i in range(5))
    for _ in range(6):
        monkeypatch.setitem(run.ENGINES, "hf", fake(fails_at=stop))
        if job() == 0:
            break
    assert list(job.answers()) == [1, 2, 3, 4, 5]


def test_an_interrupt_at_any_line_leaves_whole_lines_and_no_lock(job, quick):
    job.write({"prompt": f"p{i}"} for i in range(3))
    lines = interrupted(lambda: job(output=job.folder / "whole.jsonl"), 0)
    for at in sorted(random.Random(0).sample(range(1, lines), 40)):
        interrupted(job, at)
        text = job.output.read_text() if job.output.exists() else ""
        assert text == "" or text.endswith("\n")
        ids = [json.loads(line)["id"] for line in text.splitlines()]
        assert ids == [1, 2, 3][: len(ids)]
        if len(ids) == 3:
            job.output.unlink()
    assert job() == 0 and list(job.answers()) == [1, 2, 3]


ERRORS = {
    "a GPU's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "a CPU's": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "Python's": MemoryError(),
}


def out_of_memory(monkeypatch, error, too_much):
    """Makes each step fail in which `too_much(prompts of its rows)`; the batches that were run."""
    advance, batches = Refill.advance, []

    def limited(self):
        if too_much([len(row.entry.ids) for row in self.rows]):
            raise error
        batches.append(len(self.rows))
        return advance(self)

    monkeypatch.setattr(Refill, "advance", limited)
    return batches


@pytest.mark.parametrize("error", list(ERRORS.values())[:2], ids=list(ERRORS)[:2])
def test_out_of_memory_halves_the_batch_and_goes_on(job, monkeypatch, error):
    job.write({"prompt": prompt} for prompt in PROMPTS[:9])
    assert job(output=job.folder / "whole.jsonl", do_sample=True, batch_size=8) == 0
    whole = {row["id"]: row["tokens"] for row in job.rows(job.folder / "whole.jsonl")}
    batches = out_of_memory(monkeypatch, error, lambda lengths: len(lengths) > 2)
    assert job(do_sample=True, batch_size=8) == 0
    assert "going on with batch_size=4" in job.said and "going on with batch_size=2" in job.said
    assert max(batches) == 2 and "error" not in job.output.read_text()
    assert {row["id"]: row["tokens"] for row in job.rows()} == whole


def test_a_prompt_that_does_not_fit_alone_gets_an_error_and_the_rest_the_whole_batch(
    job, monkeypatch
):
    job.write({"prompt": "my kettle leaks " * (40 if i == 3 else 1)} for i in range(12))
    error = ERRORS["a GPU's"]
    batches = out_of_memory(monkeypatch, error, lambda lengths: max(lengths) > 100)
    assert job(batch_size=4) == 0
    got = job.answers()
    assert [i for i, row in got.items() if "error" in row] == [4] and len(got) == 12
    assert "line 4: out of memory, even by itself" in got[4]["error"]
    assert batches[-1] == 4


def test_memory_that_lasts_for_no_prompt_is_a_failure_that_writes_nothing(job, monkeypatch):
    job.write({"prompt": prompt} for prompt in PROMPTS[:9])
    out_of_memory(monkeypatch, ERRORS["a GPU's"], lambda lengths: True)
    assert job(batch_size=1) == 1
    assert "out of memory for each of lines 1, 2, 3 by itself" in job.said
    assert job.rows() == []


def test_another_error_of_the_models_is_no_lack_of_memory(job, monkeypatch):
    job.write({"prompt": prompt} for prompt in PROMPTS[:2])
    out_of_memory(monkeypatch, RuntimeError("shapes do not match"), lambda lengths: True)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        job()


def test_a_full_disk_leaves_whole_lines_and_the_same_command_goes_on(job, quick):
    job.write({"prompt": f"{i} {'x' * 80}"} for i in range(40))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        assert job() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"no space left on the disk for {job.output}; make room. What is answered" in job.said
    text = job.output.read_text()
    assert 2500 < len(text.encode()) < 3000 and text.endswith("\n")
    assert job() == 0 and list(job.answers()) == list(range(1, 41))


def test_outputs_that_cannot_be_written_are_said_before_work_starts(job, quick, tmp_path):
    job.write([{"prompt": "a"}])
    assert job(output=tmp_path / "new" / "folder" / "out.jsonl") == 0
    (tmp_path / "file").write_text("")
    assert job(output=tmp_path / "file" / "out.jsonl") == 2 and "cannot be written to" in job.said
    assert job(output=tmp_path) == 2 and "is no regular file" in job.said
    assert job(output="/dev/full") == 2 and "is no regular file" in job.said
    assert job(output=job.input) == 2 and "is the input" in job.said
    assert job(input=tmp_path / "missing.jsonl") == 2 and "input: no file at" in job.said
