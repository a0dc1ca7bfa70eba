"""Rows and the record of their steps are buffers that grow: their first room is no limit."""

import pytest
import tiny
import torch

import rgtg_fast
from rgtg_fast.decode import loop

COLUMNS = ("rewards", "kl", "candidates_scored", "candidate_ids", "candidate_rewards")


def guided(**options):
    common = {"k": 5, "beta": 2.0, "max_new_tokens": 23, "do_sample": True, "seed": 4}
    common |= {"eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD, **tiny.prompts(5, 9, 3)}
    common["speculate"] = False  # which takes positions together by the clock
    return rgtg_fast.generate(tiny.llama_lm(), reward_model=tiny.gpt2_rm(), **(common | options))


@pytest.mark.parametrize("room", [1, 2, 7, 23])
def test_a_small_room_changes_no_answer(monkeypatch, room):
    want = guided()
    monkeypatch.setattr(loop, "ROOM", room)
    assert torch.equal(guided(), want)


@pytest.mark.parametrize("room", [1, 7])
def test_a_small_room_loses_nothing_of_the_record(monkeypatch, room):
    options = {"return_dict_in_generate": True, "output_candidates": True}
    want = guided(**options)
    monkeypatch.setattr(loop, "ROOM", room)
    got = guided(**options)
    assert torch.equal(got.sequences, want.sequences)
    for name in COLUMNS:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)
