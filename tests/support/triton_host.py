"""The host side of the Triton launchers, on a driver that launches nothing; prints one JSON line.

    python tests/support/triton_host.py forms   # compiled forms of each kernel over growing sizes
    python tests/support/triton_host.py time    # microseconds of a call of candidate_attention

Run in a process without TRITON_INTERPRET. The time is that of the launcher, of torch's allocations
and of Triton's Python code; not of its C launcher, which takes the arguments apart and calls the
driver.
"""

import json
import sys
import time

import op_cases
import torch
import triton
from compile_triton import Driver

from rgtg_fast.kernels import launch, library


class Binaries:
    @staticmethod
    def load_binary(*_):
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    @staticmethod
    def get_device_properties(_):
        return {"max_shared_mem": 227 * 1024}


class HostDriver(Driver):
    """Compiles, and launches nothing."""

    utils = Binaries

    def launcher_cls(self, *_):
        return lambda *arguments: None


def attention(prefix, k):
    size = op_cases.Size(
        torch.bfloat16, rows=1, k=k, head=128, prefix=prefix, heads=(32, 8), width=4096, vocab=1000
    )
    return op_cases.arguments("candidate_attention", size)[0]


def forms(op, calls):
    """How many forms of each kernel of ``op`` Triton has compiled after the calls."""
    module = sys.modules[f"rgtg_fast.kernels.{op}"]
    kernels = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and value.module == module.__name__
    }
    for kernel in kernels.values():
        kernel.device_caches.clear()
    for arguments in calls:
        for known in launch._forms.values():
            known.clear()  # or Triton would not be asked
        library.KERNELS[op](*arguments)
    counts = {name: sum(len(c[0]) for c in k.device_caches.values()) for name, k in kernels.items()}
    return {name: count for name, count in counts.items() if count}


def over_candidates(op, sizes):
    for k in sizes:
        size = op_cases.Size(torch.bfloat16, rows=2, k=k, width=256, vocab=1000)
        yield op_cases.arguments(op, size)[0]


def growing_prefix(k):
    """Of a cache that is allocated once, and of one that is allocated for every length."""
    q, keys, values, *rest = attention(2000, k)
    for prefix in range(1, 2001):
        cut = keys[:, :, :prefix], values[:, :, :prefix]
        yield (q, *cut, *rest)
        yield (q, *(x.contiguous() for x in cut), *rest)


def all_forms():
    found = {
        f"candidate_attention k={k}": forms("candidate_attention", growing_prefix(k))
        for k in (10, 1)
    }
    for op in ("reward_head", "ratio_sample", "ratio_step"):  # one tile of 64 candidates
        found[f"{op} k=33..64"] = forms(op, over_candidates(op, range(33, 65)))
    found["vocab_reward k=1..64"] = forms(
        "vocab_reward", over_candidates("vocab_reward", range(1, 65))
    )
    return found


def least_us(call, calls=1000, rounds=15):
    call()
    least = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        least = min(least, (time.perf_counter() - begin) / calls * 1e6)
    return round(least, 1)


def times():
    op = library.KERNELS["candidate_attention"]
    given = {k: attention(576, k) for k in (10, 1)}
    found = {f"k={k}": least_us(lambda k=k: op(*given[k])) for k in given}
    q = given[10][0]
    found["of which torch.empty, twice"] = least_us(
        lambda: (torch.empty_like(q), torch.empty_like(q))
    )
    whole, launch.Launch.__call__ = launch.Launch.__call__, lambda *_: None
    found["k=10 without the launches"] = least_us(lambda: op(*given[10]))
    launch.Launch.__call__ = whole
    return found


if __name__ == "__main__":
    assert not library.INTERPRETED
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(HostDriver(90))
    print(json.dumps({"forms": all_forms, "time": times}[sys.argv[1]]()))
