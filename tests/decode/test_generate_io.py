"""Streams, caches, pipelines, adapters and `RewardGuided`: what surrounds the decoding loop."""

import threading

import pytest
import tiny
import torch
from calls import unguided
from transformers import (
    DynamicCache,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import rgtg_fast

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
DICT = {"return_dict_in_generate": True}


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        assert self.ends == 0 and value.device.type == "cpu"
        self.puts.append(value.tolist())

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("lengths", [(6,), (5, 9)], ids=["one row", "two rows"])
@pytest.mark.parametrize("stops", [False, True])
def test_streamer_gets_what_hugging_face_puts(lengths, stops, lm, rm):
    inputs = tiny.prompts(*lengths)
    options = dict(GREEDY)
    if stops:
        options["eos_token_id"] = int(lm.generate(**inputs, **GREEDY)[0, -4])
    theirs, ours = Recorder(), Recorder()
    lm.generate(**inputs, **options, streamer=theirs)
    unguided(lm, rm, **inputs, **options, streamer=ours)
    assert ours.puts == theirs.puts and ours.ends == theirs.ends == 1


def test_streamed_tokens_are_the_answer(lm, rm):
    inputs, streamer = tiny.prompts(6), Recorder()
    out = rgtg_fast.generate(
        lm,
        **inputs,
        reward_model=rm,
        beta=2.0,
        do_sample=True,
        max_new_tokens=NEW,
        streamer=streamer,
    )
    assert streamer.puts[0] == inputs["input_ids"].tolist()
    assert [token for put in streamer.puts[1:] for token in put] == out[0, 6:].tolist()


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamer(skip_prompt, lm, rm, capsys):
    inputs = tiny.prompts(6)
    texts = []
    for call in (lm.generate, lambda **kw: unguided(lm, rm, **kw)):
        call(**inputs, **GREEDY, streamer=TextStreamer(tiny.tokenizer(), skip_prompt=skip_prompt))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_text_iterator_streamer(lm, rm):
    inputs = tiny.prompts(6)
    streamer = TextIteratorStreamer(tiny.tokenizer(), skip_prompt=True, timeout=20)
    options = {**inputs, **GREEDY, "streamer": streamer}
    thread = threading.Thread(target=unguided, args=(lm, rm), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tiny.tokenizer().decode(lm.generate(**inputs, **GREEDY)[0, 6:])


def test_cache_comes_out_as_from_hugging_face(lm, rm):
    inputs = tiny.prompts(5, 9)
    theirs = lm.generate(**inputs, **GREEDY, **DICT).past_key_values
    ours = unguided(lm, rm, **inputs, **GREEDY, **DICT).past_key_values
    assert isinstance(ours, DynamicCache)
    assert ours.get_seq_length() == theirs.get_seq_length() == 9 + NEW - 1
    for mine, his in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, his.keys)
        torch.testing.assert_close(mine.values, his.values)


def test_no_cache_comes_out_without_use_cache(lm, rm):
    out = unguided(lm, rm, **tiny.prompts(5), **GREEDY, **DICT, use_cache=False)
    assert out.past_key_values is None


@pytest.mark.parametrize("lengths", [(6,), (5, 9)], ids=["one row", "padded rows"])
def test_second_turn_on_the_first_turns_cache(lengths, lm, rm):
    inputs = tiny.prompts(*lengths)
    turns = []
    for call in (lm.generate, lambda **kw: unguided(lm, rm, **kw)):
        first = call(**inputs, **GREEDY, **DICT)
        longer = torch.cat([first.sequences, tiny.prompts(*[3] * len(lengths))["input_ids"]], 1)
        mask = torch.ones_like(longer)
        mask[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
        second = call(
            input_ids=longer, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY
        )
        turns.append(second.tolist())
    assert turns[0] == turns[1]


def test_guided_second_turn_does_not_depend_on_the_cache(lm, rm):
    options = {"reward_model": rm, "beta": 2.0, **GREEDY}
    first = rgtg_fast.generate(lm, **tiny.prompts(6), **options, **DICT)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
    cached = rgtg_fast.generate(lm, longer, past_key_values=first.past_key_values, **options)
    assert cached.tolist() == rgtg_fast.generate(lm, longer, **options).tolist()


@pytest.mark.parametrize("make_cache", ["dynamic", "static"])
def test_cache_passed_in_is_the_one_extended(make_cache, lm, rm):
    inputs = tiny.prompts(5, 9)
    cache = (
        DynamicCache(config=lm.config)
        if make_cache == "dynamic"
        else StaticCache(config=lm.config, max_cache_len=32)
    )
    out = unguided(lm, rm, **inputs, **GREEDY, **DICT, past_key_values=cache)
    assert out.past_key_values is cache and int(cache.get_seq_length()) == 9 + NEW - 1
    assert out.sequences.tolist() == lm.generate(**inputs, **GREEDY).tolist()


def test_new_tokens_alone_on_a_cache_need_the_whole_prompt_for_the_reward(lm, rm):
    """Hugging Face takes only the new ids with a cache; the reward model has no such cache."""
    first = lm.generate(**tiny.prompts(6), **GREEDY, **DICT)
    new = torch.tensor([[7, 8, 9]])
    whole = torch.cat([first.sequences[:, :-1], new], 1)
    # The cache lacks the last token, which has not been fed to the model.
    options = {"attention_mask": torch.ones_like(whole), "past_key_values": first.past_key_values}
    with pytest.raises(ValueError, match="reward_input_ids"):
        rgtg_fast.generate(lm, new, reward_model=rm, **options, **GREEDY)
    out = rgtg_fast.generate(
        lm, new, reward_model=rm, beta=2.0, reward_input_ids=whole, **options, **GREEDY
    )
    expected = rgtg_fast.generate(lm, whole, reward_model=rm, beta=2.0, **GREEDY)
    assert out[:, 3:].tolist() == expected[:, whole.shape[1] :].tolist()


@pytest.mark.parametrize(
    "extra", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}]
)
def test_guided_answer_does_not_depend_on_the_kind_of_cache(extra, lm, rm):
    options = {**tiny.prompts(5, 9), "reward_model": rm, "beta": 2.0, **GREEDY}
    assert (
        rgtg_fast.generate(lm, **options, **extra).tolist()
        == rgtg_fast.generate(lm, **options).tolist()
    )


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": NEW},
        {"max_new_tokens": NEW, "do_sample": True, "top_p": 0.9, "temperature": 0.7},
        {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3},
        {"max_length": 14, "repetition_penalty": 1.4},
        {"max_new_tokens": NEW, "use_cache": False},
    ],
    ids=["greedy", "warpers", "three each", "penalty", "no cache"],
)
def test_reward_guided_is_generate(options, lm, rm):
    inputs = tiny.prompts(5, 9)
    own = {"k": 7, "beta": 1.5, "seed": 4}
    through_hf = lm.generate(**inputs, **options, custom_generate=rgtg_fast.RewardGuided(rm, **own))
    direct = rgtg_fast.generate(lm, **inputs, reward_model=rm, **own, **options)
    assert through_hf.tolist() == direct.tolist()


