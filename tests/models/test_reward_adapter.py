"""LoRA reward models on the language model's own weights, against PEFT itself."""

import json

import peft
import pytest
import torch
import zoo
from lora_checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

import rgtg_fast
from rgtg_fast import RewardAdapter
from rgtg_fast.models.low_rank import LayerInputs, LowRank, LowRankLayers
from rgtg_fast.models.twin import Twins

FAMILIES = ["llama", "qwen2", "gpt2", "gpt_neox", "opt"]


@torch.no_grad()
def peft_rewards(model, ids):
    inner = model.get_base_model()
    hidden = inner.base_model(ids, use_cache=False).last_hidden_state
    return inner.score(hidden)[..., 0].float()


@torch.no_grad()
def adapter_rewards(adapter, ids):
    twin = adapter.twin()
    return twin.rewards(twin.forward_base(ids, use_cache=False)[0])


def some_ids(rows=3, n=7, seed=0):
    return torch.randint(3, zoo.VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))


def assert_close(got, wanted, relative):
    assert (got - wanted).abs().max() <= relative * wanted.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_rewards_are_those_of_peft_at_every_position(tmp_path, family, dtype, relative):
    model, lm = make_checkpoint(tmp_path, family, dtype)
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    wanted = peft_rewards(model, some_ids())
    assert_close(adapter_rewards(adapter, some_ids()), wanted, relative)
    with model.disable_adapter():
        assert (peft_rewards(model, some_ids()) - wanted).abs().max() > 0.1  # the adapter matters


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_agree_in_float64(tmp_path, family):
    model, lm = make_checkpoint(tmp_path, family, torch.float64)
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    with torch.no_grad():
        wanted = model.get_base_model().base_model(some_ids()).last_hidden_state
        assert_close(adapter.twin().forward_base(some_ids())[0], wanted, 1e-10)


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {"use_rslora": True, "lora_alpha": 3}),
        ("llama", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "lora_alpha": 5}),
        ("llama", {"alpha_pattern": {"layers.0.self_attn.v_proj": 11, ".*down_proj": 2}}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": ["o_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_alpha": 32}),
        ("gpt2", {"target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": True}),
        ("llama", {"bias": "none", "lora_dropout": 0.5}),
        ("llama", {"task_type": None, "modules_to_save": ["score"]}),
    ],
)
def test_options_of_lora_are_kept(tmp_path, family, lora):
    model, lm = make_checkpoint(tmp_path, family, **lora)
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    assert_close(adapter_rewards(adapter, some_ids()), peft_rewards(model, some_ids()), 1e-5)


def test_a_head_with_a_bias(tmp_path):
    model, lm = make_checkpoint(tmp_path, bias=True)
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    assert adapter.head.bias is not None
    assert_close(adapter_rewards(adapter, some_ids()), peft_rewards(model, some_ids()), 1e-5)


def test_bfloat16_is_as_near_to_float64_as_peft(tmp_path):
    model, lm = make_checkpoint(tmp_path)
    wanted = peft_rewards(model.double(), some_ids())
    half = RewardAdapter.from_pretrained(lm.to(torch.bfloat16), tmp_path)
    model.to(torch.bfloat16)
    error = (adapter_rewards(half, some_ids()) - wanted).abs().mean()
    assert error <= 1.5 * (peft_rewards(model, some_ids()) - wanted).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_two_separate_forwards(tmp_path, family):
    _, lm = make_checkpoint(tmp_path, family, torch.float64)
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    ids, others = some_ids(2), some_ids(3, seed=1)
    with torch.no_grad():
        plain = lm.base_model(ids).last_hidden_state
        twin = adapter.twin()
        adapted = twin.forward_base(others)[0]
        twin.rows.next_forward(2, 5)
        mixed = twin.base(torch.cat([ids, others])).last_hidden_state
    assert_close(mixed[:2], plain, 1e-12)
    assert_close(mixed[2:], adapted, 1e-12)


def test_layers_that_read_one_tensor_share_a_product(tmp_path):
    _, lm = make_checkpoint(tmp_path)
    groups = RewardAdapter.from_pretrained(lm, tmp_path).low_rank._groups
    assert sorted(len(readers) for _, readers in groups) == [1, 1, 1, 1, 2, 2, 3, 3]


