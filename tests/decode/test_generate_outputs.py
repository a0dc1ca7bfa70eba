"""What `rgtg_fast.generate` returns with `return_dict_in_generate=True`."""

import functools

import pytest
import tiny
import torch
from calls import guided as call
from transformers.generation import GenerateDecoderOnlyOutput

import rgtg_fast

NEW, K = 8, 6
ALL = {"return_dict_in_generate": True, "output_candidates": True, "output_scores": True}
guided = functools.partial(call, k=K, beta=0.8, max_new_tokens=NEW, **ALL)


def answers(out, inputs):
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def seen_by_rm(inputs, row, answer):
    """The row's prompt without padding, then the answer, [1, n]."""
    prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    return torch.cat([prompt, answer])[None]


def nested_shapes(outputs):
    return [[tuple(layer.shape) for layer in step] for step in outputs]


def test_type_and_order(lm, rm):
    out = guided(lm, rm, **tiny.prompts(5, 9))
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert isinstance(out, rgtg_fast.RewardGuidedOutput)
    assert out[0] is out.sequences


@pytest.mark.parametrize("name", ["scores", "logits"])
@pytest.mark.parametrize("cache", [None, "dynamic"])
def test_per_step_tensors_equal_hugging_face(name, cache, lm, rm):
    inputs = tiny.prompts(5, 9)
    options = {
        "do_sample": False,
        "repetition_penalty": 1.4,
        "max_new_tokens": NEW,
        "return_dict_in_generate": True,
        "output_" + name: True,
    }
    expected = getattr(lm.generate(**inputs, **options), name)
    got = getattr(guided(lm, rm, **inputs, beta=0.0, cache_implementation=cache, **options), name)
    assert isinstance(got, tuple) and len(got) == NEW
    error = {} if cache else {"atol": 1e-4, "rtol": 0.0}  # the own cache sums in another order
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **error)


