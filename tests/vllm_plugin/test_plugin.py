"""The plug-in on random schedules of both model runners gives the tokens of `generate`."""

import functools
import gc
import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm_fakes import Job, Logits, RunnerV1, RunnerV2, config, oracle, params
from vllm_jobs import BETA, K, jobs_of_all_kinds, lm, run

from rgtg_fast.vllm import rows
from rgtg_fast.vllm.steps import StepReader

NEAR = {"rtol": 1e-4, "atol": 1e-4}  # of fp32 sums in another order
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


@pytest.mark.slow
@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("runner", RUNNERS)
@scheduled(10)
@given(seed=st.integers(0, 2**32))
def test_tokens_are_those_of_generate_with_every_kind_of_reward(runner, reward, folders, seed):
    check_schedule(runner, reward, folders, seed)


@pytest.mark.parametrize("runner", RUNNERS)
def test_rows_over_the_budget_are_scored_in_waves(runner, folders):
    # Room for one text of the greatest length, or two of the usual; four run at a time.
    processor = check_schedule(runner, "tree", folders, 7, kv_gib=5e-5)
    assert processor.rows.counts.waves and processor.rows.counts.evicted


def test_the_budget_is_kept_at_every_step(folders, monkeypatch):
    seen = []
    real = rows.RewardRows.score

    def score(self, *args):
        out = real(self, *args)
        seen.append(self.used <= self.budget)
        cache = self.scorer.caches[0]
        seen.append(cache.stores[0].shape[2] <= self.budget)
        return out

    monkeypatch.setattr(rows.RewardRows, "score", score)
    check_schedule("v1", "tree", folders, 8, kv_gib=5e-5)
    assert len(seen) > 20 and all(seen)


def one_engine(folders):
    return engine("v1", "tree", folders)


def test_a_request_that_comes_back_goes_on_from_the_row_it_left(folders):
    runner = one_engine(folders)
    job = Job(*jobs_of_all_kinds()[1])
    for _ in range(4):
        runner.step(coming=[] if runner.batch else [job])
    read = runner.processor.rows.counts.prefilled
    runner.step(leaving=[job])
    runner.step(coming=[job])
    counts = runner.processor.rows.counts
    assert read == len(job.prompt)
    # The last token before it left had not been committed.
    assert counts.prefilled == read + 1
    assert counts.reused == len(job.prompt) + 3


def test_requests_that_have_gone_leave_nothing(folders):
    runner = engine("v1", "tree", folders, kv_gib=1e-4)
    draw = random.Random(5)

    def serve(requests):
        for _ in range(requests):
            prompt = [draw.randrange(3, tiny.vocab_size()) for _ in range(8)]
            job = Job(prompt, 2, params(1.0, seed=1))
            runner.step(leaving=runner.batch[:1], coming=[job])
            runner.logits.of.cache_clear()
        gc.collect()
        return len(gc.get_objects())

    kept = serve(60)  # more than the budget holds
    assert runner.processor.rows.counts.evicted
    assert serve(120) <= kept + 20


def test_rows_that_are_parked_are_few_beside_those_in_use(folders, monkeypatch):
    monkeypatch.setattr(rows, "LEAST_PARKED", 8)
    runner = one_engine(folders)
    for seed in range(30):
        prompt = tiny.prompts(6, seed=seed)["input_ids"][0].tolist()
        runner.step(leaving=runner.batch[:1], coming=[Job(prompt, 2, params(0.0))])
        assert len(runner.processor.rows.rows) <= 1 + 8
    assert len(runner.processor.rows.rows) == 9
    # The last ones are those that are kept.
    prompt = tiny.prompts(6, seed=22)["input_ids"][0].tolist()
    runner.step(leaving=runner.batch[:1], coming=[Job(prompt, 2, params(0.0))])
    assert runner.processor.rows.counts.reused == 6


def test_unguided_requests_cost_nothing(folders):
    runner = one_engine(folders)
    jobs = [Job([5, 6, 7], 3, params(0.0, rgtg=False)) for _ in range(3)]
    runner.step(coming=jobs)
    logits = torch.randn(3, tiny.vocab_size())
    out = runner.processor.apply(logits)
    assert out is logits and not runner.processor.rows.rows
    assert runner.processor.rows.counts.scored == 0


def test_rows_of_unguided_requests_keep_their_logits(folders):
    runner = one_engine(folders)
    jobs = [Job([5, 6, 7], 3, params(0.0, rgtg=at == 1)) for at in range(3)]
    runner.step(coming=jobs)
    logits = torch.randn(3, tiny.vocab_size())
    out = runner.processor.apply(logits.clone())
    assert torch.equal(out[[0, 2]], logits[[0, 2]]) and not torch.equal(out[1], logits[1])


