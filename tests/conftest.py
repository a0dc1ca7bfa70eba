"""Set-up for every test: one thread, NaN in fresh memory, no model hub.

GPU tests run under ``-m gpu`` only; without it the Triton kernels are interpreted, on CPU tensors,
GPU or not.
"""

import os

import pytest
import torch


def for_gpu(config):
    chosen = config.known_args_namespace.markexpr
    return "gpu" in chosen and "not gpu" not in chosen


# A name that is no folder is looked for in the hub, and without a network 5 times, in 46 seconds.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser, pluginmanager):
    # Triton reads it when it is imported, its own library of functions included. This hook runs
    # before the conftest of a folder is loaded, pytest_configure only after: one that imports
    # triton (transformers does) would leave that library compiled and the kernels interpreted.
    if not for_gpu(pluginmanager.get_plugin("pytestconfig")):
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    torch.set_num_threads(1)
    # Fills what torch.empty and its C++ kin return with NaN (integers with their maximum), so that
    # reading memory nobody wrote cannot pass unseen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    config.addinivalue_line(
        "filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning"
    )


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        reason = "no CUDA device"
    elif not for_gpu(config):
        reason = "run with -m gpu"
    else:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
