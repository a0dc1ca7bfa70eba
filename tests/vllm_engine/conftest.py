"""Tests with vLLM itself, run by `make test-vllm` in an environment of its own."""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import tiny
from vllm_requests import BETA, MAX_LEN, K

sys.path.append(str(Path(__file__).parents[2] / "bench"))  # vllm_server, which a benchmark runs too
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


class WithoutVLLM(pytest.File):
    """In the place of a module of tests, which could not even be imported: one that is skipped."""

    def collect(self):
        yield Skipped.from_parent(self, name="all")


class Skipped(pytest.Item):
    def runtest(self):
        pytest.skip("vLLM is not installed here; `make test-vllm` makes an environment for it")


if importlib.util.find_spec("vllm") is None:

    def pytest_pycollect_makemodule(module_path, parent):
        return WithoutVLLM.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of a tiny language model and reward models, with their tokenizer; and the models."""
    shape = {"max_position_embeddings": MAX_LEN, "hidden_size": 64, "head_dim": 32}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    made = {"lm": tiny.llama_lm(**shape), "rm": tiny.llama_rm(**shape)}
    made |= {"policy": tiny.llama_lm(seed=11, **shape)}
    found = {}
    for name, model in made.items():
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        found[name] = str(folder), model
    return found


@pytest.fixture(scope="session")
def wanted(folders):
    """What `generate` gives to `twelve` and the like, worked out once."""
    lm, rm = folders["lm"][1], folders["rm"][1]

    @functools.cache
    def answers(requests, *which):
        return [request.want(lm, rm) for request in requests(*which)]

    return answers


@pytest.fixture(scope="session")
def server(folders, tmp_path_factory):
    """`rgtg-fast serve`, with a language model called "guided"."""
    from vllm_server import serving

    reward = ["--reward-model", folders["rm"][0], "--k", str(K), "--beta", str(BETA)]
    options = ["--dtype", "float32", "--max-model-len", str(MAX_LEN), "--enforce-eager"]
    options += ["--max-num-seqs", "16"]
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(folders["lm"][0], [*reward, "--kv-gib", "0.25"], options, log) as running:
        yield running
