"""Kernels that a guided token launches at the shape of 8B + 8B, before and after `torch.compile`.

    python bench/bench_launches.py

Needs no GPU. Before: every operator of a step that is no view is one kernel, counted on a tape over
tiny models of 32 + 32 layers (the difference between a call of n and one of n + 1 tokens; attention
and top-k are two kernels each on a GPU). After: inductor writes the programs of the two forwards,
in the true shape and on tensors without data, and the calls in them are counted: matrix products,
attention, and kernels of its own. (Written for a CPU: torch without CUDA cannot trace tensors of a
GPU. What is fused into one kernel is decided before the code of either is written.) What is not in
the forwards is the same in both.
"""

import argparse
import contextlib
import json
import re
from collections import Counter
from unittest import mock

import torch
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import rgtg_fast
from rgtg_fast.models import compiled, siblings
from rgtg_fast.models.attention import TRACED
from rgtg_fast.models.foreign import set_attention
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.reward_model import RewardModel

SHAPE = {"num_attention_heads": 32, "num_key_value_heads": 8}
TRUE = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
TINY = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
NO_SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
ON_A_GPU = {"candidate_attention": 2, "topk_logprobs": 2}  # kernels of one call, where not one
NO_KERNEL = ("empty", "detach", "_unsafe_view", "lift_fresh", "_local_scalar_dense")


def models(layers, sizes, dtype=torch.float32):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        config = LlamaConfig(num_hidden_layers=layers, **SHAPE, **sizes, **NO_SPECIAL)
        lm = LlamaForCausalLM(config).eval()
        config.num_labels = 1
        return lm, LlamaForSequenceClassification(config).eval()
    finally:
        torch.set_default_dtype(before)


class Tape(TorchDispatchMode):
    """Counts kernels, those of the siblings' forwards apart."""

    def __init__(self):
        super().__init__()
        self.all, self.in_forwards, self.inside = Counter(), Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        views = not writes and any(r.alias_info for r in func._schema.returns)
        if not views and not name.startswith(NO_KERNEL):
            self.all[name] += ON_A_GPU.get(name, 1)
            if self.inside:
                self.in_forwards[name] += ON_A_GPU.get(name, 1)
        return out


def count_eager(layers, k, dtype):
    """Kernels of one token: all, and those of the siblings' forwards."""
    torch.manual_seed(0)
    lm, rm = models(layers, TINY, dtype)
    ids = torch.randint(0, TINY["vocab_size"], (1, 16))
    whole, tape = siblings.SiblingForward.siblings, None

    def marked(*args, **kwargs):
        tape.inside = True
        try:
            return whole(*args, **kwargs)
        finally:
            tape.inside = False

    def run(new):
        nonlocal tape
        options = {
            "k": k,
            "max_new_tokens": new,
            "check_nan": False,
            "sync_every": 1000,
            "speculate": False,
        }
        mask = torch.ones_like(ids)
        with Tape() as tape, mock.patch.object(siblings.SiblingForward, "siblings", marked):
            rgtg_fast.generate(
                lm, ids, attention_mask=mask, reward_model=rm, compile=False, **options
            )
        return tape

    run(2)  # the probe's forwards
    few, more = run(3), run(4)
    return more.all - few.all, more.in_forwards - few.in_forwards


class Written(Exception):
    """The program is there; its kernels need not be compiled."""


@contextlib.contextmanager
def written_only(programs):
    """Compilations go as far as `programs`, the sources that would launch the kernels."""
    codegen = GraphLowering.codegen

    def keep(graph):
        programs.append(codegen(graph)[0].value)
        raise Written

    with mock.patch.object(GraphLowering, "codegen", keep):
        yield


def without_data(model):
    """Give a model tensors without data."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            empty = torch.empty(p.shape, dtype=p.dtype)
            module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
        for name, b in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(b.shape, dtype=b.dtype))


LAUNCH = re.compile(
    r"^\s+(?:\w+ = )?(?:(cpp)_fused\w*|extern_kernels\.(\w+)|torch\.ops\.(\w+\.\w+))", re.M
)


def count_compiled(parts, k):
    """Kernels that inductor would launch for the forward of k siblings."""
    twin = parts.twin()
    config = twin.text_config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    dim = config.hidden_size // config.num_attention_heads
    for own in twin.twins.configs:
        set_attention(own, "rgtg_candidates")
        own.__dict__[TRACED] = None
    store = torch.empty(2 * layers, 1, heads, k + 640, dim, dtype=parts.dtype)
    ids, position = (torch.zeros((1, n), dtype=torch.int64) for n in (k, 1))
    starts = torch.zeros((1, 1, 1, 1), dtype=torch.int64)
    lengths = torch.zeros((1,), dtype=torch.int64)
    kernel = torch.ops.rgtg_fast.candidate_attention.default
    programs, places = [], [(0, i) for i in range(2 * layers)]
    run = compiled.Kept().run
    arguments = (twin, twin.twins.configs, kernel, k, places, ids, position, starts, [store])
    with written_only(programs), contextlib.suppress(torch._inductor.exc.InductorError):
        run(*arguments, lengths)
    (program,) = programs
    body = program[program.index("def call(") :]
    found = Counter("".join(names) for names in LAUNCH.findall(body))
    return Counter(
        {name: count * ON_A_GPU.get(name.split(".")[-1], 1) for name, count in found.items()}
    ), program


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=10, help="candidates per token (10)")
    parser.add_argument("--layers", type=int, default=32, help="of each model (32)")
    parser.add_argument("--json", help="write the counts there")
    parser.add_argument("--programs", help="write what inductor made of the forwards there")
    args = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):  # norms and rotary embeddings cast bf16 to fp32
        every, forwards = count_eager(args.layers, args.k, dtype)
        beside = every - forwards
        counts = f"{every.total()}, in the forwards {forwards.total()}, beside {beside.total()}"
        print(f"on the tape, {dtype}: {counts}", flush=True)
    with torch.device("meta"):
        lm, rm = models(args.layers, TRUE, torch.bfloat16)
    with FakeTensorMode():
        without_data(lm), without_data(rm)
        of_lm, lm_program = count_compiled(LanguageModel(lm), 1)
        of_rm, rm_program = count_compiled(RewardModel(rm), args.k)
    if args.programs:
        with open(args.programs, "w") as file:
            file.write(lm_program + rm_program)
    counts = {
        "before": every.total(),
        "before, in the forwards": forwards.total(),
        "after": beside.total() + of_lm.total() + of_rm.total(),
        "after, forward of the language model": of_lm.total(),
        "after, forward of the reward model": of_rm.total(),
        "beside the forwards": beside.total(),
    }
    for name, count in counts.items():
        print(f"{count:6d}  {name}")
    for name, tape in (("before", every), ("lm", of_lm), ("rm", of_rm), ("beside", beside)):
        print(f"{name}: {dict(tape.most_common())}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(counts, file, indent=1)


if __name__ == "__main__":
    main()
