"""What the generation benchmark measures beside whole calls: memory, and the loop's own time."""

import ctypes
import functools
import gc
import resource
import statistics
from contextlib import contextmanager
from pathlib import Path

import torch
from published import KFoldCache, decode, now

import rgtg_fast
from rgtg_fast.scorers import make_scorer

MB = 1 << 20
HOLDS_CACHE = ("auto", "tree", "expand", "k-fold cache")


def _status(field):
    """Bytes of a line of /proc/self/status; None where there is no such file."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith(field + ":")]
    return int(lines[0].split()[1]) * 1024 if lines else None


@contextmanager
def peak_memory(device):
    """Yields a dict that gets `growth_mb` of the block and `peak_mb` of the process.

    CUDA: `max_memory_allocated`. CPU: the peak resident size, reset before the block where Linux
    lets a process do that; elsewhere `growth_mb` is only what exceeds every block before it. Freed
    memory that the allocator holds is given back first, or the block could use it unseen.
    """
    found = {}
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        peak = torch.cuda.max_memory_allocated(device)
        found |= {"growth_mb": (peak - before) / MB, "peak_mb": peak / MB}
        return
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = _process_peak()
    yield found
    peak = _status("VmHWM") or _process_peak()
    found |= {"growth_mb": (peak - before) / MB, "peak_mb": peak / MB}


def _process_peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cache_bytes(cache):
    """Bytes of the key and value storage behind a cache, each storage once."""
    tensors = [t for layer in cache.layers for t in vars(layer).values()]
    tensors += getattr(cache, "stores", [])
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, torch.Tensor) and t.dim() >= 4
    }
    return sum(storages.values())


def kv_memory(lm, rm, prompts, methods, ks, new):
    """Rows of what the reward model's cache holds after `new` tokens, by method, prompt and k.

    A method is one of `HOLDS_CACHE`; `ratio` is to the first k.
    """
    rows = []
    for prompt in prompts:
        ids = torch.randint(0, lm.config.vocab_size, (1, prompt)).to(lm.device)
        for method in methods:
            held = [_held(lm, rm, ids, k, new, method) for k in ks]
            rows += [
                {"method": method, "prompt": prompt, "k": k, "mb": b / MB, "ratio": b / held[0]}
                for k, b in zip(ks, held, strict=True)
            ]
    return rows


def _held(lm, rm, ids, k, new, method):
    if method == "k-fold cache":
        rewarder = KFoldCache(rm)
        decode(lm, rewarder, ids, k, 1.0, new)
        return cache_bytes(rewarder.cache)
    scorer = make_scorer(rm, k=k, method=method, max_length=ids.shape[1] + new)
    mask = torch.ones_like(ids)
    held, finish = [], scorer.finish

    def measured():  # what belongs to the call is let go of at its end
        # A tree's cache belongs to its forward, expand's to its batch of rows.
        holder = scorer.forward if hasattr(scorer, "forward") else scorer.rows.batch
        held.append(cache_bytes(holder.cache))
        finish()

    scorer.finish = measured
    rgtg_fast.generate(
        lm,
        ids,
        attention_mask=mask,
        reward_model=scorer,
        k=k,
        max_new_tokens=new,
        do_sample=False,
        speculate=False,  # which holds the candidates of several positions
    )
    return held[0]


class ForwardTime:
    """Seconds inside the forwards of some modules; one that another calls is not counted twice.

    The forwards of their classes are wrapped: a module with an instance attribute `forward` would
    not be run on the package's own cache.
    """

    def __init__(self, *modules):
        self.classes = {type(module) for module in modules}
        self.seconds, self._depth = 0.0, 0

    def _timed(self, forward):
        @functools.wraps(forward)
        def timed(*args, **kwargs):
            self._depth += 1
            start = now("cpu")
            try:
                return forward(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += now("cpu") - start

        return timed

    def __enter__(self):
        self.own = {cls: cls.forward for cls in self.classes}
        for cls, forward in self.own.items():
            cls.forward = self._timed(forward)
        return self

    def __exit__(self, *error):
        for cls, forward in self.own.items():
            cls.forward = forward


def overhead(lm, rm, prompt, k, new, repeats):
    """Milliseconds per token outside the models' forwards, of guided and of plain decoding.

    A step's time: the difference of runs of `new` tokens and of one token, over `new` - 1, so that
    neither the prompt nor what a call does once is in it; of the medians, and for the overhead of
    the shortest runs too, which a busy machine stretches less. CPU only: a GPU's forward returns
    early.
    Everything counts that is not a forward of the LM, of its base or of the reward model's base.
    """
    ids = torch.randint(0, lm.config.vocab_size, (1, prompt))
    mask = torch.ones_like(ids)
    calls = {
        "plain": functools.partial(lm.generate, ids, attention_mask=mask, do_sample=False),
        "guided": functools.partial(
            rgtg_fast.generate, lm, ids, attention_mask=mask, reward_model=rm, k=k, do_sample=False
        ),
    }
    modules = lm, lm.base_model, rm, rm.base_model
    samples = {name: {length: [] for length in (1, new)} for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            for length, values in samples[name].items():
                spent = _spent(call, modules, length)
                values += [spent] if repeat > 0 else []
    rows = []
    for name, values in samples.items():
        row = {"name": name}
        for key, part, middle in (
            ("ms_per_token", lambda total, inside: total, statistics.median),
            ("forwards_ms", lambda total, inside: inside, statistics.median),
            ("overhead_ms", lambda total, inside: total - inside, statistics.median),
            ("overhead_least_ms", lambda total, inside: total - inside, min),
        ):
            one, many = (middle([part(*spent) for spent in values[n]]) for n in (1, new))
            row[key] = 1000 * (many - one) / (new - 1)
        rows.append(row | {"seconds_total_and_inside": {str(n): v for n, v in values.items()}})
    return rows


def _spent(call, modules, length):
    """Seconds of one call, and of the models' forwards within it."""
    with ForwardTime(*modules) as inside:
        start = now("cpu")
        call(max_new_tokens=length)
        return now("cpu") - start, inside.seconds
