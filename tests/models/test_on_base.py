"""A reward head on the language model's own hidden states."""

from contextlib import nullcontext

import pytest
import torch
import transformers as tf
import zoo
from torch import nn

import rgtg_fast
from rgtg_fast import RewardHead

FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2", "bloom", "opt"]


def some_ids(rows=3, n=7):
    return torch.randint(3, zoo.VOCAB, (rows, n), generator=torch.Generator().manual_seed(0))


def weight_of(lm, seed=4, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(lm.config.hidden_size, generator=generator, **kwargs)


def deep(width=32):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1)).eval()


@torch.no_grad()
def rewards(head, ids=None):
    hidden, _ = head.forward_base(some_ids() if ids is None else ids, use_cache=False)
    return head.rewards(hidden)


def separate(family, lm, weight):
    """A sequence-classification model of its own with the same base weights and head."""
    rm = zoo.build_rm(family)
    rm.base_model.load_state_dict(lm.base_model.state_dict())
    rm.score.weight.data.copy_(weight)
    return rm


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_generate_gives_the_tokens_of_a_separate_model_of_the_same_weights(family, do_sample):
    lm = zoo.build_lm(family)
    weight = weight_of(lm)
    options = dict(k=6, beta=2.0, do_sample=do_sample, seed=3, max_new_tokens=12)
    options |= dict(return_dict_in_generate=True, **zoo.left_pad(zoo.prompts()))
    rm = separate(family, lm, weight)
    with pytest.warns(UserWarning) if family == "bloom" else nullcontext():
        wanted = rgtg_fast.generate(lm, reward_model=rm, **options)
    got = rgtg_fast.generate(lm, reward_model=RewardHead(lm, weight), **options)
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(got.rewards, wanted.rewards, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_counted_as_transformers_counts_hidden_states(family):
    lm = zoo.build_lm(family)
    with torch.no_grad():
        out = lm.base_model(some_ids(), output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)  # the last is the normed one
    for layer in range(-3, 3):
        wanted = out.hidden_states[layer] @ weight_of(lm)
        torch.testing.assert_close(rewards(RewardHead(lm, weight_of(lm), layer)), wanted)


def test_a_layer_below_the_last_guides_generation():
    lm = zoo.build_lm("llama")

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.score = lm.config, nn.Linear(32, 1, bias=False)
            self.score.weight.data.copy_(weight_of(lm)[None])
            self.model = zoo.build_lm("llama").model
            self.model.layers, self.model.norm = self.model.layers[:1], nn.Identity()

    options = dict(k=6, max_new_tokens=10, **zoo.left_pad(zoo.prompts()))
    wanted = rgtg_fast.generate(lm, reward_model=Middle(), **options)
    got = rgtg_fast.generate(lm, reward_model=RewardHead(lm, weight_of(lm), layer=1), **options)
    assert torch.equal(got, wanted)
    assert not torch.equal(
        got, rgtg_fast.generate(lm, reward_model=RewardHead(lm, weight_of(lm)), **options)
    )


@pytest.mark.parametrize("bias", [None, 0.5, torch.tensor([0.5])])
@pytest.mark.parametrize("shape", [(32,), (1, 32)])
def test_a_linear_head_is_a_tensor_with_or_without_bias(shape, bias):
    lm = zoo.build_lm("llama")
    weight = weight_of(lm).view(shape)
    with torch.no_grad():
        wanted = lm.model(some_ids()).last_hidden_state @ weight.flatten() + float(bias or 0.0)
    torch.testing.assert_close(rewards(RewardHead(lm, weight, bias=bias)), wanted)


@pytest.mark.parametrize("form", ["module", "function", "squeezed"])
def test_a_small_network_is_a_head(form):
    lm, network = zoo.build_lm("llama"), deep()
    forms = {"module": network, "function": lambda h: network(h)}
    forms["squeezed"] = lambda h: network(h)[..., 0]
    with torch.no_grad():
        wanted = network(lm.model(some_ids()).last_hidden_state)[..., 0]
    torch.testing.assert_close(rewards(RewardHead(lm, forms[form])), wanted)


def test_a_float32_head_on_a_bfloat16_model_keeps_its_precision():
    lm = zoo.build_lm("llama").to(torch.bfloat16)
    weight = weight_of(lm)
    with torch.no_grad():
        wanted = lm.model(some_ids()).last_hidden_state.float() @ weight
    torch.testing.assert_close(rewards(RewardHead(lm, weight)), wanted)


def test_weights_are_shared_and_the_model_is_left_as_it_was():
    lm = zoo.build_lm("llama").train()
    logits = lm(some_ids()).logits
    head = RewardHead(lm, weight_of(lm), layer=1)
    rgtg_fast.generate(lm, some_ids(), reward_model=head, k=4, max_new_tokens=3)
    assert head.base is lm.model
    assert all(module.training for module in lm.modules())
    assert torch.equal(lm(some_ids()).logits, logits)
    assert all(p.requires_grad and p.grad is None for p in lm.parameters())


def test_custom_generate_takes_a_head():
    lm = zoo.build_lm("llama")
    head = RewardHead(lm, weight_of(lm))
    options = dict(max_new_tokens=5, **zoo.left_pad(zoo.prompts()))
    got = lm.generate(custom_generate=rgtg_fast.RewardGuided(head, k=4), **options)
    assert torch.equal(got, rgtg_fast.generate(lm, reward_model=head, k=4, **options))


def test_two_layers_of_one_model_are_probed_apart():
    lm = zoo.build_lm("llama")
    heads = [RewardHead(lm, weight_of(lm), layer) for layer in (1, -1)]
    lm.model.layers[1].self_attn.forward = broken(lm.model.layers[1].self_attn.forward)
    assert rgtg_fast.scorers.make_scorer(heads[0], k=4).method == "tree"
    with pytest.warns(UserWarning, match="scored by"):
        assert rgtg_fast.scorers.make_scorer(heads[1], k=4).method != "tree"


def broken(forward):
    """Attention that adds the number of tokens it was given at once: no cache can be right."""

    def wrong(*args, **kwargs):
        out, weights = forward(*args, **kwargs)
        return out + kwargs["hidden_states"].shape[1], weights

    return wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(3, 32)}, r"weight has shape \[3, 32\].*pass a float tensor \[H\]"),
        ({"weight": torch.ones(32).long()}, r"dtype torch.int64; pass a float tensor"),
        ({"weight": torch.tensor(1.0)}, r"weight has shape \[\]"),
        ({"weight": torch.ones(16)}, r"weight does not give one number for each .* 32 elements"),
        ({"weight": nn.Linear(32, 2)}, r"weight does not give one number for each"),
        ({"weight": "score"}, r"weight must be a float tensor \[H\].*got str"),
        ({"weight": deep(), "bias": 1.0}, "bias is for a head given as a tensor"),
        ({"weight": torch.ones(32), "bias": torch.ones(2)}, r"bias has shape \[2\]; pass a number"),
        ({"weight": torch.ones(32), "layer": 3}, r"layer=3 .*pass 0 .* to 2 .*or -1 to -3"),
        ({"weight": torch.ones(32), "layer": -4}, "layer=-4 is no hidden state"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardHead(zoo.lm("llama"), **arguments)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "lm must be a causal language model of transformers; got Linear"),
        (tf.LlamaModel(zoo.config_of("llama")), "lm must be a causal language model"),
        (
            tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=72, d_model=32, d_ff=32, num_layers=1, num_heads=2)
            ),
            "an encoder-decoder model; pass a decoder-only one",
        ),
    ],
)
def test_what_is_no_language_model_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        RewardHead(model, torch.ones(32))


def test_no_second_head_beside_a_head():
    head = RewardHead(zoo.lm("llama"), torch.ones(32))
    with pytest.raises(ValueError, match="reward_head is given beside a RewardHead"):
        rgtg_fast.RewardGuided(head, reward_head=deep())
