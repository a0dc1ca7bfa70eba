"""Guided calls from many threads, and interrupted ones: right tokens, models as they were."""

import copy
import functools
import gc
import sys
import threading
import weakref

import pytest
import tiny
import torch
import zoo
from interrupts import interrupted, state
from test_state import assert_unchanged, snapshot

import rgtg_fast
from rgtg_fast.models import cache, twin
from rgtg_fast.scorers import (
    AttentionCreditScorer,
    AutoregressiveScorer,
    RewardAdapter,
    RewardHead,
    VocabRewardScorer,
)

OPTIONS = {"k": 5, "beta": 2.0, "do_sample": True, "max_new_tokens": 5}


def guided(lm, rm, seed, **options):
    inputs = tiny.prompts(5, 9, seed=seed)
    options = {**inputs, **OPTIONS, "seed": seed} | options
    return rgtg_fast.generate(lm, reward_model=rm, **options)


def in_threads(works):
    """Runs the functions at once; raises what one of them raised."""
    errors, start = [], threading.Barrier(len(works))

    def run(work):
        try:
            start.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def repeated(lm, rm, seeds, wanted):
    def work():
        for seed in seeds:
            assert guided(lm, rm, seed).tolist() == wanted[seed]

    return work


def alone(lm, rm, seeds):
    return {seed: guided(lm, rm, seed).tolist() for seed in seeds}


@pytest.mark.parametrize(
    ("threads", "calls"), [(4, 5), pytest.param(8, 25, marks=pytest.mark.slow)]
)
def test_threads_on_one_pair(threads, calls):
    lm, rm = tiny.llama_lm(), tiny.llama_rm()
    wanted = alone(tiny.llama_lm(), tiny.llama_rm(), range(calls))
    before = snapshot(lm), snapshot(rm)
    in_threads([repeated(lm, rm, range(calls), wanted)] * threads)
    assert_unchanged(lm, before[0])
    assert_unchanged(rm, before[1])


def test_plain_forwards_beside_guided_calls():
    lm, rm = tiny.llama_lm(), tiny.llama_rm().train()
    wanted = alone(lm, rm, range(10))
    before = snapshot(lm), snapshot(rm)
    inputs = tiny.prompts(5, 9)
    answer = lm.generate(**inputs, do_sample=False, max_new_tokens=5)
    with torch.no_grad():
        logits = rm(**inputs).logits

    def plain():
        with torch.no_grad():
            for _ in range(10):
                got = lm.generate(**inputs, do_sample=False, max_new_tokens=5)
                assert torch.equal(got, answer)
                assert rm.training and torch.equal(rm(**inputs).logits, logits)

    in_threads([repeated(lm, rm, range(10), wanted)] * 4 + [plain] * 4)
    assert_unchanged(lm, before[0])
    assert_unchanged(rm, before[1])


def test_two_language_models_with_one_reward_model():
    lms, rm = [tiny.llama_lm(seed=1), tiny.llama_lm(seed=9)], tiny.gpt2_rm()
    wanted = [alone(lm, rm, range(6)) for lm in lms]
    works = [repeated(lm, rm, range(6), w) for lm, w in zip(lms, wanted, strict=True)]
    in_threads(works * 2)


def test_heads_on_one_language_model():
    lm = tiny.llama_lm()
    gen = torch.Generator().manual_seed(0)
    heads = [RewardHead(lm, torch.randn(32, generator=gen)) for _ in range(2)]
    heads.append(RewardHead(lm, torch.randn(32, generator=gen), layer=1))
    before = snapshot(lm)
    wanted = [alone(lm, head, range(6)) for head in heads]
    in_threads([repeated(lm, h, range(6), w) for h, w in zip(heads, wanted, strict=True)] * 2)
    assert_unchanged(lm, before)


def test_an_adapter_and_a_head_on_one_language_model(tmp_path):
    pytest.importorskip("peft")
    from lora_checkpoints import make_checkpoint

    _, lm = make_checkpoint(tmp_path)
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    width = lm.config.hidden_size
    head = RewardHead(lm, torch.randn(width, generator=torch.Generator().manual_seed(0)))
    before, inputs = snapshot(lm), zoo.left_pad(zoo.prompts())

    def answer(rewards, seed):
        options = {"k": 4, "max_new_tokens": 5, "do_sample": True, "seed": seed}
        return rgtg_fast.generate(lm, **inputs, reward_model=rewards, **options).tolist()

    wanted = {(r, seed): answer(r, seed) for r in (adapter, head) for seed in range(6)}

    def work(rewards):
        for seed in range(6):
            assert answer(rewards, seed) == wanted[rewards, seed]

    in_threads([functools.partial(work, rewards) for rewards in (adapter, head)] * 3)
    assert_unchanged(lm, before)


@pytest.mark.parametrize("positions", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_an_interrupt_anywhere_leaves_the_models_as_they_were(positions):
    lm, rm = tiny.llama_lm(), tiny.llama_rm().train()
    wanted = guided(lm, rm, 1).tolist()
    before = str(state(lm)), str(state(rm))
    lines = interrupted(lambda: guided(lm, rm, 1), 0)
    step = max(1, lines // positions)
    for at in range(1, lines + 1, step):
        interrupted(lambda: guided(lm, rm, 1), at)
        assert (str(state(lm)), str(state(rm))) == before, at
    assert guided(lm, rm, 1).tolist() == wanted


KINDS = ["fused", "masked", "expand", "reencode", "genarm", "farma", "credit", "joint", "holes"]
KINDS += ["whole model", "text"]


def reward_of(kind, lm):
    if kind == "genarm":
        return AutoregressiveScorer(tiny.llama_lm(seed=5)), {}
    if kind == "farma":
        return VocabRewardScorer(tiny.llama_lm(seed=5)), {}
    if kind == "joint":
        return RewardHead(lm, torch.randn(32, generator=torch.Generator().manual_seed(0))), {}
    rm = tiny.llama_rm()
    if kind == "credit":
        return AttentionCreditScorer(rm), {}
    if kind == "masked":
        return rm, {"backend": "reference"}
    if kind == "whole model":  # the language model by Hugging Face's own loop
        return rm, {"cache_implementation": "static"}
    if kind == "holes":
        mask = tiny.prompts(5, 9)["attention_mask"]
        mask[:, -2] = 0
        return rm, {"attention_mask": mask}
    if kind == "text":
        theirs = copy.deepcopy(tiny.tokenizer())
        theirs.add_tokens(["parcel"])
        rm.resize_token_embeddings(len(theirs))
        return rm, {"tokenizer": theirs, "reward_tokenizer": tiny.tokenizer()}
    return rm, {"reward_method": {"fused": "tree"}.get(kind, kind)}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_call_is_alive_after_it(kind, fails, monkeypatch):
    """Without Python's collector, which does not run where a GPU's memory is short."""
    lm = tiny.llama_lm()
    rm, options = reward_of(kind, lm)
    guided(lm, rm, 0, **options)  # probed
    made = []

    def noted(cls):
        init = cls.__init__

        def wrapper(self, *args, **kwargs):
            made.append(weakref.ref(self))
            init(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", wrapper)

    for cls in (twin.Twins, cache.Cache):
        noted(cls)

    def broken(input_ids, scores):
        if fails and input_ids.shape[1] == 12:
            raise RuntimeError("failed")
        return scores

    gc.collect()
    gc.disable()
    try:
        try:
            guided(lm, rm, 0, logits_processor=[broken], **options)
        except RuntimeError:
            assert fails
        assert len(made) > 1
        alive = [type(ref()).__name__ for ref in made if ref() is not None]
        assert not alive
    finally:
        gc.enable()
