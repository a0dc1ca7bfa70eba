"""Requests of all kinds for the fakes of vLLM, and random schedules of them."""

import functools

import tiny
from vllm_fakes import params

K, BETA = 4, 2.0  # of the engine


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
        (other[:4], 6, params(1.0, seed=2, top_k=40, top_p=0.6, min_p=0.05)),
    ]


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
