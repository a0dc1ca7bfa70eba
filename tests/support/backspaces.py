"""Tiny language models with a backspace, which no reward model knows."""

import functools

import torch
import zoo
from torch import nn

BACK = zoo.VOCAB  # the id behind those of the reward models


@functools.cache
def lm(name="llama", likely=5.0):
    """One that often takes back a token, the more the larger `likely`; it has no other suppressed
    token and no EOS."""
    model = zoo.build_lm(name, vocab_size=zoo.VOCAB + 1)
    model.generation_config.suppress_tokens = None
    old = model.get_output_embeddings()
    head = nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        head.bias.zero_()
        head.bias[BACK] = likely
        head.bias[zoo.PAD] = -100  # a public forward of a reward model would pass over it
    model.set_output_embeddings(head)
    return model.eval()
