"""Models and calls that run by CUDA graph, for its emulation and for a real GPU."""

import inspect
from pathlib import Path

import torch
import zoo

BATCH = zoo.left_pad(zoo.prompts())
WIDTH = BATCH["input_ids"].shape[1]
# The families that run on the sibling cache with the attention plug-in.
LMS = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "olmo2", "gpt2", "gpt_neox")
# Of the last, transformers 5.17 forgets the softcap, but for eager attention.
LMS += ("gemma3", "llama4", "gemma2_eager")
RMS = (*LMS, "phi3", "opt")
PROCESSORS = {
    "top_k": 9,
    "top_p": 0.7,
    "min_p": 0.05,
    "typical_p": 0.8,
    "epsilon_cutoff": 0.02,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "suppress_tokens": [zoo.PAD, 7, 8],
}


class OddNorm(torch.nn.Module):
    """A module that asks the device something; at the `limit`-th call only, as a lazy set-up."""

    def __init__(self, norm, limit=0):
        super().__init__()
        self.norm, self.limit, self.calls = norm, limit, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > self.limit and bool((x != x).any()):
            return x
        return self.norm(x)

    @classmethod
    def asks_at(cls):
        """The file and line of the question, as a traceback says them."""
        lines, first = inspect.getsourcelines(cls.forward)
        (at,) = (n for n, line in enumerate(lines, first) if "bool(" in line)
        return f"{Path(__file__).name}:{at}"
