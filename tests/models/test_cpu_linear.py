"""The faster linear layers: same numbers, switched on and off without a trace."""

import platform
import weakref

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import rgtg_fast
from rgtg_fast.models import cpu_linear
from rgtg_fast.models.cpu_linear import quicken
from rgtg_fast.models.twin import Twins

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the kernel is for x86"
)


class Two(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(512, 1024, dtype=dtype)
        self.conv = Conv1D(512, 1024).to(dtype)
        self.small = nn.Linear(512, 8, dtype=dtype)

    def forward(self, x):
        return self.small(self.conv(self.linear(x)))


def quick(model):
    """A twin of `model` with the faster layers."""
    twins = Twins([model], eval_mode=True)
    quicken(twins.modules)
    return twins[model]


def is_quick(module):
    return type(module) not in (nn.Linear, Conv1D) and isinstance(module, (nn.Linear, Conv1D))


@pytest.mark.parametrize("rows", [(1, 2), (3, 10), (512, 1), (1, 1), (5, 130)])
@torch.no_grad()
def test_results_are_those_of_the_layers(rows):
    model = Two()
    x = torch.randn(*rows, 512, generator=torch.Generator().manual_seed(0))
    exact = Two(torch.float64)
    exact.load_state_dict(model.state_dict())
    truth, plain = exact(x.double()), model(x)
    got = quick(model)(x)
    allowed = 2 * (plain - truth).abs().max() + 1e-6
    assert (got - truth).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_large_plain_layers_of_the_twin_are_switched(dtype):
    model = Two(dtype)
    twin = quick(model)
    assert is_quick(twin.linear) and is_quick(twin.conv)
    assert not is_quick(twin.small)
    assert not any(map(is_quick, model.modules()))
    assert not any(map(is_quick, quick(Two(torch.float16)).modules()))


def test_a_hooked_layer_keeps_its_own_forward():
    model = Two()
    model.linear.register_forward_hook(lambda module, args, out: out * 0)
    twin = quick(model)
    assert not is_quick(twin.linear) and is_quick(twin.conv)


@torch.no_grad()
def test_autocast_gets_torchs_own_layers():
    model, x = Two(), torch.randn(3, 512)
    twin = quick(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = twin(x), model(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, plain)


def test_gradients_and_no_rows_fall_through():
    model = Two()
    twin = quick(model)
    twin(torch.randn(2, 512)).sum().backward()
    assert model.linear.weight.grad is not None
    with torch.no_grad():
        assert twin(torch.randn(0, 512)).shape == (0, 8)


@pytest.mark.parametrize("cache", ["dynamic", None])
def test_the_kernel_is_called_for_what_is_ours(cache, monkeypatch):
    """For the reward model, and for the language model but in Hugging Face's own loop."""
    sizes = {"n_embd": 768, "n_layer": 1, "n_head": 4, "vocab_size": 960, "n_positions": 128}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(**sizes, **special)).eval()
    rm = GPT2ForSequenceClassification(GPT2Config(**sizes, **special, num_labels=1)).eval()
    ids = torch.randint(1, 96, (1, 7))
    options = {"input_ids": ids, "reward_model": rm, "max_new_tokens": 3, "k": 5}
    options |= {"cache_implementation": cache, "speculate": False}
    rgtg_fast.generate(lm, **options)  # the probe's own calls are over
    calls, kernel = [], torch.ops.mkldnn._linear_pointwise

    def counted(x, *rest):
        calls.append(x.shape)
        return kernel(x, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    rgtg_fast.generate(lm, **options)
    # attention in and out, and the two of the MLP: for the prompt, and for each of three steps
    rows = [shape.numel() // shape[-1] for shape in calls]
    if cache == "dynamic":
        assert rows == [7] * 4 + [5] * 12
    else:  # the language model's prompt, then its head in each step; a Conv1D of one row is not
        assert rows == [7] * 8 + [1] + ([5] * 4 + [1]) * 2 + [5] * 4


@pytest.fixture
def packs(monkeypatch):
    """Packed weights always win; the layers' weights that were packed, by their shape."""
    made, pack = [], cpu_linear.onednn_pack
    monkeypatch.setattr(cpu_linear, "_wins", {})
    monkeypatch.setattr(cpu_linear, "_measured", lambda *_: True)
    monkeypatch.setattr(
        cpu_linear, "onednn_pack", lambda w, rows: made.append(tuple(w.shape)) or pack(w, rows)
    )
    return made


def used(twin, x, times=cpu_linear._USES):
    for _ in range(times):
        twin(x)
    return twin


def bf16(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 512, generator=g).bfloat16()


@pytest.mark.parametrize("rows", [1, 2, 10, 160, 300])
@torch.no_grad()
def test_packed_weights_give_the_same_bits(rows, packs):
    model = Two(torch.bfloat16)
    twin = used(quick(model), bf16(3))
    assert not packs
    for seed in range(3):
        x = bf16(rows, seed)
        assert torch.equal(twin(x), model(x))
    assert packs == ([(1024, 512), (512, 1024)] if rows <= 256 else [])


@torch.no_grad()
def test_a_change_of_a_weight_is_seen_within_a_call(packs):
    model, x = Two(torch.bfloat16), bf16(4)
    twin = used(quick(model), x, 20)
    for change in (
        lambda w: w.mul_(2),
        lambda w: w.detach().view(-1)[:7].fill_(9.0),
        lambda w: setattr(w, "data", torch.randn_like(w)),
    ):
        for layer in (model.linear, model.conv):
            before = model(x)
            change(layer.weight)
            want = model(x)
            assert not torch.equal(before, want)
            for _ in range(12):  # as it is, and packed anew
                assert torch.equal(twin(x), want)
    assert len(packs) == 2 + 6


@torch.no_grad()
def test_a_change_that_torch_does_not_count_is_seen_by_the_next_call(packs):
    model, x = Two(torch.bfloat16), bf16(4)
    used(quick(model), x, 20)
    model.linear.weight.data.mul_(3)
    assert torch.equal(used(quick(model), x, 20)(x), model(x))
    with torch.enable_grad():  # fused optimizers are counted by no torch up to 2.13 either
        model(x).sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.5, fused=True).step()
    assert torch.equal(used(quick(model), x, 20)(x), model(x))
    assert len(packs) == 6


@torch.no_grad()
def test_the_memory_of_packed_weights_is_no_other_tensors(packs):
    """Exchanged twice between two steps, the last ones could lie where the packed ones lay."""
    model, x = Two(torch.bfloat16), bf16(4)
    twin, weight = used(quick(model), x, 20), model.linear.weight
    packed, packed_at = twin.linear.__dict__["rgtg_packed"], weight.data_ptr()
    weight.data = torch.randn_like(weight)
    assert packed.source.data_ptr() == packed_at
    assert torch.equal(twin(x), model(x)) and packed.source is None


@torch.no_grad()
def test_packed_weights_go_with_the_twin(packs):
    twin = used(quick(Two(torch.bfloat16)), bf16(2), 20)
    held = weakref.ref(twin.linear.__dict__["rgtg_packed"].weight)
    assert held() is not None
    del twin
    assert held() is None


@torch.no_grad()
def test_no_more_is_packed_than_there_is_room_for(packs, monkeypatch):
    monkeypatch.setattr(cpu_linear, "_ROOM", 1 << 20)
    model, x = Two(torch.bfloat16), bf16(2)
    assert torch.equal(used(quick(model), x, 20)(x), model(x))
    assert len(packs) == 1


@torch.no_grad()
def test_where_packing_does_not_win_weights_stay_as_they_are(packs, monkeypatch):
    tried = []
    monkeypatch.setattr(cpu_linear, "_measured", lambda *_: bool(tried.append(1)))
    for _ in range(2):
        twin = used(quick(Two(torch.bfloat16)), bf16(2), 20)
        assert twin.linear.__dict__["rgtg_packed"].weight is None
    assert len(tried) == len(packs) == 2  # for each shape once


@torch.no_grad()
def test_a_measurement_that_failed_is_made_again(packs, monkeypatch):
    def fails(*_):
        raise MemoryError

    twin = used(quick(Two(torch.bfloat16)), bf16(2))
    with monkeypatch.context() as context:
        context.setattr(cpu_linear, "_measured", fails)
        with pytest.raises(MemoryError):
            twin(bf16(2))
    assert twin(bf16(2)) is not None and len(packs) > 1
    assert twin.linear.__dict__["rgtg_packed"].weight is not None


@torch.no_grad()
def test_a_measurement_asks_for_the_same_bits():
    weight, x = torch.randn(1024, 512).bfloat16(), bf16(2)
    assert not cpu_linear._measured(weight, cpu_linear.onednn_pack(weight * 1.01, 2), x)


def test_weights_without_a_version_are_left_alone():
    with torch.inference_mode():
        model = Two(torch.bfloat16)
    assert not is_quick(quick(model).linear)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_run_in_bf16_gives_the_same_with_and_without(family, packs, monkeypatch):
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 768, "n_layer": 1, "n_head": 4, "vocab_size": 960, "n_positions": 128}
        kinds, config = (GPT2LMHeadModel, GPT2ForSequenceClassification), GPT2Config
    else:
        sizes = {"hidden_size": 768, "intermediate_size": 1024, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 4, "vocab_size": 960, "max_position_embeddings": 128}
        kinds, config = (LlamaForCausalLM, LlamaForSequenceClassification), LlamaConfig
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    lm = kinds[0](config(**sizes, **special)).eval().bfloat16()
    rm = kinds[1](config(**sizes, **special, num_labels=1)).eval().bfloat16()
    options = {"input_ids": torch.randint(1, 960, (2, 7)), "reward_model": rm, "k": 5, "seed": 1}
    options |= {"max_new_tokens": 14, "do_sample": True, "return_dict_in_generate": True}
    options["speculate"] = False  # packed after some steps of the reward model
    got = rgtg_fast.generate(lm, **options)
    assert len(packs) > 8
    monkeypatch.setattr(cpu_linear, "_ROOM", 0)
    want = rgtg_fast.generate(lm, **options)
    assert torch.equal(got.sequences, want.sequences) and torch.equal(got.rewards, want.rewards)