def test_reward_guided_returns_the_outputs_too(lm, rm):
    asked = {**tiny.prompts(5, 9), "max_new_tokens": NEW, **DICT, "output_scores": True}
    guide = rgtg_fast.RewardGuided(rm, k=5, output_candidates=True)
    out = lm.generate(**asked, do_sample=False, custom_generate=guide)
    same = rgtg_fast.generate(
        lm, **asked, do_sample=False, reward_model=rm, k=5, output_candidates=True
    )
    assert isinstance(out, rgtg_fast.RewardGuidedOutput)
    assert torch.equal(out.sequences, same.sequences)
    assert torch.equal(out.candidate_rewards, same.candidate_rewards)
    assert torch.equal(torch.stack(out.scores), torch.stack(same.scores))


def test_reward_guided_is_reusable(lm, rm):
    guide = rgtg_fast.RewardGuided(rm, beta=2.0)
    first, again = (
        lm.generate(**tiny.prompts(5, 9), **GREEDY, custom_generate=guide) for _ in "ab"
    )
    assert first.tolist() == again.tolist()
    new = rgtg_fast.RewardGuided(rm, beta=2.0)
    other, same = (
        tiny.gpt2_lm().generate(**tiny.prompts(4, 3, 6), **GREEDY, custom_generate=either)
        for either in (guide, new)
    )
    assert other.tolist() == same.tolist()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline(batch_size, lm, rm):
    pipe = pipeline("text-generation", model=lm, tokenizer=tiny.tokenizer(), device="cpu")
    texts = ["hello world", "please wait while we check the order", "thank you"]
    unguided = rgtg_fast.RewardGuided(rm, beta=0.0)
    expected = pipe(texts, batch_size=batch_size, **GREEDY)
    assert pipe(texts, batch_size=batch_size, **GREEDY, custom_generate=unguided) == expected
    guided = rgtg_fast.RewardGuided(rm, beta=6.0)
    assert pipe(texts, batch_size=batch_size, **GREEDY, custom_generate=guided) != expected


def with_adapter(model, task, seed=0):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    return model


def test_peft_language_model(lm, rm):
    inputs = tiny.prompts(5, 9)
    tuned = with_adapter(tiny.llama_lm(), "CAUSAL_LM")
    expected = tuned.generate(**inputs, **GREEDY)
    assert expected.tolist() != lm.generate(**inputs, **GREEDY).tolist()
    assert unguided(tuned, rm, **inputs, **GREEDY).tolist() == expected.tolist()
    guide = rgtg_fast.RewardGuided(rm, beta=0.0)
    assert tuned.generate(**inputs, **GREEDY, custom_generate=guide).tolist() == expected.tolist()


@pytest.mark.parametrize("method", ["auto", "reencode"])
def test_peft_reward_model(method, lm):
    inputs = tiny.prompts(9, 9)
    tuned = with_adapter(tiny.llama_rm(), "SEQ_CLS")
    out = rgtg_fast.generate(
        lm, **inputs, reward_model=tuned, reward_method=method, **GREEDY, **DICT
    )
    with torch.no_grad():
        expected = tuned(input_ids=out.sequences).logits[:, 0]
    torch.testing.assert_close(out.rewards[:, -1], expected, rtol=1e-4, atol=2e-4)


def test_reward_model_made_by_hand(lm):
    """Anything with prefill, score and commit is a reward model: here one token is adored."""
    weights = torch.zeros(tiny.vocab_size())
    inputs = tiny.prompts(5, 9)
    top = rgtg_fast.generate(
        lm,
        **inputs,
        reward_model=tiny.CountingScorer(weights),
        **GREEDY,
        **DICT,
        output_candidates=True,
    )
    loved = int(top.candidate_ids[0, 0, 4])
    weights[loved] = 100.0
    scorer = tiny.CountingScorer(weights)
    out = rgtg_fast.generate(lm, **inputs, reward_model=scorer, **GREEDY)
    assert out[0, 9] == loved
    assert scorer.prefills == 1 and scorer.steps == NEW
    assert scorer.committed[0][0] == 4
