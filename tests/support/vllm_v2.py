"""vLLM's second model runner on a CPU, its kernels on Triton's interpreter.

`python vllm_v2.py LM RM FOLDER`: out.json gets the tokens of requests in the configurations that
in.json has.

A process of its own: Triton has to be told before it is imported, and with a backend called "cpu",
which does nothing, vLLM takes it for one that runs there.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    """A driver of nothing: what is interpreted is not launched."""

    def __init__(self):
        pass

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise AssertionError("what is interpreted is not launched")

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_benchmarker(self):
        raise AssertionError("what is interpreted is not launched")


backends["cpu"] = Backend(None, Driver)


def run(lm, rm, requests, options):
    """The tokens of requests, by the name of their function, from an engine with these options."""
    import vllm_requests
    from vllm import LLM
    from vllm_requests import BETA, MAX_LEN, K

    llm = LLM(
        lm,
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_seqs=16,
        enforce_eager=True,
        logits_processors=["rgtg_fast.vllm:RewardGuided"],
        additional_config={"rgtg": {"reward_model": rm, "k": K, "beta": BETA, "kv_gib": 0.25}},
        **options,
    )
    core = llm.llm_engine.engine_core.engine_core
    found = {"runner": type(core.model_executor.driver_worker.worker.model_runner).__module__}
    asked = getattr(vllm_requests, requests)()
    prompts = [{"prompt_token_ids": request.prompt} for request in asked]
    outs = llm.generate(prompts, [request.params() for request in asked], use_tqdm=False)
    found["tokens"] = [list(each.outputs[0].token_ids) for each in outs]
    llm.llm_engine.engine_core.shutdown()
    return found


def main(lm, rm, folder):
    configurations = json.loads(Path(folder, "in.json").read_text())
    found = [run(lm, rm, *each) for each in configurations]
    Path(folder, "out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
