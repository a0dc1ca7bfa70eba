"""CUDA graphs on CPU tensors: what a capture records, what a replay repeats, what neither may do.

`EmulatedCuda` stands in for `torch.cuda` as far as rgtg_fast.decode.graphs needs it; `install` puts
it there, so that `TorchGraph` runs its own code, on the CPU. A capture leaves all memory as it was:
what the step wrote is put back, and what it allocated is filled with rubbish. A replay runs the
recorded operators on the recorded memory, in order, into the recorded results: a number that Python
computed is that of the capture, a tensor is an address. These are errors, as on a GPU:

- an operator that would make the host wait, in a capture (a warning where the sync debug mode is
  on), and everything after it up to the end of the capture, which raises too;
- a replay that reads memory freed since the capture, or the cuBLAS workspace that a graph of the
  same stream took with it (torch 2.12 and 2.13);
- on a capture's stream, the use of memory of a graph that has gone;
- a random operator while the generator is in a capture (torch up to 2.12 leaves it so where the end
  of a capture raised), and a capture into a pool that another has not left.

What it cannot see: copies between devices (test_graph_devices.py has those), and host waits inside
one operator.
"""

import threading
import warnings
import weakref
from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rgtg_fast.decode import graphs, waits

# Operators that copy a value to the host, or whose result's shape depends on values.
WAITS = """_local_scalar_dense item is_nonzero equal nonzero nonzero_numpy masked_select unique_dim
_unique _unique2 unique_consecutive unique_dim_consecutive bincount multinomial _is_all_true
_is_any_true allclose argwhere masked_scatter histogram"""
REASONS = dict.fromkeys(WAITS.split(), "makes the host wait for a value")
INDEXING = ("index", "index_put_", "index_put", "_unsafe_index", "_index_put_impl_")
RANDOM = ("rand", "normal", "bernoulli", "exponential", "uniform")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")


class NotCapturable(RuntimeError):
    """What CUDA calls an operation that is not permitted when a stream is capturing."""


class Freed(RuntimeError):
    """What on a GPU reads memory that is no longer what it was: an illegal address, or rubbish."""


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(tensor):
    return tensor.untyped_storage()


def address(tensor):
    return storage(tensor).data_ptr()


def name_of(func):
    return func._schema.name.removeprefix("aten::")


def why_not(func, args, kwargs):
    """Why a stream that captures would not take this operator."""
    name = name_of(func)
    if name in REASONS:
        return REASONS[name]
    # A number written into a slice is one too, of no dimension, but goes with the launch.
    if name in ("lift_fresh", "lift") and args[0].dim() > 0:
        return "copies a new tensor from the host"
    if name in INDEXING and any(i.dtype in (torch.bool, torch.uint8) for i in tensors(args[1])):
        return "indexes by a mask, which makes the host wait for its count"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "makes the host wait for the repeats' sum"
    if name == "isin" and all(isinstance(a, torch.Tensor) for a in args[:2]):
        elements, tests = args[0].numel(), args[1].numel()
        if tests >= int(10.0 * elements**0.145):  # ATen's own rule
            return "sorts, and makes the host wait"
    return None


class Memory:
    """A tensor as a graph holds it: where it is, and not that it stays there."""

    def __init__(self, tensor):
        self.where = StorageWeakRef(storage(tensor))
        self.like = tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self):
        if self.where.expired():
            raise Freed("a replay reads memory that has been freed since the capture")
        store = torch.UntypedStorage._new_with_weak_ptr(self.where.cdata)
        dtype, *layout = self.like
        return torch.empty(0, dtype=dtype).set_(store, *layout)


class OnStream(TorchDispatchMode):
    """What eager operators on a stream may do."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.cuda.check_memory(func, args, kwargs)
        if name_of(func).startswith(RANDOM) and self.cuda.generator.state["capturing"]:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        if self.cuda.sync_debug_mode and why_not(func, args, kwargs):
            warnings.warn(waits.WAITED + " (Triggered internally)", stacklevel=1)
        if name_of(func) in PRODUCTS:
            self.cuda.workspace()
        return func(*args, **kwargs)


class Capture(TorchDispatchMode):
    """Records each operator with its arguments and results."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda
        self.tape = []  # (operator, args, kwargs, results to fill)
        self.fresh = {}  # address -> storage that the capture allocated
        self.saved = {}  # address -> (storage from before, its bytes)
        self.workspaces = set()  # weak references
        self.numbers = {}  # address -> storage of what goes with the launch
        self.rows = None
        self.broken = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.cuda.check_memory(func, args, kwargs)
        reason = self.broken or why_not(func, args, kwargs)
        if name_of(func).startswith(RANDOM):
            reason = "draws random numbers"
        if reason is not None:
            self.broken = reason
            raise NotCapturable(
                f"{func}: operation not permitted when stream is capturing: {reason}"
            )
        if name_of(func) in PRODUCTS:
            self.workspaces.add(weakref.ref(self.cuda.workspace()))
        if name_of(func) == "embedding" and self.rows is None:
            self.rows = len(args[1])
        if name_of(func) in ("lift_fresh", "lift"):
            self.numbers[address(args[0])] = storage(args[0])
        writes = self.save_what_is_written(func, args, kwargs)
        out = func(*args, **kwargs)
        given = {address(t) for t in tensors((args, kwargs))}
        results = [t if address(t) not in given else None for t in tensors(out)]
        for t in results:
            if t is not None:
                self.fresh[address(t)] = storage(t)
        if writes or any(t is not None for t in results):  # else it only looks at memory anew
            args, kwargs = tree_map_only(torch.Tensor, self.held, (args, kwargs))
            self.tape.append((func, args, kwargs, results))
        return out

    def held(self, tensor):
        """An argument as the tape holds it: memory of its own, or an address in another's."""
        own = address(tensor) in self.fresh or address(tensor) in self.numbers
        return tensor.detach() if own else Memory(tensor)

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
        self.saved.clear()
        self.spoil()

    def spoil(self):
        for store in self.fresh.values():
            store.fill_(0xFF)  # NaN, −1, True

    def replay(self):
        if any(workspace() is None for workspace in self.workspaces):
            raise Freed("a replay runs on a cuBLAS workspace that another graph took with it")
        self.spoil()  # what one replay left behind, the next must not read
        for func, args, kwargs, results in self.tape:
            args, kwargs = tree_map_only(Memory, Memory.tensor, (args, kwargs))
            got = tensors(func(*args, **kwargs))
            for into, value in zip(results, got, strict=True):
                if into is not None:
                    into.copy_(value)


