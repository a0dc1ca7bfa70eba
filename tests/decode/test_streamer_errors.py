"""A failing call ends its streamer, and a streamer can be an option of RewardGuided."""

import threading

import numpy as np
import pytest
import tiny
import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import rgtg_fast


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ends += 1


@pytest.fixture(scope="module")
def models():
    return tiny.llama_lm(), tiny.llama_rm()


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


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_streamer_given_to_model_generate_gets_what_it_gets_there(models, do_sample):
    lm, rm = models
    inputs = {"input_ids": torch.arange(5, 11)[None], "max_new_tokens": 6}
    plain, guided = Recorder(), Recorder()
    lm.generate(**inputs, do_sample=False, streamer=plain)
    guide = rgtg_fast.RewardGuided(rm, k=4, seed=1, beta=2.0)
    options = {"do_sample": do_sample, "streamer": guided}
    out = lm.generate(**inputs, custom_generate=guide, **options)
    assert [p.shape for p in guided.puts] == [p.shape for p in plain.puts]
    assert guided.puts[0].tolist() == inputs["input_ids"].tolist()
    assert torch.cat(guided.puts[1:]).tolist() == out[0, 6:].tolist()
    assert guided.ends == 1


def test_a_reader_of_model_generates_streamer_comes_to_the_end(models):
    lm, rm = models
    streamer = TextIteratorStreamer(tiny.tokenizer(), skip_prompt=True, timeout=60)
    inputs = {"input_ids": torch.arange(5, 11)[None], "max_new_tokens": 6, "do_sample": False}
    guide = rgtg_fast.RewardGuided(rm, k=4)
    options = {"custom_generate": guide, "streamer": streamer}
    thread = threading.Thread(target=lm.generate, kwargs=inputs | options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    want = lm.generate(**inputs, custom_generate=guide)
    assert text == tiny.tokenizer().decode(want[0, 6:])


def test_a_streamer_reaches_a_guide_behind_a_callable_and_an_adapter(models):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    lm, rm = peft.get_peft_model(tiny.llama_lm(), config).eval(), models[1]
    guide, streamer = rgtg_fast.RewardGuided(rm, k=4), Recorder()
    lm.generate(
        input_ids=torch.ones(1, 5).long(),
        custom_generate=lambda model, *args, **options: guide(model, *args, **options),
        max_new_tokens=4,
        streamer=streamer,
    )
    assert len(streamer.puts) == 5 and streamer.ends == 1


@pytest.mark.parametrize("options", [{"k": 60}, {"reward_head": failing_head}])
def test_an_error_under_model_generate_ends_its_streamer_once(models, options):
    lm, rm = tiny.llama_lm(vocab_size=40), tiny.llama_rm(vocab_size=40)
    guide, streamer = rgtg_fast.RewardGuided(rm, **options), Recorder()
    with pytest.raises(ValueError, match=r"k=60|gave"):
        lm.generate(
            input_ids=torch.ones(1, 5).long(),
            custom_generate=guide,
            max_new_tokens=4,
            streamer=streamer,
        )
    assert streamer.ends == 1


def test_two_streamers_are_an_error_that_ends_both(models):
    lm, rm = models
    own, given = Recorder(), Recorder()
    guide = rgtg_fast.RewardGuided(rm, streamer=own)
    ids = torch.ones(1, 5).long()
    with pytest.raises(ValueError, match=r"to model\.generate and to RewardGuided"):
        lm.generate(ids, custom_generate=guide, max_new_tokens=4, streamer=given)
    assert own.ends == given.ends == 1


def test_what_is_no_streamer_is_refused(models):
    lm, rm = models
    ids = torch.ones(1, 5).long()
    with pytest.raises(ValueError, match="streamer must be"):
        rgtg_fast.generate(lm, ids, reward_model=rm, max_new_tokens=4, streamer="out")


@pytest.mark.parametrize("beta", [np.float32(2.0), torch.tensor(2.0), 2])
def test_scalars_of_other_kinds_are_numbers(lm, rm, beta):
    ids = torch.ones(2, 5).long()
    want = rgtg_fast.generate(lm, input_ids=ids, reward_model=rm, beta=2.0, max_new_tokens=4)
    got = rgtg_fast.generate(lm, input_ids=ids, reward_model=rm, beta=beta, max_new_tokens=4)
    assert torch.equal(got, want)
