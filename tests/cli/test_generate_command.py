"""`rgtg-fast generate`: prompts in, answers out."""

import io
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
from prompt_jobs import LM, PROMPTS, RM, fake
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rgtg_fast
from rgtg_fast import ops
from rgtg_fast.jobs import run


@pytest.fixture(scope="module")
def models():
    """The embedded language model, reward model and tokenizer."""
    lm = AutoModelForCausalLM.from_pretrained(LM).eval()
    rm = AutoModelForSequenceClassification.from_pretrained(RM).eval()
    return SimpleNamespace(lm=lm, rm=rm, tokenizer=AutoTokenizer.from_pretrained(LM))


def test_answers_are_those_of_generate_many(job, models):
    job.write({"prompt": prompt} for prompt in PROMPTS[:9])
    assert job(do_sample=True, seed=5) == 0
    got = job.answers()
    many = rgtg_fast.generate_many(
        models.lm, PROMPTS[:9], reward_model=models.rm, tokenizer=models.tokenizer, batch_size=4,
        beta=2.0, max_new_tokens=12, do_sample=True, seed=5,
    )  # fmt: skip
    for answer in many:
        row = got.pop(answer.index + 1)  # the number of its line
        assert list(row) == ["id", "text", "tokens", "reward", "kl"]
        assert (row["text"], row["tokens"]) == (answer.text, answer.tokens)
        assert row["reward"] == pytest.approx(answer.rewards[-1], abs=1e-5)
        assert row["kl"] == pytest.approx(math.fsum(answer.kl), abs=1e-5)
    assert got == {}


def test_rows_have_options_of_their_own(job, models):
    own = [{"beta": 0.0}, {"seed": 7}, {"max_new_tokens": 3}, {"temperature": 0.5, "beta": 4}, {}]
    job.write({"prompt": p, **o} for p, o in zip(PROMPTS, own, strict=False))
    assert job(do_sample=True) == 0
    for i, (prompt, options) in enumerate(zip(PROMPTS, own, strict=False)):
        ids = models.tokenizer(prompt, return_tensors="pt")["input_ids"]
        seed = options.get("seed", ops.split_seed(0, i + 1)[i:])
        usual = {"beta": 2.0, "max_new_tokens": 12, "do_sample": True}
        alone = usual | options | {"seed": seed}
        out = rgtg_fast.generate(models.lm, ids, reward_model=models.rm, **alone)
        assert job.answers()[i + 1]["tokens"] == out[0, ids.shape[1] :].tolist(), options


def test_any_text_file_that_is_jsonl_is_read(job, quick):
    lines = [
        b'\xef\xbb\xbf{"id": "\xe4\xbd\xa0", "prompt": "a"}\r',
        b"  \r",
        b'{"prompt": "line\\u2028separator"}\r',
        b"",
        '{"id": "x", "prompt": "b\u2028c\x85d", "note": null, "beta": null}'.encode(),
        b'{"id": 1, "prompt": "c"}',  # without a newline at the end
    ]
    job.input.write_bytes(b"\n".join(lines))
    assert job() == 0
    assert list(job.answers()) == ["你", 3, "x", 1]
    assert "fields of rows that are not used: note" in job.said
    assert job.answers()["x"]["text"] == "é b\u2028c\x85d"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (['{"prompt": "a"}', "[" * 100_000], "line 2 is not JSON"),
        (["9" * 5000], "line 1 is not JSON"),
        (['["a"]'], "line 1 is a JSON list; write an object"),
        ([], "has no prompts"),
        (["", "  "], "has no prompts"),
        ([{"id": "a"}, {"id": "b"}, {"id": "a"}], 'line 3 has the id "a" of line 1'),
        ([{"id": 2}, {"prompt": "a"}], "line 2 has the id 2 of line 1 (a row without one"),
        ([{"id": 1.5}], "line 1: id=1.5; write a text or a whole number"),
        ([{"id": True}], "line 1: id=True"),
        (['{"id": "\\ud800"}'], "line 1: id='\\ud800'"),
        ([{"k": 5}], "line 1: k is of the whole job"),
        ([{"top_p": 0.5}], "line 1: top_p is of the whole job"),
        ([{"beta": "high"}], "line 1: beta must be a float"),
        (['{"beta": NaN}'], "line 1: beta=nan is not finite"),
        ([{"temperature": 0}], "line 1: temperature=0 must be > 0"),
        ([{"max_new_tokens": 0}], "line 1: max_new_tokens=0 is out of range"),
        ([{"max_new_tokens": 2.5}], "line 1: max_new_tokens must be an int"),
        ([{"seed": 2**63}], "line 1: seed=9223372036854775808 does not fit"),
        ([{"seed": [1]}], "line 1: seed must be an int"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[:40],
)
def test_an_input_that_cannot_be_used_ends_before_work_starts(job, quick, rows, message):
    job.write(rows)
    assert job() == 2
    assert message in job.said and job.said.count("\n") == 1
    assert not job.output.exists()


