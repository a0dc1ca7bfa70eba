"""The models of the generation benchmark: random weights in well-known shapes."""

import copy
import tempfile

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

import rgtg_fast

SHAPES = {
    "gpt2": "GPT-2 124M shape",
    "llama": "Llama shape, 124M",
    "llama-8b": "Llama-3.1-8B shape",
}
CLASSES = {
    "gpt2": (GPT2LMHeadModel, GPT2ForSequenceClassification),
    "llama": (LlamaForCausalLM, LlamaForSequenceClassification),
    "llama-8b": (LlamaForCausalLM, LlamaForSequenceClassification),
}
NO_SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# What picks models and calls, in more than one benchmark.
ARGUMENTS = {
    "--shape": {"choices": [*SHAPES], "default": "llama"},
    "--dtype": {"choices": ["float32", "bfloat16", "float16"], "default": "float32"},
    "--device": {"default": "cpu"},
    "--prompt": {"type": int, "default": 128},
    "--k": {"type": int, "default": 10},
    "--small": {"type": int, "help": "a tiny vocabulary and model instead, to see that it runs"},
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def model_config(shape, positions, small=None):
    """The configuration of `shape`; `small` is a vocabulary size: 2 layers, 64 wide, of that.

    Small models get wide weights, so that greedy answers vary and a wrong choice shows.
    """
    if shape == "gpt2":
        size = {"n_positions": max(1024, positions)}
        if small:
            size |= {"n_embd": 64, "n_layer": 2, "n_head": 4}
            size |= {"vocab_size": small, "initializer_range": 0.3}
        return GPT2Config(**size, **NO_SPECIAL)
    size = {
        "vocab_size": 50257,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": max(2048, positions),
        "tie_word_embeddings": True,
    }
    if shape == "llama-8b":
        size = {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": max(131072, positions),
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": False,
        }
    if small:
        size |= {"vocab_size": small, "hidden_size": 64, "intermediate_size": 176}
        size |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
        size |= {"initializer_range": 0.3}
    return LlamaConfig(**size, **NO_SPECIAL)


def build_models(shape, positions, dtype, device="cpu", small=None):
    """LM and one-label reward model of one shape, random weights, frozen, in eval mode."""
    torch.manual_seed(0)
    config = model_config(shape, positions, small)
    language_model, reward_model = CLASSES[shape]
    if shape != "llama-8b":
        lm = language_model(config)
        config.num_labels = 1
        models = lm, reward_model(config)
        return [m.to(device, dtype).eval().requires_grad_(False) for m in models]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in this dtype: no fp32 copy in host memory
    try:
        with torch.device(device):
            lm = language_model(config)
            config.num_labels = 1
            models = lm, reward_model(config)
    finally:
        torch.set_default_dtype(before)
    return [m.eval().requires_grad_(False) for m in models]


@torch.no_grad()
def sharpen(lm, k, nats):
    """Scale the output layer of `lm`, apart from the embeddings from then on, so that the `k` most
    likely tokens have an entropy of `nats` among themselves, on average over a random text.

    Those of random weights are nearly alike, so that top-p cuts nothing; a trained model's have 0.8
    nats or so.
    """
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, lm.config.vocab_size, (1, 64), generator=generator)
    logits = lm(ids.to(lm.device)).logits[0].float().topk(k).values
    low, high = 1e-3, 1e3
    for _ in range(60):
        scale = (low * high) ** 0.5
        p = (scale * logits).softmax(-1)
        entropy = torch.special.entr(p).sum(-1).mean().item()
        low, high = (scale, high) if entropy > nats else (low, scale)
    old = lm.get_output_embeddings()
    head = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
    head.weight = nn.Parameter(old.weight * scale, requires_grad=False)
    lm.config.tie_word_embeddings = False
    lm.set_output_embeddings(head.eval())


def reward_head_of(lm):
    """Random weights fp32-drawn [1, H] of a reward head for hidden states of `lm`."""
    size = lm.config.hidden_size
    weight = torch.randn((1, size), generator=torch.Generator().manual_seed(1))
    return (0.5 * weight / size**0.5).to(lm.device, lm.dtype)


def classifier_on(base, lm, weight):
    """A sequence classifier with one label on `base`, whose head is `weight` [1, H]."""
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    classes = next(c for c in CLASSES.values() if isinstance(lm, c[0]))
    with torch.device("meta"):
        model = classes[1](config)
    setattr(model, model.base_model_prefix, base)
    model.score = nn.Linear(weight.shape[1], 1, bias=False, device=lm.device, dtype=lm.dtype)
    model.score.weight.data.copy_(weight)
    return model.eval().requires_grad_(False)


def head_on_base(lm):
    """A reward head on the LM's hidden state -> the one-forward object, the same as a model."""
    weight = reward_head_of(lm)
    return rgtg_fast.RewardHead(lm, weight[0]), classifier_on(lm.base_model, lm, weight)


def peft_reward_model(lm, folder):
    """A LoRA reward model on a copy of the LM's base, as a checkpoint in `folder` too.

    Rank 8 on every linear layer, random and not zero, in the LM's dtype.
    """
    from peft import LoraConfig, get_peft_model

    model = classifier_on(copy.deepcopy(lm.base_model), lm, reward_head_of(lm))
    config = LoraConfig(task_type="SEQ_CLS", fan_in_fan_out=isinstance(lm, GPT2LMHeadModel), **LORA)
    torch.manual_seed(2)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False).to(lm.dtype)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return peft_model.eval().requires_grad_(False)


def adapter_on_base(lm):
    """A LoRA adapter with a head on the LM -> the one-forward object, the separate model."""
    with tempfile.TemporaryDirectory() as folder:
        separate = peft_reward_model(lm, folder)
        return rgtg_fast.RewardAdapter.from_pretrained(lm, folder), separate
