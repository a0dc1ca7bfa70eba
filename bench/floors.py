"""The weight-read floor: what a decode step costs if it only reads its weights, once.

    floor = bytes of the weights a step must read / copy bandwidth of this machine in this run

Input embeddings are not counted (a step reads a row of them) unless they are the LM head as well.
The bandwidth is that of `copy_` on a buffer of 256 MB on CPU and 1 GB on CUDA, bytes read and
written counted, as GPU figures usually do. The read-only rate (a sum) is recorded beside it.
"""

import torch
from published import now

from rgtg_fast.cli.costs import weights_of


def weight_bytes(*models):
    """Bytes of the parameters of `models` that a step reads: shared ones once, no embeddings."""
    read = {id(p): p.nbytes for model in models for p in weights_of(model)}
    return sum(read.values())


def adapter_bytes(peft_model):
    """Bytes of the low-rank weights and of the head of a PEFT reward model."""
    named = peft_model.named_parameters()
    own = [p for n, p in named if "lora_" in n or "modules_to_save" in n]
    return sum(p.numel() * p.element_size() for p in own)


def floor_ms(size, gigabytes_per_second):
    """Milliseconds to read `size` bytes."""
    return size / gigabytes_per_second / 1e6


def bandwidth(device="cpu", megabytes=None):
    """GB/s of a copy (bytes read + written) and of a read-only sum, the best of three each."""
    megabytes = megabytes or (1024 if torch.device(device).type == "cuda" else 256)
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    source.sum()
    rates = {"copy_gb_s": 0.0, "read_gb_s": 0.0}
    for _ in range(3):
        start = now(device)
        target.copy_(source)
        copied = now(device)
        source.sum()
        summed = now(device)
        for name, size, spent in (
            ("copy_gb_s", 2 * source.nbytes, copied - start),
            ("read_gb_s", source.nbytes, summed - copied),
        ):
            rates[name] = max(rates[name], size / spent / 1e9)
    return rates
