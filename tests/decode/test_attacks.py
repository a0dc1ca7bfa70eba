"""Models that their owners have changed by hand: the tokens are still those of full forwards."""

import gc
import weakref

import pytest
import tiny

import rgtg_fast

OPTIONS = {"k": 5, "beta": 1.5, "do_sample": True, "seed": 3, "max_new_tokens": 8}


def assert_as_full_forwards(lm, rm):
    """As full forwards of the reward model, and Hugging Face's own of the language model, do."""
    inputs = tiny.prompts(7, 3, 5) | OPTIONS | {"reward_model": rm}
    plain = {"reward_method": "reencode", "cache_implementation": "dynamic"}
    got, want = (rgtg_fast.generate(lm, **inputs, **way) for way in ({}, plain))
    assert got.tolist() == want.tolist()
    return got.tolist()


def test_an_inner_forward_that_a_lambda_replaces():
    lm, rm = tiny.llama_lm(), tiny.llama_rm()
    before = assert_as_full_forwards(lm, rm)
    for model in (lm, rm):
        mlp = model.model.layers[0].mlp
        mlp.forward = lambda x, forward=mlp.forward: -2 * forward(x)
    assert assert_as_full_forwards(lm, rm) != before
    lm, rm = tiny.llama_lm(), tiny.llama_rm()
    for model in (lm, rm):
        patch(model.model.layers[0].mlp)  # this time the old forward is in a closure
    assert assert_as_full_forwards(lm, rm) != before


def patch(module):
    forward = module.forward
    module.forward = lambda x: -2 * forward(x)


def test_a_replaced_forward_runs_in_eval_mode_wherever_it_keeps_the_old_one():
    lm, rm = tiny.gpt2_lm(), tiny.gpt2_rm()
    want = assert_as_full_forwards(lm, rm)
    one, two = rm.transformer.h
    one.mlp.forward = lambda x, forward=one.mlp.forward: forward(x)
    two.mlp.forward = lambda x, *, forward=two.mlp.forward: forward(x)
    rm.train()  # with dropout, which none of it may run
    assert assert_as_full_forwards(lm, rm) == want


def test_attention_replaced_after_a_first_call():
    lm, rm = tiny.llama_lm(), tiny.llama_rm()
    before = assert_as_full_forwards(lm, rm)
    for model in (lm, rm):
        attention = model.model.layers[0].self_attn

        def forward(*args, old=attention.forward, **kwargs):
            out, *rest = old(*args, **kwargs)
            return -out, *rest

        attention.forward = forward
    assert assert_as_full_forwards(lm, rm) != before


def negated(module, of=None):
    """The forward of `module` with its logits negated."""
    forward = of or module.forward

    def forward_negated(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = -out.logits
        return out

    return forward_negated


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_public_forward_replaced_after_a_first_call_is_the_one_that_counts(where):
    lm, rm, changed = tiny.llama_lm(), tiny.llama_rm(), tiny.llama_rm()
    before = assert_as_full_forwards(lm, rm)
    changed.forward = negated(changed)
    want = assert_as_full_forwards(lm, changed)  # its first call is with the new forward
    if where == "instance":
        rm.forward = negated(rm)
    else:
        old = type(rm)
        rm.__class__ = type("Negated", (old,), {"forward": negated(rm, old.forward)})
    assert assert_as_full_forwards(lm, rm) == want != before


def test_a_model_with_a_forward_of_its_own_is_freed():
    lm, rm = tiny.llama_lm(), tiny.llama_rm()
    rm.forward = negated(rm)
    assert_as_full_forwards(lm, rm)
    alive = weakref.ref(rm)
    del rm
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("k", 100), ("temperature", -1.0), ("reward_range", (2, 1)), ("reward_method", "best")],
)
def test_an_option_set_on_a_guide_is_checked_at_the_call(name, value):
    lm, guide = tiny.llama_lm(), rgtg_fast.RewardGuided(tiny.llama_rm(), k=5)
    setattr(guide, name, value)
    with pytest.raises(ValueError, match=name):
        lm.generate(**tiny.prompts(5), custom_generate=guide, max_new_tokens=3)
