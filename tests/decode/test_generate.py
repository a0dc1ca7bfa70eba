"""With beta=0 and no sampling, guided generation must be `model.generate`, option for option.

beta=0 takes the reward out of s = log pi + beta r, so the argmax over the candidates is the argmax
of the processed LM scores, and Hugging Face's own output is the oracle for every option.
"""

import pytest
import tiny
import torch
from calls import unguided
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

import rgtg_fast

NEW = 10


@pytest.fixture(scope="module")
def gpt2():
    return tiny.gpt2_lm()


def greedy_tokens(model, inputs, new=NEW):
    """What the model says without any option, [B, new]."""
    out = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :]


class AddToToken(LogitsProcessor):
    def __init__(self, token, amount):
        self.token, self.amount = token, amount

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] += self.amount
        return scores


class StopAtToken(StoppingCriteria):
    """Stops each row on its own at a token that is no EOS token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def said(step, row=0):
    """A token the plain greedy answer has at that step: options that touch it must change it."""
    return lambda tokens: int(tokens[row, step])


OPTIONS = {
    "max_length": lambda t: {"max_length": 12},
    "default_length": lambda t: {"max_new_tokens": None},
    "min_length": lambda t: {"eos_token_id": said(2)(t), "min_length": 12},
    "min_new_tokens": lambda t: {"eos_token_id": said(2)(t), "min_new_tokens": 6},
    "eos": lambda t: {"eos_token_id": said(3)(t)},
    "eos_list": lambda t: {"eos_token_id": [said(3)(t), said(5, row=1)(t)]},
    "pad_is_eos": lambda t: {"eos_token_id": said(3)(t), "pad_token_id": said(3)(t)},
    "repetition_penalty": lambda t: {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": lambda t: {"encoder_repetition_penalty": 12.0},
    "no_repeat_ngram": lambda t: {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram": lambda t: {
        "encoder_repetition_penalty": 12.0,
        "encoder_no_repeat_ngram_size": 1,
        "repetition_penalty": 1.3,
    },
    "bad_words": lambda t: {"bad_words_ids": [[said(0)(t)], [said(1)(t), said(2)(t)]]},
    "sequence_bias": lambda t: {"sequence_bias": [[[said(1)(t)], -20.0], [[7], 4.0]]},
    "suppress_tokens": lambda t: {"suppress_tokens": [said(0)(t), said(4)(t)]},
    "begin_suppress_tokens": lambda t: {"begin_suppress_tokens": [said(0)(t)]},
    "forced_eos": lambda t: {"forced_eos_token_id": tiny.EOS},
    "length_penalty": lambda t: {"exponential_decay_length_penalty": (2, 3.0)},
    "renormalize": lambda t: {"renormalize_logits": True, "repetition_penalty": 1.3},
    "remove_invalid_values": lambda t: {"remove_invalid_values": True},
    "prefix_allowed_tokens": lambda t: {
        "prefix_allowed_tokens_fn": lambda row, ids: [5 + len(ids) % 3, 9, 11 + row]
    },
    "custom_processor": lambda t: {"logits_processor": [AddToToken(33, 12.0)]},
    "two_processors_in_order": lambda t: {
        "logits_processor": LogitsProcessorList(
            [AddToToken(said(0)(t), -float("inf")), AddToToken(40, 3.0)]
        ),
        "no_repeat_ngram_size": 1,
    },
    "guidance_scale": lambda t: {"guidance_scale": 1.7},
    "no_cache": lambda t: {"use_cache": False},
    "static_cache": lambda t: {"cache_implementation": "static"},
    "dynamic_cache": lambda t: {"cache_implementation": "dynamic"},
    "prefill_chunks": lambda t: {"prefill_chunk_size": 4},
    "custom_stop": lambda t: {"stopping_criteria": [StopAtToken(said(4)(t))]},
    "stop_list_class": lambda t: {
        "stopping_criteria": StoppingCriteriaList([StopAtToken(said(2, row=1)(t))]),
        "eos_token_id": said(6)(t),
    },
    "max_time_spent": lambda t: {"max_time": 0.0},
    "time_criterion": lambda t: {"stopping_criteria": [MaxTimeCriteria(max_time=0.0)]},
    "synced_gpus_off": lambda t: {"synced_gpus": False},
    "watermark": lambda t: {"watermarking_config": {"bias": 4.0, "seeding_scheme": "selfhash"}},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_option_equals_hugging_face(option, which, lm, gpt2, rm):
    model = {"llama": lm, "gpt2": gpt2}[which]
    inputs = tiny.prompts(5, 9)
    options = {"max_new_tokens": NEW, "do_sample": False}
    options |= OPTIONS[option](greedy_tokens(model, inputs))
    if options["max_new_tokens"] is None or "max_length" in options:
        del options["max_new_tokens"]
    expected = model.generate(**inputs, **options)
    torch.testing.assert_close(unguided(model, rm, **inputs, **options), expected, rtol=0, atol=0)


def test_options_of_this_file_change_the_answer(lm):
    """The oracle is only worth something where the option does something."""
    inputs = tiny.prompts(5, 9)
    plain = greedy_tokens(lm, inputs)
    inert = {"dynamic_cache", "static_cache", "no_cache", "prefill_chunks", "remove_invalid_values"}
    inert |= {"synced_gpus_off"}
    for name, make in OPTIONS.items():
        options = {"max_new_tokens": NEW, "do_sample": False} | make(plain)
        if options["max_new_tokens"] is None or "max_length" in options:
            del options["max_new_tokens"]
        answer = lm.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        assert (answer.tolist() == plain.tolist()) == (name in inert), name


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_synced_gpus(lm, rm, one_process_group):
    inputs = tiny.prompts(5, 9)
    options = {"max_new_tokens": NEW, "do_sample": False, "synced_gpus": True}
    options["eos_token_id"] = [int(t) for t in greedy_tokens(lm, inputs)[:, 3]]
    expected = lm.generate(**inputs, **options)
    assert unguided(lm, rm, **inputs, **options).tolist() == expected.tolist()


def test_finished_rows_get_padding(lm, rm):
    inputs = tiny.prompts(5, 9)
    tokens = greedy_tokens(lm, inputs)
    stop = int(tokens[0, 2])
    assert stop not in tokens[1]
    out = unguided(lm, rm, **inputs, max_new_tokens=NEW, eos_token_id=stop)[:, 9:]
    assert out[0].tolist() == tokens[0, :3].tolist() + [tiny.PAD] * (NEW - 3)
    assert out[1].tolist() == tokens[1].tolist()


def test_rows_stopped_without_eos_go_on_until_all_have_stopped(rm):
    """Hugging Face pads a stopped row only where there is an EOS token."""
    lm = tiny.llama_lm()
    lm.generation_config.eos_token_id = None
    inputs = tiny.prompts(5, 9)
    stop = [StopAtToken(int(greedy_tokens(lm, inputs)[0, 2]))]
    options = {"max_new_tokens": NEW, "do_sample": False, "stopping_criteria": stop}
    expected = lm.generate(**inputs, **options)
    assert tiny.PAD not in expected[0, 9:]
    assert unguided(lm, rm, **inputs, **options).tolist() == expected.tolist()


def test_loop_ends_when_every_row_has_ended(lm, rm):
    inputs = tiny.prompts(5, 9)
    tokens = greedy_tokens(lm, inputs)
    options = {"max_new_tokens": NEW, "eos_token_id": [int(t) for t in tokens[:, 3]]}
    out = unguided(lm, rm, **inputs, **options)
    assert out.shape[1] == 9 + 4
    assert out.tolist() == lm.generate(**inputs, **options, do_sample=False).tolist()


def test_forced_bos_after_one_token_prompt(lm, rm):
    options = {"max_new_tokens": 4, "forced_bos_token_id": tiny.BOS, "do_sample": False}
    ids = torch.tensor([[17], [31]])
    assert unguided(lm, rm, ids, **options).tolist() == lm.generate(ids, **options).tolist()


def test_negative_prompt(lm, rm):
    options = {
        "guidance_scale": 2.0,
        "negative_prompt_ids": torch.tensor([[5, 6, 7]]),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    ids = tiny.prompts(6)["input_ids"]
    assert unguided(lm, rm, ids, **options).tolist() == lm.generate(ids, **options).tolist()


def stop_text(lm, inputs):
    """A printable token that row 0 of the greedy answer has, and row 1 has not."""
    tok = tiny.tokenizer()
    first, second = (tok.batch_decode(row) for row in greedy_tokens(lm, inputs)[..., None])
    return next(text for text in first if text.isascii() and text.strip() and text not in second)


@pytest.mark.parametrize("where", ["keyword", "string", "config object", "model", "model, config"])
def test_stop_strings(where, rm):
    """Hugging Face drops the tokenizer for custom decoding loops; here it must arrive."""
    lm = tiny.llama_lm()
    inputs = tiny.prompts(5, 9)
    text = stop_text(lm, inputs)
    options = {"do_sample": False, "max_new_tokens": NEW}
    if where == "keyword":
        options["stop_strings"] = [text, "never said"]
    elif where == "string":
        options["stop_strings"] = text
    elif where == "config object":
        options = {"generation_config": GenerationConfig(**options, stop_strings=[text])}
    else:
        lm.generation_config.stop_strings = [text]
        if "config" in where:
            options = {"generation_config": GenerationConfig(**options)}
    expected = lm.generate(**inputs, **options, tokenizer=tiny.tokenizer())
    assert tiny.PAD in expected[0, 9:] and tiny.PAD not in expected[1, 9:]
    out = unguided(lm, rm, **inputs, **options, tokenizer=tiny.tokenizer())
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "pass_inputs",
    [
        lambda ids, mask: ((ids,), {"attention_mask": mask}),
        lambda ids, mask: ((), {"inputs": ids, "attention_mask": mask}),
        lambda ids, mask: ((), {"input_ids": ids, "attention_mask": mask}),
        lambda ids, mask: ((), {"input_ids": ids, "attention_mask": mask.bool()}),
        lambda ids, mask: ((ids,), {}),
        lambda ids, mask: ((ids[1:],), {}),
    ],
    ids=["positional", "inputs", "input_ids", "bool_mask", "mask_from_padding", "no_padding"],
)
def test_ways_to_pass_the_prompt(pass_inputs, lm, rm):
    inputs = tiny.prompts(5, 9)
    args, kwargs = pass_inputs(inputs["input_ids"], inputs["attention_mask"])
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = lm.generate(*args, **kwargs, **options)
    assert unguided(lm, rm, *args, **kwargs, **options).tolist() == expected.tolist()


def test_tokenizer_output_passes_straight_in(lm, rm):
    tok = tiny.tokenizer()
    inputs = tok(["hello world", "please wait while we check"], return_tensors="pt", padding=True)
    expected = lm.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert unguided(lm, rm, **inputs, max_new_tokens=6).tolist() == expected.tolist()


def test_greedy_is_the_default(lm, rm):
    inputs = tiny.prompts(5, 9)
    first, second = (
        rgtg_fast.generate(lm, **inputs, reward_model=rm, max_new_tokens=6) for _ in range(2)
    )
    assert first.tolist() == second.tolist()


def test_generation_config_object(lm, rm):
    inputs = tiny.prompts(5, 9)
    config = GenerationConfig(
        max_new_tokens=7, no_repeat_ngram_size=1, do_sample=False, pad_token_id=5, eos_token_id=80
    )
    expected = lm.generate(**inputs, generation_config=config)
    out = unguided(lm, rm, **inputs, generation_config=config)
    assert out.tolist() == expected.tolist()


def test_model_generation_config_is_the_default(rm):
    lm = tiny.llama_lm()
    lm.generation_config.max_new_tokens = 5
    lm.generation_config.repetition_penalty = 1.8
    inputs = tiny.prompts(5, 9)
    expected = lm.generate(**inputs)
    assert expected.shape[1] == 14
    assert unguided(lm, rm, **inputs).tolist() == expected.tolist()


def test_keyword_wins_over_generation_config(lm, rm):
    config = GenerationConfig(max_new_tokens=7)
    out = unguided(lm, rm, **tiny.prompts(5), generation_config=config, max_new_tokens=3)
    assert out.tolist() == lm.generate(**tiny.prompts(5), max_new_tokens=3).tolist()
    assert out.shape[1] == 8


def test_bf16_model(rm):
    """The own cache rounds elsewhere than Hugging Face's attention, which its own loop repeats."""
    lm = tiny.llama_lm().bfloat16()
    inputs = tiny.prompts(5, 9)
    expected = lm.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    options = {"max_new_tokens": NEW, "cache_implementation": "dynamic"}
    assert unguided(lm, rm, **inputs, **options).tolist() == expected.tolist()
    own = unguided(lm, rm, **inputs, max_new_tokens=NEW)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    logits = lm.float()(own, attention_mask=mask, position_ids=mask.cumsum(-1) - 1).logits
    behind = logits.max(-1).values[:, 8:-1] - logits[:, 8:-1].gather(2, own[:, 9:, None])[..., 0]
    assert behind.max() < 0.03 * logits.std()


