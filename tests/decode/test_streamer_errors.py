"""A failing call ends its streamer, and a streamer can be an option of RewardGuided."""

import numpy as np
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import rgtg_fast


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ends += 1


def failing_head(hidden):
    return torch.full(hidden.shape[:-1], torch.nan)


@pytest.mark.parametrize("options", [{"k": 0}, {"num_beams": 2}, {"reward_head": failing_head}])
def test_an_error_ends_the_streamer_once(lm, rm, options):
    streamer = Recorder()
    with pytest.raises(ValueError):
        rgtg_fast.generate(
            lm,
            input_ids=torch.ones(1, 5).long(),
            reward_model=rm,
            max_new_tokens=4,
            streamer=streamer,
            **options,
        )
    assert streamer.ends == 1


def test_reward_guided_takes_a_streamer_of_its_own(lm, rm):
    ids = torch.ones(1, 5).long()
    streamer = Recorder()
    guide = rgtg_fast.RewardGuided(rm, k=4, streamer=streamer)
    out = lm.generate(input_ids=ids, custom_generate=guide, max_new_tokens=4)
    assert torch.equal(streamer.puts[0], ids)
    assert torch.equal(torch.cat(streamer.puts[1:]), out[0, 5:])
    assert streamer.ends == 1


@pytest.mark.parametrize("beta", [np.float32(2.0), torch.tensor(2.0), 2])
def test_scalars_of_other_kinds_are_numbers(lm, rm, beta):
    ids = torch.ones(2, 5).long()
    want = rgtg_fast.generate(lm, input_ids=ids, reward_model=rm, beta=2.0, max_new_tokens=4)
    got = rgtg_fast.generate(lm, input_ids=ids, reward_model=rm, beta=beta, max_new_tokens=4)
    assert torch.equal(got, want)
