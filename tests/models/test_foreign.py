"""What the private names of transformers and torch must still mean."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers import GenerationConfig

import rgtg_fast
from rgtg_fast.models import foreign


def prepared(**options):
    """The generation configuration as a custom_generate callable gets it."""
    got = {}

    def custom(model, input_ids, generation_config, **kwargs):
        got["config"], got["mask"] = generation_config, kwargs.get("attention_mask")
        return input_ids

    tiny.llama_lm().generate(**tiny.prompts(5), custom_generate=custom, max_new_tokens=2, **options)
    return got


def test_special_tokens_are_tensors():
    config = prepared(eos_token_id=[2, 5], pad_token_id=0)["config"]
    assert foreign.eos_tensor(config).tolist() == [2, 5]
    assert foreign.pad_tensor(config).tolist() == 0


def test_the_mask_or_its_length_is_there():
    got = prepared()
    length = foreign.mask_length(got["config"])
    assert length == 5 if got["mask"] is None else got["mask"].shape == (1, 5)


@pytest.mark.parametrize("name", ["_pad_token_tensor", "_eos_token_tensor"])
def test_a_renamed_tensor_is_an_error(name, monkeypatch):
    def renamed(model, config, *rest):
        vars(config).pop(name)

    monkeypatch.setattr("rgtg_fast.guided.check.check_config", renamed)
    with pytest.raises(AttributeError, match=name):
        rgtg_fast.generate(
            tiny.llama_lm(), reward_model=tiny.llama_rm(), **tiny.prompts(5), max_new_tokens=2
        )


def test_attention_is_chosen_by_the_configuration():
    rm = tiny.llama_rm()
    assert foreign.attention_of(rm.config) == rm.config._attn_implementation == "sdpa"
    foreign.set_attention(rm.config, "eager")
    with torch.no_grad():
        out = rm.model(torch.arange(3, 6)[None], output_attentions=True)
    assert out.attentions[0].shape == (1, 4, 3, 3)
    del rm.config.__dict__["_attn_implementation_internal"]
    with pytest.raises(KeyError):
        foreign.set_attention(rm.config, "eager")


def test_hooks_and_compiled_forwards_are_seen():
    module = nn.Linear(2, 2)
    assert not foreign.hooked(module) and foreign.untouched(module)
    handle = module.register_forward_pre_hook(lambda *args: None)
    assert foreign.hooked(module) and len(foreign.hooks_of(module)) == 1
    assert not foreign.untouched(module)
    handle.remove()
    assert foreign.untouched(module)
    module.forward = lambda x: x
    assert not foreign.untouched(module)
    del module.forward
    module.compile()
    assert not foreign.untouched(module)
    assert all(name in vars(module) for name in (*foreign.HOOKS, foreign.MODULES))
    assert foreign.WRAPPED in torch.compile(module)._modules


def test_onednns_linear_is_a_linear():
    kernel = foreign.onednn_linear if foreign.has_onednn_linear() else None
    if kernel is None:
        pytest.skip("no oneDNN on this CPU")
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    got = kernel(x, weight, bias)
    torch.testing.assert_close(got, nn.functional.linear(x, weight, bias))


def test_a_cache_given_is_counted():
    config = GenerationConfig()
    assert foreign.mask_length(config) == 0


class Streamer:
    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize("streamer", [None, Streamer()], ids=["none", "one"])
def test_generate_holds_its_streamer_where_it_is_looked_for(streamer):
    lm, seen = tiny.llama_lm(), []

    def callable(model, input_ids, **options):
        seen.append(
            (foreign.streamer_of_caller(model), foreign.streamer_of_caller(tiny.llama_lm()))
        )
        return input_ids

    lm.generate(torch.ones(1, 3).long(), custom_generate=callable, streamer=streamer)
    assert seen == [(streamer, None)]


def test_no_streamer_outside_of_generate():
    assert foreign.streamer_of_caller(tiny.llama_lm()) is None


def test_a_capture_leaves_its_pool_by_functions_that_torch_has(monkeypatch):
    stubs = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        assert f"def {name}(device: _int, mempool_id: tuple[_int, _int]) -> None" in stubs
    calls = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *a: calls.append(("end", *a)))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *a: calls.append(("release", *a)))
    foreign.leave_pool(1, (0, 7))
    assert calls == [("end", 1, (0, 7)), ("release", 1, (0, 7))]


def test_a_pool_that_was_left_is_not_released_again(monkeypatch):
    def raises(*_):
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", raises)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: pytest.fail("released"))
    foreign.leave_pool(0, (0, 1))


def test_generation_defaults_are_those_of_generate():
    found = foreign.generation_defaults()
    lm = tiny.llama_lm()
    ids = tiny.prompts(5, seed=1)["input_ids"]
    cut = lm.generate(
        ids, max_new_tokens=1, do_sample=True, output_scores=True, return_dict_in_generate=True
    )
    assert found["top_k"] == 50 == int(cut.scores[0].isfinite().sum())
