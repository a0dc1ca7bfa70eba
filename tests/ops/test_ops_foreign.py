"""The private names of torch that the ops lean on mean what they are taken to mean."""

import pytest
import torch

from rgtg_fast.ops import foreign


def test_a_kernel_is_found_for_its_own_key_and_no_other():
    library = torch.library.Library("rgtg_contract", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    assert not foreign.has_kernel_for("rgtg_contract::twice", "CPU")
    library.impl("twice", lambda x: x * 2, "CPU")
    assert foreign.has_kernel_for("rgtg_contract::twice", "CPU")
    assert not foreign.has_kernel_for("rgtg_contract::twice", "CUDA")


def test_an_operator_that_does_not_exist_is_a_runtime_error():
    with pytest.raises(RuntimeError):
        foreign.has_kernel_for("rgtg_contract::nothing", "CPU")
