"""Registers the Triton kernels as ``torch.ops.rgtg_fast_triton.*`` on import.

The schemas are those of ``torch.ops.rgtg_fast.*``. As operators the launches are opaque to
``torch.compile`` and can be captured; plain ``torch.library`` registration keeps the overhead of a
call at that of one Python callback.
"""

import torch

from rgtg_fast.ops import fakes

from .candidate_attention import candidate_attention
from .launch import INTERPRETED
from .prefix_bt_loss import prefix_bt_loss
from .ratio_sample import ratio_sample
from .ratio_step import ratio_step
from .reward_head import reward_head
from .topk_logprobs import topk_logprobs
from .vocab_reward import vocab_reward

__all__ = ["INTERPRETED", "OPS"]

_SAMPLER = "Tensor beta, Tensor temperature, Tensor seed, Tensor position, bool do_sample"

OPS = {
    "topk_logprobs": (topk_logprobs, "(Tensor logits, int k) -> (Tensor logprobs, Tensor ids)"),
    "reward_head": (reward_head, "(Tensor hidden, Tensor weight, Tensor? bias=None) -> Tensor"),
    "vocab_reward": (vocab_reward, "(Tensor hidden, Tensor weight, Tensor ids) -> Tensor"),
    "ratio_sample": (
        ratio_sample,
        f"(Tensor logprobs, Tensor rewards, Tensor ids, {_SAMPLER}) -> (Tensor slot, Tensor logq)",
    ),
    "ratio_step": (
        ratio_step,
        f"(Tensor logprobs, Tensor hidden, Tensor weight, Tensor ids, {_SAMPLER}, "
        "Tensor? bias=None) -> (Tensor slot, Tensor rewards, Tensor logq)",
    ),
    "candidate_attention": (
        candidate_attention,
        "(Tensor q, Tensor k_prefix, Tensor v_prefix, Tensor k_self, Tensor v_self, Tensor start, "
        "Tensor length, float scale, int? window=None, float? softcap=None) -> Tensor",
    ),
    "prefix_bt_loss": (
        prefix_bt_loss,
        "(Tensor r_chosen, Tensor r_rejected, Tensor len_chosen, Tensor len_rejected, "
        "Tensor weights, Tensor margin, float label_smoothing, float centering, int first) -> "
        "(Tensor loss, Tensor grad_chosen, Tensor grad_rejected)",
    ),
}

_library = torch.library.Library("rgtg_fast_triton", "DEF")
for _name, (_launcher, _schema) in OPS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _launcher, "CPU")
    _library.impl(_name, _launcher, "CUDA")
fakes.register("rgtg_fast_triton")