@pytest.mark.parametrize("name", ["scores", "logits"])
@pytest.mark.parametrize("cache", [None, "dynamic"])
def test_per_step_tensors_of_a_bf16_model_are_fp32(name, cache, rm):
    lm, inputs = tiny.llama_lm().bfloat16(), tiny.prompts(5, 9)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_" + name: True}
    expected = getattr(lm.generate(**inputs, do_sample=False, **options), name)
    ours = {"output_scores": False, "cache_implementation": cache} | options
    got = getattr(guided(lm, rm, **inputs, beta=0.0, **ours), name)
    exact = getattr(lm.float().generate(**inputs, do_sample=False, **options), name)
    for ours, theirs, truth in zip(got, expected, exact, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        if cache:
            torch.testing.assert_close(ours, theirs)
        else:  # as good as Hugging Face's own rounding
            assert (ours - truth).abs().max() < 1.5 * (theirs - truth).abs().max()


@pytest.mark.parametrize("name", ["hidden_states", "attentions"])
@pytest.mark.parametrize("extra", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_model_internals_equal_hugging_face(name, extra, rm):
    lm = tiny.llama_lm()
    lm.set_attn_implementation("eager")
    inputs = tiny.prompts(5, 9)
    options = {
        "do_sample": False,
        "max_new_tokens": 4,
        "return_dict_in_generate": True,
        "output_" + name: True,
    } | extra
    expected = getattr(lm.generate(**inputs, **options), name)
    got = getattr(guided(lm, rm, **inputs, beta=0.0, **options), name)
    assert nested_shapes(got) == nested_shapes(expected)
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip(got, expected, strict=True):
        for mine, his in zip(ours, theirs, strict=True):
            if name == "hidden_states" and mine.shape[1] == real.shape[1]:
                mine, his = mine[real], his[real]
            torch.testing.assert_close(mine, his)


def test_what_was_not_asked_for_is_none(lm, rm):
    out = guided(lm, rm, **tiny.prompts(5), output_scores=False, output_candidates=False)
    for name in ("scores", "logits", "attentions", "hidden_states"):
        assert getattr(out, name) is None
    for name in ("candidate_ids", "candidate_logprobs", "candidate_rewards"):
        assert getattr(out, name, None) is None
    assert out.rewards is not None and out.kl is not None


def test_tensor_when_no_dict_is_asked_for(lm, rm):
    out = guided(lm, rm, **tiny.prompts(5), return_dict_in_generate=False, output_candidates=False)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.int64
    assert torch.equal(out, guided(lm, rm, **tiny.prompts(5)).sequences)


def test_shapes_and_dtypes(lm, rm):
    out = guided(lm, rm, **tiny.prompts(5, 9, 7))
    for name in ("rewards", "kl"):
        assert getattr(out, name).shape == (3, NEW) and getattr(out, name).dtype == torch.float32
    for name in ("candidate_logprobs", "candidate_rewards"):
        value = getattr(out, name)
        assert value.shape == (3, NEW, K) and value.dtype == torch.float32
    assert out.candidate_ids.shape == (3, NEW, K) and out.candidate_ids.dtype == torch.int64


@pytest.mark.parametrize("do_sample", [False, True])
def test_candidates_are_the_top_k_of_the_processed_scores(do_sample, lm, rm):
    out = guided(lm, rm, **tiny.prompts(5, 9), do_sample=do_sample, repetition_penalty=1.3, seed=0)
    logprobs = torch.stack(out.scores, 1).log_softmax(-1)
    top = logprobs.topk(K)
    assert out.candidate_ids.tolist() == top.indices.tolist()
    torch.testing.assert_close(out.candidate_logprobs, top.values)


@pytest.mark.parametrize("do_sample", [False, True])
def test_reward_of_the_chosen_candidate(do_sample, lm, rm):
    inputs = tiny.prompts(5, 9)
    out = guided(lm, rm, **inputs, do_sample=do_sample, seed=0)
    chosen = out.candidate_ids == answers(out, inputs)[..., None]
    assert (chosen.sum(-1) == 1).all()
    torch.testing.assert_close(out.rewards, out.candidate_rewards[chosen].view(2, NEW))


@pytest.mark.parametrize("make_rm", [tiny.llama_rm, tiny.gpt2_rm])
@pytest.mark.parametrize("method", ["auto", "tree", "expand", "reencode"])
def test_rewards_are_those_of_full_forwards(make_rm, method, lm):
    rm = make_rm()
    inputs = tiny.prompts(5, 9)
    out = guided(lm, rm, **inputs, reward_method=method, do_sample=True, seed=1)
    for row, answer in enumerate(answers(out, inputs)):
        for step in range(NEW):
            prefix = seen_by_rm(inputs, row, answer[:step])
            ids = torch.cat([prefix.expand(K, -1), out.candidate_ids[row, step][:, None]], 1)
            expected = tiny.full_reward(rm, ids)
            torch.testing.assert_close(
                out.candidate_rewards[row, step], expected, rtol=1e-4, atol=2e-4
            )


@pytest.mark.parametrize("beta", [0.0, 0.8, -1.5])
def test_greedy_takes_the_best_combined_score(beta, lm, rm):
    inputs = tiny.prompts(5, 9)
    out = guided(lm, rm, **inputs, beta=beta)
    slot = (out.candidate_logprobs + beta * out.candidate_rewards).argmax(-1, keepdim=True)
    assert answers(out, inputs).tolist() == out.candidate_ids.gather(-1, slot)[..., 0].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_kl_is_exact_over_the_candidates(temperature, lm, rm):
    sampled = {"do_sample": True, "temperature": temperature, "seed": 0}
    out = guided(lm, rm, **tiny.prompts(5, 9), **sampled)
    s = (out.candidate_logprobs + 0.8 * out.candidate_rewards).double()
    logq = (s / temperature).log_softmax(-1)
    expected = (logq.exp() * (logq - out.candidate_logprobs)).sum(-1)
    torch.testing.assert_close(out.kl.double(), expected, rtol=1e-4, atol=1e-4)


def test_kl_with_fewer_allowed_tokens_than_k(lm, rm):
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6, 7]}
    out = guided(lm, rm, **tiny.prompts(5, 9), do_sample=True, **allowed)
    assert (torch.isfinite(out.candidate_logprobs).sum(-1) == 3).all()
    s = (out.candidate_logprobs + 0.8 * out.candidate_rewards)[..., :3].double()
    logq = s.log_softmax(-1)
    expected = (logq.exp() * (logq - out.candidate_logprobs[..., :3])).sum(-1)
    torch.testing.assert_close(out.kl.double(), expected, rtol=1e-4, atol=1e-4)


def test_kl_of_a_greedy_answer_is_its_surprise_under_the_base(lm, rm):
    """A policy that always takes the same token is as far from the base as that token is unlikely,
    over the whole vocabulary."""
    inputs = tiny.prompts(5, 9)
    out = guided(lm, rm, **inputs, beta=4.0, output_candidates=False)
    logp = torch.stack(out.scores, 1).log_softmax(-1)
    expected = -logp.gather(-1, answers(out, inputs)[..., None])[..., 0]
    assert expected.max() > 0.5
    torch.testing.assert_close(out.kl, expected, rtol=1e-4, atol=1e-4)


