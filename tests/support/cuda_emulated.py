"""The CUDA kernels on the CPU: ``OPS[name]`` takes the arguments of ``torch.ops.rgtg_fast.<name>``.

csrc/cuda/*.cuh is compiled by g++ against tests/support/simt, once per state of the sources. Inputs
are copied to memory with NaN around them and wherever a view has gaps; outputs and workspace begin
as NaN. Every op runs once in memory that ends at a page nobody may touch, then, aligned as torch's
memory is, in several orders of the blocks and threads, whose results must be the same bit for bit.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from cuda_memory import ELEMENTS, Attention, Buffers, Head, Mix, Pair, Ratio, Topk, Vocab

from rgtg_fast.ops.reference import OPS as REGISTERED

ROOT = Path(__file__).parents[2]
SIMT = ROOT / "tests" / "support" / "simt"
FORWARD, REVERSE, RANDOM = 0, 1, 7
ORDERS = (FORWARD, REVERSE, RANDOM)
PROCESSORS = 132  # of an H200

_FLAGS = ["-std=c++20", "-O2", "-g", "-ffp-contract=off", "-fno-strict-aliasing", "-fdata-sections"]
_FLAGS += ["-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-fvisibility=hidden"]


def build(csrc=ROOT / "csrc"):
    """Compiles the kernels under ``csrc`` unless that was done before; returns the library."""
    sources = sorted([*csrc.glob("*.h"), *csrc.glob("cuda/*.cuh"), *csrc.glob("cuda/*.h")])
    sources += sorted(p for p in SIMT.rglob("*") if p.is_file())
    text = b"".join(p.name.encode() + p.read_bytes() for p in sources)
    key = hashlib.sha256(text + " ".join(_FLAGS).encode()).hexdigest()[:16]
    cache = ROOT / "build" / "simt"
    library = cache / f"{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Under a name of its own until it is whole: parallel test workers may build at once.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [os.environ.get("CXX", "g++"), *_FLAGS, f"-I{SIMT}", f"-I{csrc}"]
            command += [str(source) for source in sorted(SIMT.glob("*.cpp"))]
            command += [f"-Wl,-T,{SIMT / 'shared_memory.ld'}", "-o", f"{scratch}/simt.so"]
            subprocess.run(command, check=True)
            os.replace(f"{scratch}/simt.so", library)
    return library


class Emulator:
    """The kernels of one build, run in the given orders of the threads."""

    def __init__(self, library, orders=ORDERS):
        self.library = ctypes.CDLL(str(library))
        self.library.simt_error.restype = ctypes.c_char_p
        self.library.simt_allocate.restype = ctypes.c_void_p
        self.library.simt_allocate.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_bool]
        self.library.simt_free.argtypes = [ctypes.c_void_p]
        self.library.simt_attention_splits.argtypes = [ctypes.c_int64] * 3
        self.library.simt_topk_workspace_words.restype = ctypes.c_int64
        self.library.simt_mix_workspace_words.restype = ctypes.c_int64
        self.library.simt_mix_slicing.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_int]
        self.library.simt_mix_slicing.argtypes += [ctypes.POINTER(ctypes.c_int)]
        self.library.simt_mix_slicing.restype = ctypes.c_int64
        self.library.simt_ordered.restype = ctypes.c_uint32
        self.library.simt_exceeds.restype = ctypes.c_bool
        self.orders = orders
        self.processors = PROCESSORS

    def launch(self, name, *arguments):
        if getattr(self.library, f"simt_{name}")(*arguments) != 0:
            raise AssertionError(f"{name}: {self.library.simt_error().decode()}")

    def in_every_order(self, run):
        """``run(buffers)`` in each order; its outputs, which must not depend on the order."""
        with Buffers(self.library, at_guard=True) as buffers:
            self.library.simt_set_order(FORWARD)
            run(buffers)
        first = None
        for order in self.orders:
            self.library.simt_set_order(order)
            with Buffers(self.library) as buffers:
                outputs = [buffers.read(output) for output in run(buffers)]
            if first is None:
                first = outputs
            elif not all(_same_bits(a, b) for a, b in zip(first, outputs, strict=True)):
                raise AssertionError("the result depends on the order of the threads")
        return first

    def topk_slicing(self, dtype, rows, vocab, processors=PROCESSORS):
        """(slices of a row, stripes of a slice) as the launch chooses them."""
        stripes = ctypes.c_int()
        sizes = (ELEMENTS[dtype], ctypes.c_int64(rows), ctypes.c_int64(vocab), processors)
        slices = self.library.simt_topk_slicing(*sizes, ctypes.byref(stripes))
        return slices, stripes.value

    def topk_logprobs(self, logits, k, slicing=None):
        rows = len(logits)

        def run(buffers):
            logprobs, ids = buffers.new((rows, k), torch.float32), buffers.new((rows, k))
            if rows:
                a = self.topk_arguments(buffers, logits, k, slicing)
                a.logprobs, a.ids = logprobs[0], ids[0]
                self.launch("topk_logprobs", ELEMENTS[logits.dtype], ctypes.byref(a))
            return logprobs, ids

        return tuple(self.in_every_order(run))

    def topk_pushes(self, logits, k, slicing):
        """(keys queued, rounds of the busiest lanes, warps that queued) of one launch."""
        counts = (ctypes.c_uint64 * 3)()
        next(self.topk_replays([logits], k, slicing))
        self.library.simt_pushes(counts)
        return tuple(counts)

    def topk_replays(self, inputs, k, slicing=None):
        """Results for each of ``inputs``, launched in turn with one workspace and one token."""
        self.library.simt_set_order(FORWARD)
        with Buffers(self.library) as buffers:
            a = self.topk_arguments(buffers, inputs[0], k, slicing)
            for logits in inputs:
                rows = len(logits)
                logprobs, ids = buffers.new((rows, k), torch.float32), buffers.new((rows, k))
                a.logits, a.logprobs, a.ids = buffers.put(logits), logprobs[0], ids[0]
                self.launch("topk_logprobs", ELEMENTS[logits.dtype], ctypes.byref(a))
                yield buffers.read(logprobs), buffers.read(ids)

    def ordered(self, floats):
        return [self.library.simt_ordered(ctypes.c_float(x)) for x in floats]

    def exceeds(self, floats, code):
        code = ctypes.c_uint32(code)
        return [self.library.simt_exceeds(ctypes.c_float(x), code) for x in floats]

    def topk_arguments(self, buffers, logits, k, slicing=None):
        dense = _dense_last(logits)
        rows, vocab = dense.shape
        slices, stripes = slicing or self.topk_slicing(dense.dtype, rows, vocab)
        words = rows * slices * self.library.simt_topk_workspace_words()
        a = Topk(buffers.put(dense), rows, vocab, dense.stride(0), k, slices, stripes)
        a.workspace, a.token = buffers.new((words,))[0], 0x5EED
        return a

    def mix_slicing(self, rows, reach, processors=PROCESSORS):
        """(slices of a row, tiles of a slice) as the launch chooses them."""
        tiles = ctypes.c_int()
        slices = self.library.simt_mix_slicing(rows, reach, processors, ctypes.byref(tiles))
        return slices, tiles.value

    def mix_logits(
        self, logits, weights, k, floor=None, temperature=None, seed=None, position=None,
        slicing=None,
    ):  # fmt: skip
        dense = [_dense_last(x) for x in logits]
        rows, count = weights.shape

        def run(buffers):
            shapes = [((rows, k), torch.float32), ((rows, k), torch.int64)]
            shapes += [((rows, k), torch.float32)]
            shapes += [((0 if temperature is None else rows,), torch.float32)] * 2
            outputs = [buffers.new(*shape) for shape in shapes]
            if rows:
                reach = max(x.shape[1] for x in dense)
                slices, tiles = slicing or self.mix_slicing(rows, reach)
                a = Mix(rows=rows, count=count, k=k, slices=slices, tiles=tiles, token=0x5EED)
                for i, x in enumerate(dense):
                    setattr(a, f"logits{i}", buffers.operand(x))
                    setattr(a, f"vocab{i}", x.shape[1])
                    setattr(a, f"stride{i}", x.stride(0))
                given = dict(weights=weights, floor=floor, temperature=temperature, seed=seed)
                for name, tensor in {**given, "position": position}.items():
                    if tensor is not None:
                        setattr(a, name, buffers.put(tensor.contiguous()))
                words = rows * slices * self.library.simt_mix_workspace_words()
                a.workspace = buffers.new((words,))[0]
                a.scores, a.ids, a.logprobs, a.log_norm, a.kl = (pointer for pointer, *_ in outputs)
                self.launch("mix_logits", ctypes.byref(a))
            return outputs

        return tuple(self.in_every_order(run))

    def reward_head(self, hidden, weight, bias=None):
        def run(buffers):
            head, rewards = _head(buffers, hidden, weight, bias)
            if head.rows * head.k:
                self.launch("reward_head", ctypes.byref(head))
            return (rewards,)

        return self.in_every_order(run)[0]

    def vocab_reward(self, hidden, weight, ids):
        def run(buffers):
            rewards = buffers.new(ids.shape, torch.float32)
            if ids.numel():
                vectors, table = _dense_last(hidden), _dense_last(weight)
                a = Vocab(buffers.operand(table), *table.shape, table.stride(0))
                a.hidden, a.hidden_stride = buffers.operand(vectors), vectors.stride(0)
                a.ids, a.rewards = buffers.put(ids.contiguous()), rewards[0]
                a.rows, a.k = ids.shape
                self.launch("vocab_reward", ctypes.byref(a))
            return (rewards,)

        return self.in_every_order(run)[0]

    def ratio_sample(self, logprobs, rewards, *rest):
        def run(buffers):
            given = buffers.put(rewards.contiguous())
            ratio, slot, logq = _ratio(buffers, logprobs, given, *rest)
            if ratio.rows:
                self.launch("ratio_sample", ctypes.byref(ratio))
            return slot, logq

        return tuple(self.in_every_order(run))

    def ratio_step(
        self,
        logprobs,
        hidden,
        weight,
        ids,
        beta,
        temperature,
        seed,
        position,
        do_sample,
        bias=None,
    ):
        def run(buffers):
            head, rewards = _head(buffers, hidden, weight, bias)
            rest = (ids, beta, temperature, seed, position, do_sample)
            ratio, slot, logq = _ratio(buffers, logprobs, rewards[0], *rest)
            if ratio.rows:
                self.launch("ratio_step", ctypes.byref(head), ctypes.byref(ratio))
            return slot, rewards, logq

        return tuple(self.in_every_order(run))

    def candidate_attention(
        self, q, keys, values, own_key, own_value, start, length, scale, window=None, softcap=None,
        rows=None,
    ):  # fmt: skip
        tensors = [_dense_last(t) for t in (q, keys, values, own_key, own_value)]
        batch, k, query_heads, width = q.shape
        stores, heads, prefix, _ = keys.shape
        group = query_heads // heads
        per = 16 // q.element_size()
        aligned = not any(
            width % per or t.storage_offset() % per or any(s % per for s in t.stride()[:3])
            for t in tensors
        )

        def run(buffers):
            out = buffers.new(q.shape, q.dtype)
            if not q.numel():
                return (out,)
            programs = batch * heads * -(-k * group // 64)
            splits = self.library.simt_attention_splits(programs, prefix, self.processors)
            bounds = [
                None if t is None else buffers.put(t.contiguous()) for t in (start, length, rows)
            ]
            a = Attention(*(buffers.put(t) for t in tensors), *bounds)
            a.q_row, a.q_slot, a.q_head = tensors[0].stride()[:3]
            a.k_row, a.k_head, a.k_step = tensors[1].stride()[:3]
            a.v_row, a.v_head, a.v_step = tensors[2].stride()[:3]
            a.own_k_row, a.own_k_slot, a.own_k_head = tensors[3].stride()[:3]
            a.own_v_row, a.own_v_slot, a.own_v_head = tensors[4].stride()[:3]
            a.batch, a.k, a.heads, a.group, a.width, a.stores = (
                batch,
                k,
                heads,
                group,
                width,
                stores,
            )
            a.prefix, a.window, a.splits = prefix, window or 0, splits
            a.scale, a.softcap, a.aligned, a.out = scale, softcap or 0.0, aligned, out[0]
            states = (batch * heads, k * group, splits if splits > 1 else 0)
            padded = 64 if width <= 64 else 128 if width <= 128 else 256
            a.partials = buffers.new((*states, padded), torch.float32)[0]
            a.peaks, a.sums = (buffers.new(states, torch.float32)[0] for _ in range(2))
            self.launch("candidate_attention", ELEMENTS[q.dtype], ctypes.byref(a))
            return (out,)

        return self.in_every_order(run)[0]

    def attention_tile(self, few):
        """Facts of the tile of candidate_attention in bf16 of width 128; ``few`` queries."""
        facts = [ctypes.c_int() for _ in range(3)]
        self.library.simt_attention_tile(ctypes.c_bool(few), *map(ctypes.byref, facts))
        return dict(zip(("keys", "stages", "bytes"), (f.value for f in facts), strict=True))

    def prefix_bt_loss(self, chosen, rejected, *rest):
        *vectors, smoothing, centering, first = rest
        dtype = torch.promote_types(chosen.dtype, torch.float32)

        def run(buffers):
            rows, width = chosen.shape
            outputs = [buffers.new(shape, dtype) for shape in ((rows,), *[(rows, width)] * 2)]
            if rows:
                dense = _dense_last(chosen), _dense_last(rejected)
                given = [buffers.put(t) for t in dense]
                a = Pair(*given, rows, width, *(t.stride(0) for t in dense))
                a.len_chosen, a.len_rejected, a.weights, a.margin = (
                    buffers.put(t.contiguous()) for t in vectors
                )
                a.smoothing, a.centering, a.first = smoothing, centering, first
                a.loss, a.grad_chosen, a.grad_rejected = (pointer for pointer, *_ in outputs)
                self.launch("prefix_bt_loss", ELEMENTS[chosen.dtype], ctypes.byref(a))
            return outputs

        return tuple(self.in_every_order(run))


def _head(buffers, hidden, weight, bias):
    dense, vector = _dense_last(hidden), _dense_last(weight)
    rows, k, width = hidden.shape
    rewards = buffers.new((rows, k), torch.float32)
    head = Head(buffers.operand(dense), rows, k, width, dense.stride(0), dense.stride(1))
    head.weight = buffers.operand(vector)
    if bias is not None:
        head.bias = buffers.operand(bias.reshape(1))
    head.rewards = rewards[0]
    return head, rewards


def _ratio(buffers, logprobs, rewards, ids, beta, temperature, seed, position, do_sample):
    rows, k = logprobs.shape
    slot, logq = buffers.new((rows,)), buffers.new((rows, k), torch.float32)
    inputs = (ids, beta, temperature, seed, position)
    pointers = [buffers.put(t.contiguous()) for t in inputs]
    a = Ratio(buffers.put(logprobs.contiguous()), rewards, *pointers, rows, k, do_sample)
    a.slot, a.logq = slot[0], logq[0]
    return a, slot, logq


def _dense_last(tensor):
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@functools.cache
def emulator():
    return Emulator(build())


def _op(name):
    def call(*arguments, **options):
        return getattr(emulator(), name)(*arguments, **options)

    return call


OPS = {name: _op(name) for name in REGISTERED if hasattr(Emulator, name)}
