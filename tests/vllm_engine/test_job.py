"""`rgtg-fast generate --engine vllm` gives the lines of `--engine hf`."""

import json
import math
import random

import pytest
import tiny
from prompt_jobs import flags_of
from vllm_requests import MAX_LEN

from rgtg_fast.cli import main

MORE = [f"vllm={{kv_gib: 0.1, enforce_eager: true, max_model_len: {MAX_LEN}}}"]


@pytest.fixture
def job(tmp_path, folders):
    rows = []
    draw = random.Random(7)
    words = tiny.tokenizer().get_vocab()
    for at in range(24):
        prompt = " ".join(draw.choices(sorted(words), k=draw.randint(1, 12)))
        rows.append({"id": f"p{at}", "prompt": prompt})
    rows[3] |= {"beta": 0.5, "temperature": 0.7}
    rows[4] |= {"seed": 11, "max_new_tokens": 5}
    rows[5]["prompt"] = ""
    rows[6]["prompt"] = " ".join(draw.choices(sorted(words), k=MAX_LEN))
    place = tmp_path / "in.jsonl"
    place.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def run(engine, *more, **options):
        output = tmp_path / f"{engine}.jsonl"
        own = {"model": folders["lm"][0], "reward_model": folders["rm"][0], "input": place}
        own |= {"output": output, "engine": engine, "beta": 2.0, "max_new_tokens": 20}
        own |= {"batch_size": 4, "overwrite": True}
        main(["generate", *flags_of(own | options), *more, *(MORE if engine == "vllm" else ())])
        lines = [json.loads(line) for line in output.open()]
        assert len({line["id"] for line in lines}) == len(lines) == len(rows)
        return {line["id"]: line for line in lines}

    return run


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"do_sample": True, "seed": 5}, id="sampled"),
        pytest.param({}, id="greedy"),
        pytest.param({"reward_kind": "genarm", "do_sample": True}, id="genarm"),
    ],
)
def test_the_lines_of_the_other_engine(job, folders, options):
    if "reward_kind" in options:
        options = options | {"reward_model": folders["policy"][0]}
    want, found = job("hf", **options), job("vllm", **options)
    assert "positions" in want["p6"]["error"] and "max_model_len" in found["p6"]["error"]
    assert found["p5"] == want["p5"]
    for name in want.keys() - {"p5", "p6"}:
        one, other = found[name], want[name]
        assert (one["tokens"], one["text"]) == (other["tokens"], other["text"])
        for key in ("reward", "kl"):
            assert math.isclose(one[key], other[key], rel_tol=1e-3, abs_tol=1e-4)


def test_pi_is_cut_as_transformers_cuts_it(job):
    cuts = "top_k=20", "top_p=0.8", "min_p=0.02", "min_new_tokens=3"
    want, found = (job(engine, *cuts, do_sample=True) for engine in ("hf", "vllm"))
    for name in want.keys() - {"p5", "p6"}:
        assert found[name]["tokens"] == want[name]["tokens"]
        assert math.isclose(found[name]["kl"], want[name]["kl"], rel_tol=1e-3)
