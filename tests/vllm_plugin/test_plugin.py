"""The plug-in on random schedules of both model runners gives the tokens of `generate`."""

import functools
import random

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm_fakes import Job, RunnerV1, RunnerV2, config, oracle, params

K, BETA = 4, 2.0
RUNNERS = {"v1": RunnerV1, "v2": RunnerV2}
# What an engine guides by: names of folders, options of `additional_config`, those of `generate`.
REWARDS = {
    "tree": ("llama", {}),
    "reencode": ("gpt2", {"reward_method": "reencode"}),
    "expand": ("llama", {"reward_method": "expand"}),
    "genarm": ("policy", {"reward_kind": "genarm"}),
    "farma": ("policy", {"reward_kind": "farma"}),
    "pair": (("policy", "reference"), {}),
}


@functools.cache
def lm():
    return tiny.llama_lm()


def jobs_of_all_kinds():
    """Prompts that share beginnings, guided in every way and not at all."""
    base = tiny.prompts(12, seed=5)["input_ids"][0].tolist()
    other = tiny.prompts(9, seed=6)["input_ids"][0].tolist()
    return [
        ([*base, 40], 7, params(0.0)),
        ([*base, 41, 42], 9, params(1.0, seed=3)),
        ([*base, 41, 42], 9, params(1.0, seed=4)),
        (other, 12, params(0.7, seed=5, rgtg_beta=0.5)),
        (other[:3], 6, params(1.0, seed=6, rgtg_k=9)),
        (other[:1], 8, params(0.0, rgtg_draw="vllm")),
        (base, 5, params(1.0, seed=8, rgtg_seed=2**62, rgtg_k=2)),
        (other, 6, params(0.0, rgtg=False)),
        (base[:7], 6, params(1.3, seed=9, top_p=0.8)),
        (base[:7], 6, params(1.0, seed=9, top_k=3)),
    ]


@functools.cache
def answers(reward, folders):
    """What `generate` gives to each job."""
    names, options = REWARDS[reward]
    models = dict(folders)
    rm = models[names] if isinstance(names, str) else tuple(models[name] for name in names)
    found = []
    for prompt, steps, own in jobs_of_all_kinds():
        job = Job(prompt, steps, own)
        if own.extra_args.get("rgtg") is False:
            ids = torch.tensor([prompt])
            out = lm().generate(ids, max_new_tokens=steps, do_sample=False, pad_token_id=tiny.PAD)
            found.append(out[0, len(prompt) :].tolist())
        else:
            found.append(oracle(lm(), rm, job, K, BETA, **options))
    return found


def engine(runner, reward, folders, **rgtg):
    names, options = REWARDS[reward]
    folder = folders[names][0] if isinstance(names, str) else [folders[n][0] for n in names]
    return RUNNERS[runner](lm(), config(lm(), folder, k=K, beta=BETA, **options | rgtg))


def run(runner, draw, jobs, most=4):
    """Run jobs to their ends, as `draw(n)` (an int below n) schedules them."""
    waiting, running, chunks = list(jobs), [], {}
    for _ in range(600):
        leaving = [job for job in running if job.done]
        if draw(4) == 0:  # preempted, or not scheduled for a while
            taken = [job for job in running if job not in leaving and draw(3) == 0]
            waiting += taken
            leaving += taken
        running = [job for job in running if job not in leaving]
        coming = []
        while waiting and len(running) < most and draw(3):
            coming.append(waiting.pop(draw(len(waiting))))
            chunks[coming[-1]] = draw(3)
            running.append(coming[-1])
        chunked = [job for job in running if chunks.get(job)]
        for job in chunked:
            chunks[job] -= 1
        swaps = [(draw(most), draw(most)) for _ in range(draw(3))]
        runner.step(leaving, coming, swaps, chunked)
        if not waiting and not running:
            return
    raise AssertionError("the schedule did not end")


def check_schedule(runner, reward, folders, seed, **rgtg):
    models = tuple((name, model) for name, (_, model) in folders.items())
    of = engine(runner, reward, folders, **rgtg)
    jobs = [Job(*job) for job in jobs_of_all_kinds()]
    run(of, random.Random(seed).randrange, jobs)
    for job, want in zip(jobs, answers(reward, models), strict=True):
        assert job.outputs == want
    return of.processor


def scheduled(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("runner", RUNNERS)
@scheduled(6)
@given(seed=st.integers(0, 2**32))
def test_tokens_are_those_of_generate_whatever_the_schedule(runner, folders, seed):
    check_schedule(runner, "tree", folders, seed)
