"""Tests with vLLM itself, run by `make test-vllm` in an environment of its own."""

import functools
import importlib.util
import os

import pytest
import tiny
from vllm_requests import MAX_LEN, twelve

# Elsewhere there is nothing to run.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


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
    """What `generate` gives, worked out once."""
    lm, rm = folders["lm"][1], folders["rm"][1]

    @functools.cache
    def answers(guided=True):
        return [request.want(lm, rm) for request in twelve(guided)]

    return answers