def test_an_input_that_is_no_utf8_names_the_line(job, quick):
    job.input.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert job() == 2 and "line 2 is not UTF-8" in job.said


def test_a_bad_prompt_is_a_line_with_its_error(job):
    good = [{"id": f"good {i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS[:3])]
    bad = {
        "empty": ("", "the prompt is empty"),
        "a number": (5, "no prompt that is a text or a list"),
        "none": (None, "no prompt that is a text or a list"),
        "no messages": ([{"role": "user"}], "no prompt that is a text or a list"),
        "long": ("my kettle leaks " * 100, "leaves no room for an answer"),
        "huge": ("my kettle leaks " * 100_000, "leaves no room for an answer"),
        "half": ("\ud800", "half of a surrogate pair"),
    }
    rows = [{"id": name, "prompt": prompt} for name, (prompt, _) in bad.items()]
    job.write([good[0], *rows[:4], good[1], *rows[4:], good[2]])
    assert job() == 0
    got = job.answers()
    assert got.keys() == {*bad, *(row["id"] for row in good)}
    for name, (_, message) in bad.items():
        assert list(got[name]) == ["id", "error"] and message in got[name]["error"]
    assert all(got[row["id"]]["text"] for row in good)
    assert "7 with an error" in job.said


def test_conversations_go_through_the_chat_template(job, tmp_path, models):
    folder = tmp_path / "chat"
    tokenizer = AutoTokenizer.from_pretrained(LM)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role if m.role == 'customer' else raise_exception('who?') }}"
        " : {{ m.content }} {% endfor %}{% if add_generation_prompt %}agent :{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    said = "my kettle leaks and it is one month old ."
    job.write(
        [
            {"id": "text", "prompt": f"customer : {said} agent :"},
            {"id": "chat", "prompt": [{"role": "customer", "content": said}]},
            {"id": "other", "prompt": [{"role": "system", "content": said}]},
        ]
    )
    assert job(tokenizer=folder) == 0
    got = job.answers()
    assert got["chat"]["tokens"] == got["text"]["tokens"] != []
    assert "the chat template refuses it (who?)" in got["other"]["error"]
    assert job(output=tmp_path / "no.jsonl") == 2
    assert "line 2 is a conversation but the tokenizer has no chat template" in job.said


