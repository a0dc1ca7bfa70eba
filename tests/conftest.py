"""Set-up for every test: one thread, NaN in fresh memory; without a GPU no GPU tests, and Triton
interpreted."""

import os

import pytest
import torch

# Read when the Triton kernels are imported: without a GPU they run in numpy.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    torch.set_num_threads(1)
    # Fills what torch.empty and its C++ kin return with NaN (integers with their maximum), so that
    # reading memory nobody wrote cannot pass unseen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    config.addinivalue_line(
        "filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning"
    )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