def test_k_equal_to_the_vocabulary():
    lm, rm = tiny.llama_lm(vocab_size=32), tiny.llama_rm(vocab_size=32)
    ids = torch.tensor([[5, 9, 30], [7, 3, 4]])
    out = unguided(lm, rm, ids, k=32, max_new_tokens=6)
    assert out.tolist() == lm.generate(ids, max_new_tokens=6, do_sample=False).tolist()


def test_hole_in_the_attention_mask(lm, rm):
    """A masked token inside the prompt is seen by neither model."""
    inputs = tiny.prompts(9, 9)
    inputs["attention_mask"][0, 4:6] = 0
    expected = lm.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert unguided(lm, rm, **inputs, max_new_tokens=NEW).tolist() == expected.tolist()
    out = unguided(lm, rm, **inputs, max_new_tokens=NEW, return_dict_in_generate=True)
    seen = torch.cat([inputs["attention_mask"][0], torch.ones(NEW, dtype=torch.int64)]).bool()
    reward = tiny.full_reward(rm, out.sequences[:1, seen])
    torch.testing.assert_close(out.rewards[0, -1:], reward, rtol=1e-4, atol=2e-4)


def test_k_one_is_the_model_alone_at_any_beta(lm, rm):
    inputs = tiny.prompts(5, 9)
    out = rgtg_fast.generate(lm, **inputs, reward_model=rm, k=1, beta=50.0, max_new_tokens=NEW)
    assert out[:, 9:].tolist() == greedy_tokens(lm, inputs).tolist()


def test_forbidden_token_never_becomes_a_candidate(lm, rm):
    inputs = tiny.prompts(5, 9)
    banned = int(greedy_tokens(lm, inputs)[0, 0])
    out = rgtg_fast.generate(
        lm,
        **inputs,
        reward_model=rm,
        beta=2.0,
        max_new_tokens=4,
        suppress_tokens=[banned],
        return_dict_in_generate=True,
        output_candidates=True,
    )
    live = out.candidate_ids[torch.isfinite(out.candidate_logprobs)]
    assert banned not in live and banned not in out.sequences[:, 9:]


def test_one_allowed_token_is_taken_whatever_its_reward(lm, rm):
    out = rgtg_fast.generate(
        lm,
        **tiny.prompts(5, 9),
        reward_model=rm,
        beta=-30.0,
        max_new_tokens=4,
        prefix_allowed_tokens_fn=lambda row, ids: [20 + row],
    )
    assert out[:, 9:].tolist() == [[20] * 4, [21] * 4]
