"""Rewards and presets, as an engine's options and a request say them, guide as in `generate`."""

import json
import random

import pytest
import tiny
from local_http import Quiet, served
from vllm_fakes import Job, RunnerV1, config, oracle, params
from vllm_jobs import BETA, K, jobs_of_all_kinds, lm, run

from rgtg_fast import Reward, WeightedRewards, presets


def count_e(texts):
    return [float(text.count("e")) for text in texts]


class Scores(Quiet):
    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["query"]
        body = json.dumps({"rewards": count_e(texts)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def check(reward, same, tokenizer=None, jobs=slice(4), **rgtg):
    """An engine guided by `reward` gives what `generate` gives with the options `same`."""
    settings = config(lm(), reward, **{"k": K, "beta": BETA} | rgtg, tokenizer=tokenizer)
    runner = RunnerV1(lm(), settings)
    jobs = [Job(*job) for job in jobs_of_all_kinds()[jobs]]
    run(runner, random.Random(3).randrange, jobs)
    for job in jobs:
        assert job.outputs == oracle(lm(), job=job, **{"k": K, "beta": BETA} | same)


def check_texts(reward, tmp_path):
    """A reward that counts a letter of the texts guides as `count_e` does in `generate`."""
    tiny.tokenizer().save_pretrained(tmp_path)
    check(reward, {"rm": count_e, "tokenizer": tiny.tokenizer()}, str(tmp_path))


def test_an_endpoint_guides_by_texts(tmp_path):
    with served(Scores) as address:
        check_texts(f"{address}/score", tmp_path)


def test_a_function_of_texts_guides(tmp_path):
    check_texts(f"{__name__}:count_e", tmp_path)


def test_a_sum_of_rewards_guides(folders):
    (one, a), (two, b) = folders["llama"], folders["policy"]
    parts = [{"model": one, "weight": 0.7}, {"model": two, "kind": "genarm", "clamp": [-3, 0]}]
    same = 0.7 * Reward(a) + WeightedRewards([Reward(b, reward_kind="genarm")], bounds=(-3, 0))
    check({"parts": parts, "clamp": [-2, 2]}, {"rm": same.clamp(-2, 2)})


@pytest.mark.parametrize(
    ("preset", "own"),
    [
        ("pargs", {}),
        ({"name": "rad", "beta": 3.0, "inverse": True, "k": 6}, {}),
        ("cd_fudge", {"k": K}),
        ("genarm", {"k": K}),
        ({"name": "dexperts", "filter_p": 0.6}, {"k": K}),
        ({"name": "contrastive", "alpha": 0.3}, {"k": K}),
        ("pad", {"k": K}),
    ],
    ids=str,
)
def test_a_preset_of_the_engine_guides(folders, preset, own):
    name, options = preset, {}
    if isinstance(preset, dict):
        name, options = preset["name"], {k: v for k, v in preset.items() if k != "name"}
    names = {"genarm": ["policy"], "contrastive": ["policy"]}.get(name, ["llama"])
    names = ["policy", "reference"] if name in ("dexperts", "pad") else names
    same = getattr(presets, name)(*(folders[n][1] for n in names), **options) | own
    rm = same.pop("reward_model")
    for drawn in ("do_sample", "top_k", "top_p", "temperature"):  # the requests'
        same.pop(drawn, None)
    reward = [folders[n][0] for n in names]
    reward = reward if len(reward) == 2 else reward[0]
    check(reward, {"rm": rm} | same, preset=preset, **{"k": None, "beta": None} | own)


def test_a_preset_of_a_request_is_its_k_and_beta(folders):
    prompt = jobs_of_all_kinds()[0][0]
    runner = RunnerV1(lm(), config(lm(), folders["llama"][0], k=K, beta=BETA))
    jobs = [
        Job(prompt, 6, params(1.0, seed=3, rgtg_preset="pargs")),
        Job(prompt, 6, params(0.7, seed=3, rgtg_preset="args_stochastic", rgtg_beta=4.0)),
        Job(prompt, 6, params(0.0, rgtg_preset="pargs_greedy")),
    ]
    for step in range(6):
        runner.step(coming=[] if step else jobs)
    for job, (k, beta) in zip(jobs, ((10, 2.0), (10, 4.0), (10, 1.0)), strict=True):
        assert job.outputs == oracle(lm(), folders["llama"][1], job, k, beta)