def test_only_linear_layers_of_a_twin_are_touched(tmp_path):
    _, lm = make_checkpoint(tmp_path)
    before = {name: p.clone() for name, p in lm.named_parameters()}
    logits = lm(some_ids()).logits
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    twin = adapter.twin()
    assert type(twin.base.layers[0].mlp.up_proj) is not nn.Linear
    twin.rewards(twin.forward_base(some_ids(), use_cache=False)[0])
    assert type(lm.model.layers[0].mlp.up_proj) is nn.Linear
    assert all("forward" not in module.__dict__ for module in lm.modules())
    assert not any(module._forward_pre_hooks for module in lm.modules())
    assert torch.equal(lm(some_ids()).logits, logits)
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())


def test_a_forward_that_was_patched_before_is_used_and_left(tmp_path):
    _, lm = make_checkpoint(tmp_path)
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    layer = lm.model.layers[0].mlp.up_proj
    calls = []

    def patched(x):
        calls.append(x.shape)
        return nn.functional.linear(x, layer.weight)

    wanted = adapter_rewards(adapter, some_ids())
    layer.forward = patched
    assert_close(adapter_rewards(adapter, some_ids()), wanted, 1e-6)
    assert len(calls) == 1 and layer.__dict__["forward"] is patched


def test_training_flags_and_gradients_are_left_alone(tmp_path):
    _, lm = make_checkpoint(tmp_path)
    lm.train()
    lm.model.layers[1].eval()
    flags = [m.training for m in lm.modules()]
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    rgtg_fast.generate(lm, some_ids(), reward_model=adapter, k=4, max_new_tokens=3)
    assert [m.training for m in lm.modules()] == flags
    assert all(p.requires_grad and p.grad is None for p in lm.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("do_sample", [False, True])
def test_generate_gives_the_tokens_of_the_separate_peft_model(tmp_path, family, do_sample):
    model, lm = make_checkpoint(tmp_path, family)
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    options = dict(k=6, beta=2.0, do_sample=do_sample, seed=3, max_new_tokens=12)
    options |= dict(return_dict_in_generate=True, **zoo.left_pad(zoo.prompts()))
    wanted = rgtg_fast.generate(lm, reward_model=model, **options)
    got = rgtg_fast.generate(lm, reward_model=adapter, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(got.rewards, wanted.rewards, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_the_probe_finds_the_tree_right_for_an_adapter(tmp_path):
    _, lm = make_checkpoint(tmp_path)
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    assert rgtg_fast.scorers.make_scorer(adapter, k=4).method == "tree"


def adapted(layers, model):
    """The adapter on a twin of `model`: the twin, and the rows it is on."""
    twins = Twins([model], eval_mode=True)
    rows = layers.switch_on(twins)
    return twins, rows


def test_a_batch_seen_out_of_order_is_not_mixed():
    layer = nn.Linear(3, 2)
    parts = {layer: LowRank(torch.ones(1, 3), torch.ones(2, 1))}
    layers = LowRankLayers(parts, LayerInputs([[layer]], in_order=False))
    twins, rows = adapted(layers, layer)
    rows.next_forward()
    with torch.no_grad():
        twins[layer](torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"first=1.*two forwards"):
        rows.next_forward(1, 2)


def test_a_shared_product_is_never_that_of_an_earlier_input():
    both = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    first, second = both
    parts = {m: LowRank(torch.randn(1, 3), torch.randn(2, 1)) for m in both}
    layers = LowRankLayers(parts, LayerInputs([[first, second]], in_order=True))
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    twins, rows = adapted(layers, both)
    with torch.no_grad():
        wanted = first(y) + y @ parts[first].a.t() @ parts[first].b.t()
        rows.next_forward()
        twins[first](x)  # the second layer never asks for this one
        torch.testing.assert_close(twins[first](y), wanted)
        x.copy_(y)
        rows.next_forward()
        torch.testing.assert_close(twins[first](x), wanted)


def test_another_base_is_a_warning(tmp_path):
    _, lm = make_checkpoint(tmp_path)
    edit_config(tmp_path, base_model_name_or_path="someone/base-7b")
    lm.config._name_or_path = "/models/base-7b"
    RewardAdapter.from_pretrained(lm, tmp_path)
    lm.config._name_or_path = "/models/other-7b"
    with pytest.warns(UserWarning, match=r"trained on 'someone/base-7b' and lm is '/models/other"):
        RewardAdapter.from_pretrained(lm, tmp_path)


def edit_config(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(path, change):
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


UP = "base_model.model.model.layers.0.mlp.up_proj"
HEAD = "base_model.model.score.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "type IA3, LORA is wanted; load it with peft"),
        ({"bias": "all"}, "bias='all'.*train with bias='none'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        ({"use_dora": True}, "uses use_dora=True, plain LoRA is wanted; load it with peft"),
        ({"lora_bias": True}, "uses lora_bias=True"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses layer_replication="),
        ({"target_parameters": ["experts"]}, "uses target_parameters="),
        ({"trainable_token_indices": [1, 2]}, "uses trainable_token_indices="),
        ({"use_something_new": True}, "uses use_something_new=True"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path, changes, message):
    _, lm = make_checkpoint(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        RewardAdapter.from_pretrained(lm, tmp_path)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def replace(key, tensor):
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(HEAD), r"task_type=SEQ_CLS\) holds no trained reward head"),
        (replace(HEAD, torch.ones(3, 32)), r"head has shape \[3, 32\].*num_labels=1"),
        (replace(HEAD, torch.ones(1, 16)), "head of .* for each hidden state of 32 elements"),
        (lambda t: t.pop(UP + ".lora_A.weight"), "lacks .*up_proj.lora_A.weight"),
        (replace(UP + ".lora_B.weight", torch.ones(48, 3)), r"A of shape \[4, 32\] and B of"),
        (
            replace(UP + ".lora_B.weight", torch.ones(50, 4)),
            r"of shape \[50, 32\], in .*\[48, 32\]",
        ),
        (replace(UP + ".lora_A.weight", torch.ones(4, 32).byte()), "has dtype torch.uint8"),
        (replace(UP + ".bias", torch.ones(48)), r"holds '.*up_proj.bias', which is no LoRA"),
        (replace("base_model.model.score.dense.weight", torch.ones(1)), "no linear reward head"),
        (rename(UP + ".lora_A.weight", UP + ".lora_embedding_A"), "holds '.*lora_embedding_A'"),
        (
            lambda t: [
                rename(f"{UP}.lora_{x}.weight", f"{UP[:-2]}.lora_{x}.weight")(t) for x in "AB"
            ],
            "adapts model.layers.0.mlp.up_pr, which LlamaModel does not have",
        ),
        (
            lambda t: [
                rename(f"{UP}.lora_{x}.weight", f"{UP[:-8]}.lora_{x}.weight")(t) for x in "AB"
            ],
            "adapts model.layers.0.mlp, a LlamaMLP; LoRA on nn.Linear and Conv1D",
        ),
        (lambda t: [t.pop(key) for key in list(t) if "lora" in key], "no LoRA weights.*RewardHead"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    _, lm = make_checkpoint(tmp_path)
    edit_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        RewardAdapter.from_pretrained(lm, tmp_path)


def test_an_embedding_adapter_is_refused(tmp_path):
    _, lm = make_checkpoint(tmp_path, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match=r"holds '.*embed_tokens.*load it with peft"):
        RewardAdapter.from_pretrained(lm, tmp_path)


def test_missing_files_are_named(tmp_path):
    lm = zoo.build_lm("llama")
    with pytest.raises(ValueError, match=r"adapter_config.json was not found at .*save_pretrained"):
        RewardAdapter.from_pretrained(lm, tmp_path)
    make_checkpoint(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors was not found"):
        RewardAdapter.from_pretrained(lm, tmp_path)


def test_a_peft_model_as_language_model_is_to_be_merged_first(tmp_path):
    _, lm = make_checkpoint(tmp_path)
    wrapped = peft.get_peft_model(lm, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"lm is a PEFT model.*merge_and_unload"):
        RewardAdapter.from_pretrained(wrapped, tmp_path)


def test_no_second_head_beside_an_adapter(tmp_path):
    _, lm = make_checkpoint(tmp_path)
    adapter = RewardAdapter.from_pretrained(lm, tmp_path)
    with pytest.raises(ValueError, match="reward_head is given beside a RewardAdapter"):
        rgtg_fast.generate(lm, some_ids(), reward_model=adapter, reward_head=nn.Linear(32, 1))
