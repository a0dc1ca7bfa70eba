"""A model's twin: same numbers, own switches, nothing of the model's changed."""

import copy
import functools
import pickle
import sys

import pytest
import tiny
import torch
import zoo
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import rgtg_fast
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.reward_model import RewardModel
from rgtg_fast.models.twin import Twins


def twin_of(model, eval_mode=True):
    return Twins([model], eval_mode)[model]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert", "mixtral", "deberta_v2"])
def test_a_twin_computes_the_same(name):
    rm = zoo.rm(name)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(twin_of(rm)(input_ids=ids).logits, rm(input_ids=ids).logits)


def test_parameters_are_shared_and_all_else_is_the_twins():
    rm = tiny.llama_rm().train()
    twin = twin_of(rm)
    pairs = list(zip(rm.modules(), twin.modules(), strict=True))
    assert all(type(a) is type(b) and a is not b for a, b in pairs)
    assert all(a is b for a, b in zip(rm.parameters(), twin.parameters(), strict=True))
    assert all(a.training and not b.training for a, b in pairs)
    twin.config.__dict__["_attn_implementation_internal"] = "eager"
    twin.model.rotary_emb.register_buffer("inv_freq", torch.zeros(1))
    twin.model.register_forward_hook(lambda *args: None)
    assert rm.config._attn_implementation == "sdpa" and not rm.model._forward_hooks
    assert rm.model.rotary_emb.inv_freq.numel() > 1
    assert twin.model.layers[0].self_attn.config is twin.config


def test_a_module_in_two_places_is_one_twin():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    twin = twin_of(model)
    assert twin["a"] is twin["b"][0] and twin["a"] is not shared


def test_forwards_kept_on_modules_run_the_twin():
    """As accelerate keeps them: a partial of the module around its bound forward."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).train()
    seen = []

    def new_forward(module, *args):
        seen.append(module)
        return module._old_forward(*args)

    for module in model:
        module._old_forward = module.forward
        module.forward = functools.partial(new_forward, module)
    twins = Twins([model], eval_mode=True)
    twin = twins[model]
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), nn.functional.linear(x, model[1].weight, model[1].bias))
    assert seen == [twin[0], twin[1]]


def test_a_closure_on_a_module_runs_the_twin():
    layer = nn.Dropout(0.5).train()
    own = layer.forward
    layer.forward = lambda x: own(x)
    twins = Twins([layer], eval_mode=True)
    assert torch.equal(twins[layer](torch.ones(64)), torch.ones(64))
    assert layer.training


def test_scripted_modules_stay():
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.ReLU())
    twin = twin_of(model)
    assert twin[0] is model[0] and twin[1] is not model[1]


def test_a_twin_of_a_gpt2_of_124m_takes_few_calls_of_the_package():
    with torch.device("meta"):
        lm = GPT2LMHeadModel(GPT2Config())
    parts, calls = LanguageModel(lm), []

    def profile(frame, event, _):
        if event == "call" and "rgtg_fast" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        parts.twin()
    finally:
        sys.setprofile(None)
    # A call for each of its 164 modules would cost more than all else that comes before the loop.
    assert len(calls) < 40, calls


def guided(rewards, lm, **options):
    call = {**tiny.prompts(5), "max_new_tokens": 4, "return_dict_in_generate": True}
    return lm.generate(custom_generate=rewards, do_sample=False, **(call | options))


def test_a_kept_object_sees_a_new_head_and_new_modules():
    lm, rm = tiny.llama_lm(), tiny.llama_rm()
    kept = rgtg_fast.RewardGuided(rm, k=5)
    guided(kept, lm)
    rm.score = nn.Linear(32, 1)
    rm.model.layers.append(copy.deepcopy(rm.model.layers[0]))
    rm.model.layers[-1].self_attn.layer_idx = 2
    rm.config.num_hidden_layers = 3
    fresh = rgtg_fast.RewardGuided(copy.deepcopy(rm), k=5)
    assert torch.equal(guided(kept, lm).rewards, guided(fresh, lm).rewards)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_used_object_can_be_copied_and_pickled(again):
    lm = tiny.llama_lm()
    kept = rgtg_fast.RewardGuided(tiny.llama_rm(), k=5)
    wanted = guided(kept, lm)
    got = guided(again(kept), lm)
    assert torch.equal(got.sequences, wanted.sequences)
    assert torch.equal(got.rewards, wanted.rewards)


def test_taking_a_twin_leaves_the_parts():
    parts = RewardModel(tiny.llama_rm())
    before = dict(vars(parts))
    twin = parts.twin()
    assert vars(parts) == before and twin.base is not parts.base and twin.head is not parts.head
