"""The faster fp32 linear layers: same numbers, switched on and off without a trace."""

import platform

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import rgtg_fast
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


def test_only_large_plain_fp32_layers_of_the_twin_are_switched():
    model = Two()
    twin = quick(model)
    assert is_quick(twin.linear) and is_quick(twin.conv)
    assert not is_quick(twin.small)
    assert not any(map(is_quick, model.modules()))
    assert not any(map(is_quick, quick(Two(torch.bfloat16)).modules()))


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
    options["cache_implementation"] = cache
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
