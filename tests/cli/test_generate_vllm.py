"""`rgtg-fast generate --engine vllm`, with an engine that runs the plug-in as vLLM's does."""

import math
import os
import re
import sys
from types import SimpleNamespace

import pytest
import vllm_fakes
from prompt_jobs import LM, PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgtg_fast.jobs import vllm_offline


def lengths(texts):
    return [len(text) / 50 for text in texts]


class Request(vllm_fakes.Job):
    """A request of an embedded model."""

    eos = AutoTokenizer.from_pretrained(LM).eos_token_id

    @property
    def done(self):
        return self.outputs[-1:] == [self.eos] or len(self.outputs) >= self.steps


class LLM:
    """`vllm.LLM`, as far as a job looks at it."""

    made = ()
    fails_at = None

    def __init__(self, model, *, tokenizer, dtype, max_num_seqs, logits_processors,
                 additional_config, max_model_len=256):  # fmt: skip
        assert (tokenizer, dtype) == (model, "float32")
        assert logits_processors == [vllm_offline.PLUGIN]
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.most, self.steps, self.shut = max_num_seqs, 0, False
        lm = AutoModelForCausalLM.from_pretrained(model).eval()
        config = vllm_fakes.config(lm, tokenizer=tokenizer, max_len=max_model_len,
                                   **additional_config["rgtg"])  # fmt: skip
        config.model_config.try_get_generation_config = lambda: {"eos_token_id": Request.eos}
        self.runner = vllm_fakes.RunnerV1(lm, config)
        self.model_config, self.llm_engine = config.model_config, self
        self.engine_core = SimpleNamespace(shutdown=lambda: setattr(self, "shut", True))
        self.waiting, self.running, self.ended = {}, {}, []
        LLM.made = (*LLM.made, self)

    def add_request(self, name, prompt, params):
        assert prompt["type"] == "token" and name not in self.waiting
        self.waiting[name] = Request(prompt["prompt_token_ids"], params.max_tokens, params)

    def step(self):
        if self.steps == LLM.fails_at:
            LLM.fails_at = None
            raise KeyboardInterrupt if LLM.interrupted else RuntimeError("a NaN reward")
        self.steps += 1
        came = list(self.waiting)[: self.most - len(self.running)]
        self.running |= {name: self.waiting.pop(name) for name in came}
        self.runner.step(self.ended, [self.running[name] for name in came])
        over = [name for name, request in self.running.items() if request.done]
        self.ended = [self.running.pop(name) for name in over]
        outputs = [SimpleNamespace(token_ids=request.outputs) for request in self.ended]
        unfinished = [SimpleNamespace(finished=False, request_id=name) for name in self.running]
        return unfinished + [
            SimpleNamespace(finished=True, request_id=name, outputs=[out])
            for name, out in zip(over, outputs, strict=True)
        ]

    def abort_request(self, names):
        assert set(names) == {*self.waiting, *self.running}
        self.waiting, self.running = {}, {}


def sampling_params(**given):
    usual = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    names = {"max_tokens": given["max_tokens"]}
    known = {n: given[n] for n in usual if n in given}
    params = vllm_fakes.params(**usual | known, **given["extra_args"])
    return SimpleNamespace(**vars(params), **names)


@pytest.fixture
def vllm(monkeypatch):
    """A fake vLLM is installed."""
    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=sampling_params)
    )
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setattr(LLM, "made", ())
    monkeypatch.setattr(LLM, "fails_at", None)
    monkeypatch.setattr(LLM, "interrupted", True, raising=False)
    return LLM


