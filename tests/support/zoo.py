"""Tiny random-weight language and reward models of many architectures, for parity tests.

Weights are drawn again after construction, far larger than any real initialisation, so that
attention is sharp, logits and rewards spread over several units, and near-ties are rare. PAD has an
ordinary non-zero embedding: a model that looks at padding gives a visibly different answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

VOCAB, PAD, EOS, BOS = 72, 0, 1, 2
WINDOW = 5  # sliding windows of the zoo; shorter than the longest prompt of the tests

_IDS = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    "tie_word_embeddings": False,
}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
_LLAMA_MHA = {k: v for k, v in _LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}
_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def _gpt_oss() -> Any:
    return tf.GptOssConfig(
        **_IDS,
        **_LLAMA,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _deepseek_v3() -> Any:
    return tf.DeepseekV3Config(
        **_IDS,
        **(_LLAMA_MHA | {"num_key_value_heads": 4}),
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )


def _llama4() -> Any:
    return tf.Llama4TextConfig(
        **_IDS,
        **_LLAMA,
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=WINDOW,
        no_rope_layers=[1, 0],  # the first layer attends within chunks, the second to all
    )


def _qwen3_next() -> Any:
    return tf.Qwen3NextConfig(
        **_IDS,
        **_LLAMA,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )


def _gemma(cls: Any, **extra: Any) -> Any:
    sliding = {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    }
    return cls(**_IDS, **_LLAMA, **sliding, **extra)


def _falcon(alibi: bool) -> Any:
    return tf.FalconConfig(
        **_IDS,
        **_NO_DROPOUT,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=alibi,
        new_decoder_architecture=False,
        multi_query=not alibi,
        parallel_attn=not alibi,
        bias=alibi,
    )


def _gptj() -> Any:
    return tf.GPTJConfig(**_IDS, **_GPT2, rotary_dim=4, attn_pdrop=0.0, embd_pdrop=0.0)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_IDS, **_LLAMA),
    "qwen2": lambda: tf.Qwen2Config(
        **_IDS,
        **{k: v for k, v in _LLAMA.items() if k != "head_dim"},
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen3": lambda: tf.Qwen3Config(**_IDS, **_LLAMA),
    "mistral": lambda: tf.MistralConfig(**_IDS, **_LLAMA, sliding_window=WINDOW),
    "mixtral": lambda: tf.MixtralConfig(
        **_IDS, **_LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "phi3": lambda: tf.Phi3Config(
        **_IDS, **{k: v for k, v in _LLAMA.items() if k != "head_dim"}, sliding_window=None
    ),
    "olmo2": lambda: tf.Olmo2Config(**_IDS, **_LLAMA_MHA),
    "gpt2": lambda: tf.GPT2Config(**_IDS, **_GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "opt": lambda: tf.OPTConfig(
        **_IDS,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
        activation_function="gelu",
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_IDS, **_LLAMA_MHA),
    "gptj": _gptj,
    "falcon_rope": lambda: _falcon(alibi=False),
    "falcon_alibi": lambda: _falcon(alibi=True),
    "bloom": lambda: tf.BloomConfig(**_IDS, **_NO_DROPOUT, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: tf.MptConfig(**_IDS, d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        **_IDS,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=128,
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
    ),
    "gemma2": lambda: _gemma(tf.Gemma2Config, attn_logit_softcapping=5.0),
    "gemma3": lambda: _gemma(tf.Gemma3TextConfig),
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "llama4": _llama4,
    "qwen3_next": _qwen3_next,
    "mamba": lambda: tf.MambaConfig(
        **_IDS, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4
    ),
    "bert": lambda: tf.BertConfig(**_IDS, **_BERT),
    "roberta": lambda: tf.RobertaConfig(**_IDS, **_BERT),
    "deberta_v2": lambda: tf.DebertaV2Config(
        **_IDS,
        **_BERT,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    ),
}

ENCODERS = ("bert", "roberta", "deberta_v2")
RECURRENT = ("qwen3_next", "mamba")
NO_TREE = ("bloom", "mpt", "gpt_neo", "falcon_alibi", *RECURRENT, *ENCODERS)
EAGER = ("gpt_oss", "gptj")  # no (correct) sdpa path for these
LMS = tuple(n for n in CONFIGS if n not in (*ENCODERS, "qwen3_next"))
RMS = (*CONFIGS, "gemma2_eager")
_V_HEADED = {"llama4": ("Llama4", "Llama4TextModel"), "mamba": ("Mamba", "MambaModel")}
_RM_NAMES = {
    "gpt_neox": "GPTNeoX", "gpt2": "GPT2", "gpt_neo": "GPTNeo", "gptj": "GPTJ",
    "gemma3": "Gemma3Text", "opt": "OPT", "gpt_oss": "GptOss", "deepseek_v3": "DeepseekV3",
    "qwen3_next": "Qwen3Next", "deberta_v2": "DebertaV2",
}  # fmt: skip


def redraw(model: nn.Module, seed: int, std: float = 0.3) -> nn.Module:
    """Draw every weight again (matrices N(0, std), biases N(0, 0.1), norm gains near 1)."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "A_log" in name or name.endswith("dt_proj.bias"):
                continue  # state-space decay rates: keep the stable initialisation
            noise = torch.randn(p.shape, generator=g)
            if p.ndim >= 2:
                p.copy_(noise * std)
            elif name.endswith("bias"):
                p.copy_(noise * 0.1)
            else:
                p.add_(noise * 0.1)
    return model.eval()


