"""Adapters with a reward head as PEFT saves them."""

import peft
import torch
import zoo
from torch import nn


def make_checkpoint(path, family="llama", dtype=torch.float32, bias=False, rm_changes=(), **lora):
    """A saved adapter with nothing zero in it: the PEFT model, and the LM on the same base."""
    lm = zoo.build_lm(family).to(dtype)
    rm = zoo.build_rm(family, **dict(rm_changes)).to(dtype)
    if not rm_changes:
        rm.base_model.load_state_dict(lm.base_model.state_dict())
    if bias:
        rm.score = nn.Linear(rm.score.in_features, rm.score.out_features, dtype=dtype)
    options = {"task_type": "SEQ_CLS", "r": 4, "target_modules": "all-linear"} | lora
    model = peft.get_peft_model(rm, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    model.save_pretrained(path)
    return model.eval(), lm
