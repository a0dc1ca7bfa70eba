"""torch's default dtype, autocast and inference mode around a guided call."""

import contextlib

import pytest
import tiny
import torch

import rgtg_fast
from rgtg_fast.scorers import make_scorer


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
}


def guided(lm, rm, **options):
    options = {**tiny.prompts(5, 9), "k": 5, "beta": 2.0, "max_new_tokens": 6} | options
    return rgtg_fast.generate(lm, reward_model=rm, **options)


@pytest.mark.parametrize("make", [tiny.llama_rm, tiny.gpt2_rm])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", ["auto", "expand", "reencode"])
def test_tokens_are_those_without_the_setting(setting, method, make):
    wanted = guided(tiny.llama_lm(), make(), reward_method=method)
    lm, rm, inputs = tiny.llama_lm(), make(), tiny.prompts(5, 9)
    with SETTINGS[setting]():
        if method == "auto":
            scorer = make_scorer(rm, k=5)
            assert (scorer.method, scorer.fused) == ("tree", True)
        got = guided(lm, rm, reward_method=method, **inputs)
    assert torch.equal(got, wanted)
    assert torch.equal(guided(lm, rm, reward_method=method), wanted)


@pytest.mark.parametrize("make", [tiny.llama_rm, tiny.gpt2_rm])
def test_autocast_keeps_the_tree_and_gives_what_full_forwards_give(make):
    lm, rm = tiny.llama_lm(), make()
    options = {"output_candidates": True, "return_dict_in_generate": True}
    with torch.autocast("cpu", torch.bfloat16):
        scorer = make_scorer(rm, k=5)
        assert (scorer.method, scorer.fused) == ("tree", True)
        got = guided(lm, rm, **options)
    error = noise = 0.0
    for row, length in enumerate((5, 9)):
        ids = got.sequences[row, 9 - length :]
        for step in range(got.rewards.shape[1]):
            candidates = got.candidate_ids[row, step][:, None]
            texts = torch.cat([ids[: length + step].expand(5, -1), candidates], dim=1)
            exact = tiny.full_reward(rm, texts)
            with torch.autocast("cpu", torch.bfloat16):
                want = tiny.full_reward(rm, texts)
            error = max(error, float((got.candidate_rewards[row, step] - want).abs().max()))
            noise = max(noise, float((exact - want).abs().max()))
    assert error <= 2 * noise  # as far as autocast itself moves the rewards
    assert make_scorer(rm, k=5).fused
    torch.testing.assert_close(guided(lm, rm), guided(tiny.llama_lm(), make()))


def test_an_error_in_one_call_is_no_verdict_of_the_model(monkeypatch):
    rm = tiny.llama_rm()
    layer = type(rm.model.layers[1])

    def fail(self, *args, **kwargs):
        raise RuntimeError("not now")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError), pytest.warns(UserWarning):
        patched.setattr(layer, "forward", fail)
        guided(tiny.llama_lm(), rm)
    assert make_scorer(rm, k=5).fused
