"""vLLM's own engine, guided, gives the tokens of `rgtg_fast.generate` in every configuration."""

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import tiny
import torch
import vllm_requests
from vllm_requests import BETA, MAX_LEN, K, Request, twelve, two_hundred

from rgtg_fast.vllm import RewardGuided


@contextmanager
def engine(folders, reward="rm", rgtg=None, **options):
    from vllm import LLM

    own = {"reward_model": folders[reward][0], "k": K, "beta": BETA, "kv_gib": 0.25}
    llm = LLM(
        folders["lm"][0],
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_seqs=16,
        enforce_eager=True,
        logits_processors=["rgtg_fast.vllm:RewardGuided"],
        additional_config={"rgtg": own | (rgtg or {})},
        **{"enable_prefix_caching": False, "async_scheduling": False} | options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def tokens_of(llm, requests, own_seed=False):
    prompts = [{"prompt_token_ids": request.prompt} for request in requests]
    params = [request.params(own_seed) for request in requests]
    outs = llm.generate(prompts, params, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outs]


@pytest.fixture
def plugins(monkeypatch):
    """The plug-ins of engines that are made in this process."""
    made, real = [], RewardGuided.__init__

    def noted(self, *args):
        made.append(self)
        real(self, *args)

    monkeypatch.setattr(RewardGuided, "__init__", noted)
    return made


CONFIGURATIONS = {
    "plain": {},
    "asynchronous": {"async_scheduling": True},
    "chunked prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 32},
    "prefix cache": {"enable_prefix_caching": True, "block_size": 32},
    # 12 requests of up to 218 tokens in 15 blocks of 32.
    "preemption": {"num_gpu_blocks_override": 16, "block_size": 32},
    "half unguided": {"half": True},
    "reward cache over its budget": {"rgtg": {"kv_gib": 0.0005}},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tokens_are_those_of_generate(name, folders, wanted, plugins):
    options = dict(CONFIGURATIONS[name])
    guided = not options.pop("half", False)
    own_seed = name == "chunked prefill"
    with engine(folders, **options) as llm:
        for _ in range(2 if name == "prefix cache" else 1):
            assert tokens_of(llm, twelve(guided), own_seed) == wanted(twelve, guided)
        counts = dataclasses.replace(plugins[0].rows.counts)
        assert tokens_of(llm, two_hundred(), own_seed) == wanted(two_hundred)
    assert counts.scored
    # What was preempted goes on from what was read of it.
    assert bool(counts.reused) == (name in ("preemption", "prefix cache"))
    assert bool(counts.waves) == (name == "reward cache over its budget")


def test_answers_of_one_prompt_are_drawn_with_seeds_one_after_the_other(folders):
    lm, rm = folders["lm"][1], folders["rm"][1]
    request = Request(20, 24, at=3, seed=500)
    params = request.params()
    params.n = 3
    with engine(folders) as llm:
        (out,) = llm.generate([{"prompt_token_ids": request.prompt}], params, use_tqdm=False)
    want = [Request(20, 24, at=3, seed=500 + i).want(lm, rm) for i in range(3)]
    assert [list(each.token_ids) for each in out.outputs] == want


def test_without_a_seed_vllm_draws_from_the_ratio_policy(folders):
    lm, rm = folders["lm"][1], folders["rm"][1]
    request = Request(12, 1, at=5, seed=0)
    params = request.params()
    params.seed, params.logprobs, params.n = None, K, 400
    with engine(folders, logprobs_mode="processed_logprobs") as llm:
        (out,) = llm.generate([{"prompt_token_ids": request.prompt}], params, use_tqdm=False)
    ids = torch.tensor([request.prompt])
    top = torch.log_softmax(lm(ids).logits[0, -1], -1).topk(K)
    rewards = torch.cat([tiny.full_reward(rm, torch.cat([ids[0], i[None]])[None]) for i in top[1]])
    policy = torch.softmax(top[0] + BETA * rewards, -1)
    given = out.outputs[0].logprobs[0]
    for token, prob in zip(top[1].tolist(), policy.tolist(), strict=True):
        assert math.exp(given[token].logprob) == pytest.approx(prob, abs=1e-4)
        drawn = sum(each.token_ids[0] == token for each in out.outputs) / 400
        assert abs(drawn - prob) < 4.5 * math.sqrt(prob * (1 - prob) / 400) + 1e-3


def test_rewards_of_a_causal_model_guide_too(folders):
    lm, rm = folders["lm"][1], folders["policy"][1]
    requests = twelve()[:6]
    want = [request.want(lm, rm, reward_kind="genarm") for request in requests]
    with engine(folders, "policy", {"reward_kind": "genarm"}) as llm:
        assert tokens_of(llm, requests) == want


@pytest.mark.parametrize(
    ("rgtg", "said"),
    [
        ({"rewards_model": "x"}, "did you mean reward_model"),
        ({"k": 65}, "k=65 is out of range"),
        ({"kv_gib": 1e-5}, "kv_gib"),
    ],
)
def test_an_engine_that_cannot_be_says_why(folders, rgtg, said):
    with pytest.raises(ValueError, match=said), engine(folders, rgtg=rgtg):
        pass


def test_two_ranks_of_a_split_model_give_the_same_tokens(folders, wanted, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    before = psutil.Process().children()
    with engine(folders, tensor_parallel_size=2) as llm:
        assert tokens_of(llm, twelve()) == wanted(twelve)
        assert tokens_of(llm, two_hundred()) == wanted(two_hundred)
        workers = {each for each in psutil.Process().children() if each not in before}
        workers -= {each for each in workers if "resource_tracker" in " ".join(each.cmdline())}
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=120)[1]


def test_the_second_model_runner_gives_the_same_tokens(folders, wanted, tmp_path):
    configurations = [("twelve", {"enable_prefix_caching": False, "async_scheduling": False})]
    (tmp_path / "in.json").write_text(json.dumps(configurations))
    command = [sys.executable, str(Path(vllm_requests.__file__).with_name("vllm_v2.py"))]
    command += [folders["lm"][0], folders["rm"][0], str(tmp_path)]
    path = os.pathsep.join([str(Path(vllm_requests.__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert {each["runner"] for each in found} == {"vllm.v1.worker.cpu.model_runner"}
    assert [each["tokens"] for each in found] == [wanted(twelve)]