def with_rows(job):
    rows = [{"id": f"p{i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS[:12])]
    rows[2] |= {"beta": 0.5, "temperature": 0.7}
    rows[3] |= {"seed": 11, "max_new_tokens": 3}
    rows[4]["prompt"] = ""
    return job.write(rows)


def tokens_of(job):
    return {name: row.get("tokens") for name, row in job.answers().items()}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"do_sample": True, "seed": 5}, id="sampled"),
        pytest.param({}, id="greedy"),
        pytest.param({"preset": "args_stochastic", "beta": 1.5}, id="preset"),
        pytest.param({"reward_model": "test_generate_vllm:lengths", "k": 4}, id="function"),
    ],
)
def test_the_lines_are_those_of_the_engine_hf(job, vllm, options):
    assert with_rows(job)(**options) == 0
    want = job.answers()
    assert job(**options, engine="vllm", output=job.folder / "other.jsonl") == 0, job.said
    job.output = job.folder / "other.jsonl"
    found = job.answers()
    assert found.keys() == want.keys() and found["p4"] == want["p4"]
    for name in want.keys() - {"p4"}:
        assert all(found[name][key] == want[name][key] for key in ("tokens", "text"))
        for key in ("reward", "kl"):
            assert math.isclose(found[name][key], want[name][key], rel_tol=1e-3, abs_tol=1e-4)
    (engine,) = vllm.made
    assert engine.shut and "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    steps = engine.runner.processor.settings.steps
    assert not os.path.exists(os.path.dirname(steps))


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_run_that_was_stopped_goes_on(job, vllm, interrupted, monkeypatch):
    with_rows(job)
    assert job(engine="vllm") == 0
    want = tokens_of(job)
    monkeypatch.setattr(LLM, "fails_at", 14)
    monkeypatch.setattr(LLM, "interrupted", interrupted)
    assert job("--overwrite", engine="vllm") == (130 if interrupted else 1)
    assert "the same command" in job.said and vllm.made[-1].shut
    assert ("a NaN reward" in job.said) is not interrupted
    assert 0 < len(job.rows()) < 12
    assert job(engine="vllm") == 0
    assert tokens_of(job) == want


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (
            {},
            ["repetition_penalty=1.2"],
            "repetition_penalty=1.2 is not of .* or repetition_.*=1.0",
        ),
        ({}, ["bad_words_ids=[[3]]"], "bad_words_ids=.* pass engine=hf"),
        ({"k": "none"}, [], "k=none is the whole vocabulary"),
        ({"device": "cpu"}, [], "device='cpu' with engine=vllm, which takes its own"),
        ({"preset": "genarm"}, [], "preset='genarm' is over the whole vocabulary"),
        ({"preset": "nash_md", "k": 5}, [], "the temperature is a request's"),
        ({"reward_kind": "head"}, [], "reward_kind='head' is unknown"),
        ({}, ["vllm={model: other}"], "vllm: model is set by the job's own keys"),
        ({}, ["vllm=[1]"], r"vllm=\[1\]; write a mapping"),
        ({}, ["vllm={tensor_paralel_size: 2}"], "vllm: .*unexpected keyword.*tensor_paralel_size"),
        ({"worker_engine": "vllm"}, [], "worker_engine='vllm' is of engine=ray"),
        ({"engine": "hf"}, ["vllm={max_model_len: 9}"], "of engine=vllm, or worker_engine=vllm"),
        (
            {"engine": "ray", "worker_engine": "ray"},
            [],
            "worker_engine='ray'; pass one of",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(job, vllm, options, more, message):
    with_rows(job)
    assert job(*more, **{"engine": "vllm"} | options) == 2
    assert re.search(message, job.said), job.said
    assert not job.output.exists() or not job.rows()


def test_a_prompt_that_is_too_long_is_a_line_with_its_error(job, vllm):
    with_rows(job)
    assert job("vllm={max_model_len: 20}", engine="vllm") == 0
    errors = [row["error"] for row in job.rows() if "error" in row]
    assert len(errors) > 1 and all(
        "that vLLM was started for" in e for e in errors if "empty" not in e
    )


def test_without_vllm(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert with_rows(job)(engine="vllm") == 1
    assert "engine 'vllm' needs vLLM" in job.said and "pip install" in job.said