def test_candidates_that_are_masked_are_not_scored(folders):
    runner = one_engine(folders)
    runner.step(coming=[Job([5, 6, 7], 3, params(0.0))])
    before = runner.processor.rows.counts.scored
    logits = torch.full((1, tiny.vocab_size()), -torch.inf)
    logits[0, [8, 9]] = 1.0
    out = runner.processor.apply(logits)
    assert runner.processor.rows.counts.scored == before + 2
    assert out[0].isfinite().nonzero()[:, 0].tolist() in ([8], [9])


def test_without_a_seed_the_logits_are_those_of_the_ratio_policy(folders):
    runner = one_engine(folders)
    prompt = jobs_of_all_kinds()[0][0]
    runner.step(coming=[Job(prompt, 3, params(1.0, rgtg_beta=1.5))])
    runner.batch[0].outputs.clear()
    logits = Logits(lm()).of(tuple(prompt))
    out = runner.processor.apply(logits[None].clone())[0]
    top = torch.log_softmax(logits, -1).topk(K)
    texts = torch.tensor([[*prompt, token] for token in top.indices.tolist()])
    want = top.values + 1.5 * tiny.full_reward(folders["llama"][1], texts)
    assert torch.allclose(out[top.indices], want, atol=1e-4)
    assert int(out.isfinite().sum()) == K


def test_a_token_from_elsewhere_is_read_like_any_other(folders):
    """What comes behind the plug-in may force a token that is no candidate."""
    runner = one_engine(folders)
    job = Job(*jobs_of_all_kinds()[0])
    runner.step(coming=[job])
    runner.step()
    job.outputs[-1] = 50
    runner.step()
    other = Job([*job.prompt, *job.outputs[:2]], 1, params(0.0))
    assert job.outputs[2:] == oracle(lm(), folders["llama"][1], other, K, BETA)


def test_tokens_that_vllm_takes_back_are_taken_back_here(folders):
    runner = one_engine(folders)
    job = Job(*jobs_of_all_kinds()[1])
    for _ in range(5):
        runner.step(coming=[] if runner.batch else [job])
    had = list(job.outputs)
    del job.outputs[2:]
    for _ in range(3):
        runner.step()
    assert job.outputs == had


def test_an_id_that_the_reward_model_lacks_is_read_and_never_chosen(folders):
    size = tiny.vocab_size() + 8
    wide = tiny.llama_lm(vocab_size=size)
    runner = RunnerV1(wide, config(wide, folders["llama"][0], k=8, beta=0.1))
    job = Job([5, size - 1, 7], 6, params(0.0))
    for _ in range(6):
        runner.step(coming=[] if runner.batch else [job])
    assert max(job.outputs) < tiny.vocab_size()


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("draw", range(3))
def test_reward_and_kl_of_each_token_are_written(runner, draw, folders, tmp_path):
    rm = folders["llama"][1]
    place = tmp_path / "steps"
    place.touch()
    given = [
        job for job in jobs_of_all_kinds() if not {"rgtg", "rgtg_draw"} & job[2].extra_args.keys()
    ]
    cuts = ({"top_p": 0.9}, {"top_k": 70}, {"top_k": 70, "top_p": 0.3}, {"min_p": 0.2})
    given += [(given[0][0], 5, params(1.0, seed=6, **cut)) for cut in cuts]
    jobs = []
    for number, (prompt, steps, own) in enumerate(given):
        own.extra_args = own.extra_args | {"rgtg_number": number}
        jobs.append(Job(prompt, steps, own))
    run(engine(runner, "tree", folders, steps=str(place)), random.Random(draw).randrange, jobs)
    reader = StepReader(str(place))
    for number, (prompt, steps, own) in reversed(list(enumerate(given))):
        want = oracle(lm(), rm, Job(prompt, steps, own), K, BETA, return_dict_in_generate=True)
        rewards, kl = reader.take(number, len(jobs[number].outputs))
        count = len(rewards)
        torch.testing.assert_close(torch.tensor(rewards), want.rewards[0, :count], **NEAR)
        known = torch.tensor(kl).isfinite()
        assert known.all() or own.top_k == 70 or own.top_p == 0.9
        torch.testing.assert_close(torch.tensor(kl)[known], want.kl[0, :count][known], **NEAR)
    with pytest.raises(RuntimeError, match="lacks steps of request 0"):
        reader.take(0, 1)
    reader.close()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_its_own_tests_are_skipped_and_say_why():
    folder = Path(__file__).parents[1] / "vllm_engine"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "vLLM is not installed here" in done.stdout
    assert "error" not in done.stdout.lower()