def v_headed(
    config: Any, pretrained: type, base: type, head: str = "v_head", mlp: bool = False
) -> nn.Module:
    """A reward model as found in the wild: base model plus a head on the last position."""

    class VHeadRewardModel(pretrained):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            setattr(self, self.base_model_prefix, base(config))
            width = config.hidden_size
            linear = nn.Linear(width, 1, bias=False)
            deep = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
            setattr(self, head, deep if mlp else linear)
            self.post_init()

        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:
            out = self.base_model(input_ids=input_ids, attention_mask=attention_mask)
            last = out.last_hidden_state[:, -1]
            return SequenceClassifierOutput(logits=getattr(self, head)(last))

    return VHeadRewardModel(config)


def config_of(name: str, **overrides: Any) -> Any:
    config = CONFIGS[name.removesuffix("_eager")]()
    for key, value in overrides.items():
        setattr(config, key, value)
    if name in EAGER or name.endswith("_eager"):
        config._attn_implementation = "eager"  # elsewhere what Hugging Face picks
    return config


def build_lm(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A fresh causal LM of family `name`; PAD is never proposed (generation config)."""
    with torch.random.fork_rng(devices=[]):  # a cached model must not depend on, or move, it
        torch.manual_seed(seed)
        lm = redraw(tf.AutoModelForCausalLM.from_config(config_of(name, **overrides)), seed)
    lm.generation_config.suppress_tokens = [PAD]
    lm.generation_config.pad_token_id = PAD
    lm.generation_config.eos_token_id = None  # tests name the token that ends their rows
    return lm


def build_rm(name: str, seed: int = 1, **overrides: Any) -> Any:
    """A fresh reward model (one label) of family `name`, never sharing weights with an LM."""
    config = config_of(name, **({"num_labels": 1} | overrides))
    family = name.removesuffix("_eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family in _V_HEADED:
            prefix, base = _V_HEADED[family]
            rm = v_headed(config, getattr(tf, prefix + "PreTrainedModel"), getattr(tf, base))
        else:
            stem = _RM_NAMES.get(family, family.split("_")[0].capitalize())
            rm = getattr(tf, stem + "ForSequenceClassification")(config)
    return redraw(rm, seed + 1000, std=0.6 if name in ENCODERS else 0.3)


lm = functools.cache(build_lm)
rm = functools.cache(build_rm)


def prompts(seed: int = 7, lengths: tuple[int, ...] = (9, 2, 14)) -> list[torch.Tensor]:
    """Unpadded int64 prompts without special tokens; the second is mostly padding in a batch."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=g) for n in lengths]


def left_pad(rows: list[torch.Tensor], pad: int = PAD) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [B, L] of unpadded rows."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