@pytest.mark.parametrize("given", ["flag", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_the_union_of_shards_is_the_whole(job, monkeypatch, given):
    job.write({"prompt": prompt} for prompt in PROMPTS[:7])
    assert job(do_sample=True, seed=3) == 0
    whole = {row["id"]: row["tokens"] for row in job.rows()}
    union = {}
    for i in range(3):
        options = {"shard": f"{i}/3"} if given == "flag" else {}
        if given == "torchrun":
            for name, value in (("RANK", i), ("LOCAL_RANK", i), ("WORLD_SIZE", 3)):
                monkeypatch.setenv(name, str(value))
        assert job(do_sample=True, seed=3, report=job.folder / "report", **options) == 0
        own = {r["id"]: r["tokens"] for r in job.rows(job.folder / f"out-0000{i}-of-00003.jsonl")}
        assert own and not own.keys() & union.keys()
        assert (job.folder / "report" / f"out-0000{i}-of-00003" / "report.json").is_file()
        union |= own
    assert union == whole


def test_more_shards_than_prompts_leave_some_empty(job, quick):
    job.write([{"prompt": "a"}])
    assert job(shard="1/2") == 0
    assert (job.folder / "out-00001-of-00002.jsonl").read_bytes() == b""


@pytest.mark.parametrize("shard", ["4/4", "1", "-1/2", "a/b", "1/0"])
def test_a_shard_that_there_is_not_is_an_error(job, quick, shard):
    assert job.write([{"prompt": "a"}])(shard=shard) == 2 or shard == "-1/2"
    assert "write i/n, the first of four is 0/4" in job.said or "expected one argument" in job.said


def test_standard_input_and_output(job, quick, monkeypatch):
    standard = SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "a"}\n\n{"prompt": "b"}'))
    monkeypatch.setattr(sys, "stdin", standard)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=written))
    assert job(input="-", output="-") == 0
    assert [json.loads(line)["id"] for line in written.getvalue().splitlines()] == [1, 3]


def test_yaml_flags_and_overrides_stand_over_each_other(job, monkeypatch):
    found = {}

    def engine(job, rows):
        found.update(vars(job))
        return fake()(job, rows)

    monkeypatch.setitem(run.ENGINES, "hf", engine)
    job.write([{"prompt": "a"}])
    config = job.folder / "job.yaml"
    config.write_text(
        f"model: {LM}\nreward_model: {RM}\nbeta: 1\nk: 5\ntop_p: 0.9\nbatch_size: 2\n"
    )
    assert job("top_p=0.8", "stop_strings=[a, b]", config=config, beta=3.0) == 0
    assert found["options"] == {
        "max_new_tokens": 12, "beta": 3.0, "k": 5, "top_p": 0.8, "stop_strings": ["a", "b"],
    }  # fmt: skip
    assert found["batch_size"] == 4


def test_the_report_says_how_values_are_spread(job, quick):
    job.write({"prompt": f"p{i}"} for i in range(5))
    assert job(report=job.folder / "report") == 0
    report = json.loads((job.folder / "report" / "report.json").read_text())
    assert (report["answers"], report["errors"], report["tokens"]) == (5, 0, 5)
    assert report["reward"]["mean"] == 0.5 and report["kl"]["quantiles"]["50"] == 1.0
    assert sum(report["length"]["histogram"]["counts"]) == 5
    assert (job.folder / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_answers_are_shown_token_by_token(job):
    rows = [{"id": f"p{i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS[:11])]
    rows[1]["prompt"] = ""
    rows[2] |= {"beta": 0.5, "seed": 4, "max_new_tokens": 3}
    page = job.folder / "page.html"
    assert job.write(rows)(do_sample=True, inspect=page) == 0
    assert f"the first answers in {page}" in job.said
    text = page.read_text()
    answers = job.answers()
    assert re.findall(r'aria-label="(\w+)"', text) == ["p0", *(f"p{i}" for i in range(2, 9))]
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    for name, (steps,) in zip(["p0", "p2"], json.loads(data), strict=False):
        row = answers[name]
        assert len(steps) == len(row["tokens"])
        assert steps[-1][0] == pytest.approx(row["reward"], abs=2e-3)
        assert math.fsum(step[2] for step in steps) == pytest.approx(row["kl"], abs=2e-2)
        shares = [share for _, _, _, share in steps[0][4]]
        assert sum(shares) == pytest.approx(1, abs=1e-2)
    # Of a job that is done already too.
    page.unlink()
    assert job(do_sample=True, inspect=page) == 0 and page.read_text() == text
    assert job("--overwrite", inspect=page, engine="ray") == 2
    assert "inspect" in job.said and "is of engine=hf" in job.said