class Workspace:
    """cuBLAS's, of one stream."""


class EmulatedCuda:
    """The names of `torch.cuda` that graphs need. `log` has what they did; `captures` the number of
    rows of each capture's first embedding (None without), `replays` counts; `pools`: how many hold
    each memory pool; `leaves_generator`: as torch up to 2.12."""

    def __init__(self, leaves_generator=True):
        cuda, self.leaves_generator = self, leaves_generator
        self.log, self.captures, self.replays, self.streams = [], [], 0, []
        self.sync_debug_mode, self.gone = 0, {}
        self.of_thread = threading.local()  # the current stream
        self.pools, self.allocating = {}, set()

        class Generator:
            def __init__(self):
                self.state = {"capturing": False}

            def clone_state(self):
                clone = Generator()
                clone.state = self.state | {"capturing": False}
                return clone

            def graphsafe_set_state(self, other):
                self.state = other.state

        class Stream:
            def __init__(self, name="side"):
                self.name, self.workspace = name, None
                cuda.streams.append(self)

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            recorded = None

            def replay(self):
                cuda.log.append(f"replay on {cuda.current}")
                cuda.replays += 1
                self.recorded.replay()

            def __del__(self):
                if self.recorded is None:
                    return
                self.stream.workspace = None
                fresh = [StorageWeakRef(store) for store in self.recorded.fresh.values()]
                where = list(self.recorded.fresh)
                self.recorded = None
                cuda.release(self.pool)
                cuda.gone |= {
                    at: ref for at, ref in zip(where, fresh, strict=True) if not ref.expired()
                }

        class graph:
            def __init__(self, cuda_graph, pool, stream, capture_error_mode):
                self.graph, self.pool, self.stream = cuda_graph, pool, stream
                cuda.log.append(f"capture into {pool} on {stream.name}, {capture_error_mode}")

            def __enter__(self):
                if self.pool in cuda.allocating:
                    raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
                self.before, cuda.current = cuda.current, "capturing"
                cuda.allocating.add(self.pool)
                cuda.pools[self.pool] += 1
                cuda.generator.state["capturing"] = True
                self.capture = Capture(cuda)
                self.capture.__enter__()

            def __exit__(self, *error):
                self.capture.__exit__(*error)
                self.capture.undo()
                if not cuda.leaves_generator:
                    cuda.generator.state["capturing"] = False
                if self.capture.broken:
                    raise RuntimeError("cudaErrorStreamCaptureInvalidated")
                cuda.generator.state["capturing"] = False
                cuda.allocating.remove(self.pool)
                cuda.captures.append(self.capture.rows)
                self.graph.recorded, self.graph.pool = self.capture, self.pool
                self.graph.stream = self.stream
                cuda.current = self.before

        self.generator = Generator()
        self.default_generators = (self.generator,)
        self.CUDAGraph, self.graph, self.Stream = CUDAGraph, graph, Stream
        self.main = Stream("main")
        self.streams.clear()

    @property
    def current(self):
        return getattr(self.of_thread, "current", "main")

    @current.setter
    def current(self, name):
        self.of_thread.current = name

    @property
    def side(self):
        return getattr(self.of_thread, "side", None)

    @side.setter
    def side(self, stream):
        self.of_thread.side = stream

    @contextmanager
    def stream(self, stream):
        before = self.current, self.side
        self.current, self.side = stream.name, stream
        try:
            with OnStream(self):
                yield
        finally:
            self.current, self.side = before

    @contextmanager
    def device(self, device):
        yield

    def current_device(self):
        return 0

    def current_stream(self, device):
        return self.main

    def graph_pool_handle(self):
        handle = f"pool {len(self.pools)}"
        self.pools[handle] = 0
        return handle

    def get_sync_debug_mode(self):
        return self.sync_debug_mode

    def set_sync_debug_mode(self, mode):
        self.sync_debug_mode = ("default", "warn", "error").index(mode)

    def workspace(self):
        if self.side.workspace is None:
            self.side.workspace = Workspace()
        return self.side.workspace

    def check_memory(self, func, args, kwargs):
        for tensor in tensors((args, kwargs)):
            ref = self.gone.get(address(tensor))
            if ref is not None and not ref.expired():
                raise Freed(f"{func} uses memory of a graph that has gone")

    def leave(self, device, pool):
        if pool not in self.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocating.remove(pool)

    def release(self, pool):
        assert self.pools[pool] > 0
        self.pools[pool] -= 1


def install(monkeypatch, **options):
    """Graphs of CPU tensors, by `TorchGraph` on the emulated torch.cuda; what it did."""
    cuda = EmulatedCuda(**options)
    monkeypatch.setattr(graphs, "cuda", cuda)
    monkeypatch.setattr(waits, "cuda", cuda)
    monkeypatch.setattr(graphs, "_streams", {})
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.leave)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: cuda.release(pool))
    monkeypatch.setitem(graphs.GRAPHS, "cpu", graphs.TorchGraph)
    return cuda