def test_nan_after_the_row_ended_and_nowhere_else(lm, rm):
    inputs = tiny.prompts(5, 9)
    plain = guided(lm, rm, **inputs)
    stop = int(answers(plain, inputs)[0, 2])
    out = guided(lm, rm, **inputs, eos_token_id=stop, pad_token_id=tiny.PAD)
    answer = answers(out, inputs)
    ended = (answer == stop).int().cumsum(-1) - (answer == stop).int() > 0
    assert ended[0, 3:].all() and not ended[0, :3].any()
    assert torch.isnan(out.rewards).tolist() == ended.tolist()
    assert torch.isnan(out.kl).tolist() == ended.tolist()
    torch.testing.assert_close(out.rewards[0, :3], plain.rewards[0, :3])


def test_length_is_that_of_the_longest_row(lm, rm):
    inputs = tiny.prompts(5, 9)
    plain = answers(guided(lm, rm, **inputs), inputs)
    out = guided(lm, rm, **inputs, eos_token_id=[int(plain[0, 1]), int(plain[1, 4])])
    length = answers(out, inputs).shape[1]
    assert length <= 5
    assert out.rewards.shape == out.kl.shape == (2, length)
    assert out.candidate_ids.shape == (2, length, K) and len(out.scores) == length


def test_num_return_sequences_expands_every_output(lm, rm):
    out = guided(lm, rm, **tiny.prompts(5, 9), do_sample=True, num_return_sequences=3, seed=0)
    assert out.sequences.shape == (6, 9 + NEW) and out.candidate_rewards.shape == (6, NEW, K)
    for row, ids in enumerate(out.sequences):
        whole = ids[None, 4:] if row < 3 else ids[None]  # the first prompt has four of padding
        expected = tiny.full_reward(rm, whole)[0]
        torch.testing.assert_close(out.rewards[row, -1], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("eos_reward", ["hidden", "previous"])
def test_reward_of_the_eos_candidate(eos_reward, lm, rm):
    inputs = tiny.prompts(5, 9)
    first = int(answers(guided(lm, rm, **inputs), inputs)[0, 0])
    out = guided(lm, rm, **inputs, eos_token_id=first, eos_reward=eos_reward, min_new_tokens=0)
    slot = (out.candidate_ids[0, 0] == first).nonzero().item()
    seen = seen_by_rm(inputs, 0, torch.tensor([first] if eos_reward == "hidden" else []).long())
    expected = tiny.full_reward(rm, seen)[0]
    torch.testing.assert_close(out.candidate_rewards[0, 0, slot], expected, rtol=1e-4, atol=2e-4)


def test_reward_model_that_pads_with_eos_scores_the_prefix(lm, recwarn):
    """Its public forward takes the EOS for padding: `auto` does the same and says so."""
    inputs = tiny.prompts(5, 9)
    first = int(answers(guided(lm, tiny.llama_rm(), **inputs), inputs)[0, 0])
    rm = tiny.llama_rm()
    rm.config.pad_token_id = first
    out = guided(lm, rm, **inputs, eos_token_id=first)
    slot = (out.candidate_ids[0, 0] == first).nonzero().item()
    expected = tiny.full_reward(rm, seen_by_rm(inputs, 0, torch.tensor([]).long()))[0]
    torch.testing.assert_close(out.candidate_rewards[0, 0, slot], expected, rtol=1e-4, atol=2e-4)
    assert any("eos_reward" in str(w.message) for w in recwarn)


def test_reward_model_sees_its_own_prompt(lm, rm):
    inputs, other = tiny.prompts(5, 9), tiny.prompts(12, 4, seed=1)
    out = guided(
        lm,
        rm,
        **inputs,
        reward_input_ids=other["input_ids"],
        reward_attention_mask=other["attention_mask"],
    )
    for row, answer in enumerate(answers(out, inputs)):
        expected = tiny.full_reward(rm, seen_by_rm(other, row, answer))
        torch.testing.assert_close(out.rewards[row, -1:], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("squeeze", [False, True], ids=["[..., 1]", "[...]"])
def test_reward_head_may_be_any_callable(squeeze, lm, rm):
    inputs = tiny.prompts(5, 9)

    def head(hidden):
        reward = torch.tanh(hidden).sum(-1, keepdim=True)
        return reward.squeeze(-1) if squeeze else reward

    out = guided(lm, rm, **inputs, reward_head=head)
    ids = seen_by_rm(inputs, 1, answers(out, inputs)[1])
    expected = torch.tanh(rm.model(ids).last_hidden_state[:, -1]).sum(-1)
    torch.testing.assert_close(out.rewards[1, -1:], expected.detach(), rtol=1e-4, atol=5e-4)


def test_results_carry_no_graph(lm, rm):
    out = guided(lm, rm, **tiny.prompts(5))
    assert not any(t.requires_grad for t in (out.rewards, out.kl, out.candidate_rewards))
