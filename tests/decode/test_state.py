"""Generation leaves models, inputs and torch as it found them."""

import copy
import functools
import gc
import weakref

import pytest
import tiny
import torch
from calls import guided as call
from transformers import GenerationConfig

import rgtg_fast

METHODS = ["auto", "tree", "expand", "reencode"]
guided = functools.partial(call, **tiny.prompts(5, 9), max_new_tokens=4, beta=2.0)


@pytest.fixture  # new ones for every test: what one leaves behind must not be another's "before"
def lm():
    return tiny.llama_lm()


@pytest.fixture
def rm():
    return tiny.llama_rm()


def snapshot(model):
    """All of a model that a caller could notice a change in."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "modes": {name: m.training for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "hooks": {name: [len(getattr(m, h)) for h in hooks] for name, m in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "generation_config": copy.deepcopy(getattr(model, "generation_config", None)),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "weights": {name: t.clone() for name, t in model.state_dict().items()},
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    weights, were = after.pop("weights"), dict(before).pop("weights")
    assert weights.keys() == were.keys()
    assert all(torch.equal(weights[name], were[name]) for name in weights)
    for what, value in after.items():
        assert str(value) == str(before[what]), what


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [tiny.llama_rm, tiny.gpt2_rm])
def test_models_are_left_as_they_were(method, make, lm):
    rm = make()
    before = snapshot(lm), snapshot(rm)
    guided(lm, rm, reward_method=method, do_sample=True)
    assert_unchanged(lm, before[0])
    assert_unchanged(rm, before[1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", METHODS)
def test_attention_implementation_is_left(attention, method, lm, rm):
    lm.set_attn_implementation(attention)
    rm.set_attn_implementation(attention)
    guided(lm, rm, reward_method=method)
    for model in (lm, rm):
        assert model.config._attn_implementation == attention
        assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {
            attention
        }


@pytest.mark.parametrize("method", METHODS)
def test_training_flags_come_back_module_by_module(method, lm, rm):
    lm.train()
    rm.train()
    rm.model.layers[0].mlp.eval()
    rm.model.embed_tokens.requires_grad_(False)
    before = snapshot(lm), snapshot(rm)
    guided(lm, rm, reward_method=method)
    assert_unchanged(lm, before[0])
    assert_unchanged(rm, before[1])


@pytest.mark.parametrize("method", METHODS)
def test_reward_model_scores_without_dropout(method, lm):
    rm = tiny.gpt2_rm(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    options = {"reward_method": method, "return_dict_in_generate": True}
    quiet = guided(lm, rm, **options)
    rm.train()
    noisy = guided(lm, rm, **options)
    assert noisy.sequences.tolist() == quiet.sequences.tolist()
    torch.testing.assert_close(noisy.rewards, quiet.rewards)


def test_models_are_left_as_they_were_after_an_error(lm):
    rm = tiny.llama_rm().train()
    before = snapshot(lm), snapshot(rm)

    def broken(input_ids, scores):
        if input_ids.shape[1] == 11:
            raise RuntimeError("processor failed")
        return scores

    with pytest.raises(RuntimeError, match="processor failed"):
        guided(lm, rm, logits_processor=[broken])
    assert_unchanged(lm, before[0])
    assert_unchanged(rm, before[1])


def test_arguments_are_not_changed(lm, rm):
    config = GenerationConfig(max_new_tokens=4, temperature=0.5, do_sample=True)
    tensors = tiny.prompts(5, 9) | {
        "beta": torch.tensor([1.0, 2.0]),
        "seed": torch.tensor([3, 4]),
    }
    tensors |= {"reward_" + name: tensor for name, tensor in tiny.prompts(4, 6).items()}
    processors, criteria = [], []
    were = copy.deepcopy((config.to_dict(), tensors))
    rgtg_fast.generate(
        lm,
        reward_model=rm,
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=criteria,
        **tensors,
    )
    assert config.to_dict() == were[0] and processors == criteria == []
    for name, tensor in tensors.items():
        assert torch.equal(tensor, were[1][name]), name


def test_reward_model_may_be_the_language_models_twin(lm):
    """Reward model and LM that share their body do not disturb each other."""
    rm = tiny.llama_rm()
    rm.model = lm.model
    separate = copy.deepcopy(rm)
    assert guided(lm, rm).tolist() == guided(lm, separate).tolist()


def test_torch_settings_are_left(lm, rm):
    def settings():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.get_rng_state().tolist(),
        )

    before = settings()
    guided(lm, rm, do_sample=True, seed=1)
    assert settings() == before


def test_a_later_training_step_works(lm, rm):
    out = guided(lm, rm, return_dict_in_generate=True)
    rm.train()
    rm(input_ids=out.sequences).logits.sum().backward()
    lm(input_ids=out.sequences, labels=out.sequences).loss.backward()
    assert all(p.grad is not None for p in rm.parameters())


def test_changed_weights_are_seen_by_the_next_call(lm, rm):
    """Nothing computed from the weights of one call is kept for the next."""
    with torch.no_grad():
        first = guided(lm, rm, return_dict_in_generate=True, beta=0.0)
        rm.score.weight.mul_(2.0)
        second = guided(lm, rm, return_dict_in_generate=True, beta=0.0)
    torch.testing.assert_close(second.rewards, 2 * first.rewards)


@pytest.mark.parametrize("method", METHODS)
def test_models_are_not_kept_alive(method):
    lm, rm = tiny.llama_lm(), tiny.llama_rm()
    guided(lm, rm, reward_method=method)
    gone = weakref.ref(lm), weakref.ref(rm)
    del lm, rm
    gc.collect()
    assert gone[0]() is None and gone[1]() is None
