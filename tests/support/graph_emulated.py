"""CUDA graphs on CPU tensors: what a capture records, what a replay repeats, what neither may do.

`EmulatedGraph` stands in for `torch.cuda.CUDAGraph` with its exact semantics. A capture leaves all
memory as it was: what the step wrote is put back, and what it allocated is filled with rubbish. A
replay runs the recorded operators on the recorded tensors, in order, into the recorded results: a
number that Python computed is that of the capture, a tensor is an address. An operator that would
make the host wait, or that no capture takes, raises at capture.

What it cannot see: copies between devices (test_graph_devices.py has those), and host waits inside
one operator.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that copy a value to the host, or whose result's shape depends on values.
WAITS = """_local_scalar_dense item is_nonzero equal nonzero nonzero_numpy masked_select unique_dim
_unique _unique2 unique_consecutive unique_dim_consecutive bincount multinomial _is_all_true
_is_any_true allclose argwhere masked_scatter histogram"""
REASONS = dict.fromkeys(WAITS.split(), "makes the host wait for a value")
INDEXING = ("index", "index_put_", "index_put", "_unsafe_index", "_index_put_impl_")
RANDOM = ("rand", "normal", "bernoulli", "exponential", "uniform")


class NotCapturable(RuntimeError):
    """What CUDA calls an operation that is not permitted when a stream is capturing."""


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(tensor):
    return tensor.untyped_storage()


def address(tensor):
    return storage(tensor).data_ptr()


def why_not(func, args, kwargs):
    """Why a stream that captures would not take this operator."""
    name = func._schema.name.removeprefix("aten::")
    if name in REASONS:
        return REASONS[name]
    # A number written into a slice is one too, of no dimension, but goes with the launch.
    if name in ("lift_fresh", "lift") and args[0].dim() > 0:
        return "copies a new tensor from the host"
    if name.startswith(RANDOM):
        return "draws random numbers"
    if name in INDEXING and any(i.dtype in (torch.bool, torch.uint8) for i in tensors(args[1])):
        return "indexes by a mask, which makes the host wait for its count"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "makes the host wait for the repeats' sum"
    if name == "isin" and all(isinstance(a, torch.Tensor) for a in args[:2]):
        elements, tests = args[0].numel(), args[1].numel()
        if tests >= int(10.0 * elements**0.145):  # ATen's own rule
            return "sorts, and makes the host wait"
    return None


class Capture(TorchDispatchMode):
    """Records each operator with its arguments and results."""

    def __init__(self):
        super().__init__()
        self.tape = []  # (operator, args, kwargs, results to fill)
        self.fresh = {}  # address -> storage that the capture allocated
        self.saved = {}  # address -> (storage from before, its bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reason = why_not(func, args, kwargs)
        if reason is not None:
            raise NotCapturable(
                f"{func}: operation not permitted when stream is capturing: {reason}"
            )
        writes = self.save_what_is_written(func, args, kwargs)
        out = func(*args, **kwargs)
        given = {address(t) for t in tensors((args, kwargs))}
        results = [t if address(t) not in given else None for t in tensors(out)]
        for t in results:
            if t is not None:
                self.fresh[address(t)] = storage(t)
        if writes or any(t is not None for t in results):  # else it only looks at memory anew
            self.tape.append((func, args, kwargs, results))
        return out

    def save_what_is_written(self, func, args, kwargs):
        written = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs.get(argument.name, args[i] if i < len(args) else None)
                written += tensors(value)
        for t in written:
            if address(t) not in self.fresh and address(t) not in self.saved:
                self.saved[address(t)] = storage(t), storage(t).clone()
        return written

    def undo(self):
        """Memory as it was; rubbish in what was allocated."""
        for store, before in self.saved.values():
            store.copy_(before)
        self.spoil()

    def spoil(self):
        for store in self.fresh.values():
            store.fill_(0xFF)  # NaN, −1, True

    def replay(self):
        self.spoil()  # what one replay left behind, the next must not read
        for func, args, kwargs, results in self.tape:
            got = tensors(func(*args, **kwargs))
            for into, value in zip(results, got, strict=True):
                if into is not None:
                    into.copy_(value)


class EmulatedGraph:
    """For `rgtg_fast.decode.graphs.GRAPHS["cpu"]`."""

    def __init__(self, device):
        self.device, self.captures, self.replays, self.warm = device, [], 0, 0

    def warm_up(self, step):
        self.warm += 1
        step()

    def capture(self, step):
        capture = Capture()
        try:
            with capture:
                step()
        finally:
            capture.undo()
        self.captures.append(capture)

    def replay(self):
        self.replays += 1
        self.captures[-1].replay()
