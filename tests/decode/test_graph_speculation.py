"""Rounds of speculation whose forwards are replayed from CUDA graphs (emulated, see
graph_emulated.py): the tokens of rounds without a graph, bit for bit."""

import gc
import warnings
import weakref

import pytest
import tiny
import torch
import zoo
from graph_emulated import install

import rgtg_fast
from rgtg_fast.decode import ahead, graphs
from rgtg_fast.models.cache import SiblingCache

NEW = 40


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    return install(monkeypatch)


def answers(cuda_graph, lm="llama", rm="llama", lengths=(7,), **options):
    lm, rm = (zoo.lm(lm), zoo.rm(rm)) if isinstance(lm, str) else (lm, rm)
    ahead._learnt.clear()  # or the second call would draft better than the first
    common = {**zoo.left_pad(zoo.prompts(lengths=lengths)), "k": 4, "max_new_tokens": NEW}
    common |= {"check_nan": False, "seed": 5, "top_k": 0, "beta": 0.3, "speculate": 4}
    common |= {"do_sample": True, "return_dict_in_generate": True, "cuda_graph": cuda_graph}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(cuda_graph|CUDA graph).*")
        return rgtg_fast.generate(lm, reward_model=rm, **(common | options))


def assert_same(cuda, captures=2, **options):
    want = answers(False, **options)
    assert not cuda.captures
    got = answers(True, **options)
    assert len(cuda.captures) == captures and cuda.replays > NEW // 4
    assert torch.equal(got.sequences, want.sequences)
    for name in ("rewards", "kl"):
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)
    assert got.speculation == want.speculation


@pytest.mark.parametrize("lengths", [(7,), (9, 2, 14)], ids=["one row", "three rows"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mistral"])
def test_rounds_are_replayed(cuda, family, lengths):
    """One graph of the language model's row, one of the comb."""
    assert_same(cuda, lm=family, rm=family, lengths=lengths)


def test_rows_that_end_and_leave_move_the_tensors(cuda):
    options = {"sequence_bias": None, "eos_token_id": zoo.EOS, "pad_token_id": zoo.PAD}
    options |= {"suppress_tokens": list(range(30, 37)), "eos_reward": "previous"}
    assert_same(cuda, lengths=(9, 2, 14, 5), **options, captures=2)


def test_rewards_in_a_range_and_one_candidate(cuda):
    assert_same(cuda, reward_range=(-0.5, 0.5), prune=False)


def test_an_assistant_beside_the_graphs(cuda):
    want = answers(False, assistant_model=zoo.lm("llama"))
    got = answers(True, assistant_model=zoo.lm("llama"))
    assert torch.equal(got.sequences, want.sequences) and cuda.replays > 0


def test_rewards_on_the_language_models_forward_run_without(cuda):
    lm = tiny.llama_lm()
    weight = torch.randn(lm.config.hidden_size, generator=torch.Generator().manual_seed(0))
    head = rgtg_fast.RewardHead(lm, weight)
    want, got = (answers(how, lm=lm, rm=head) for how in (False, True))
    assert torch.equal(got.sequences, want.sequences) and not cuda.captures


def test_nothing_of_a_call_outlives_it(cuda, monkeypatch):
    caches, init = [], SiblingCache.__init__

    def noted(self, *args, **kwargs):
        caches.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(SiblingCache, "__init__", noted)
    answers(True, return_dict_in_generate=False)  # probed
    caches.clear()
    gc.collect()
    gc.disable()
    try:
        answers(True, return_dict_in_generate=False)
        assert caches and all(cache() is None for cache in caches)
    finally:
        gc.enable()


def test_steps_too_few_for_a_capture_are_not_captured(cuda):
    want, got = (answers(how, max_new_tokens=6) for how in (False, True))
    assert torch.equal(got.sequences, want.sequences)
    assert len(cuda.captures) <= 2 and graphs.WORTH == 16
