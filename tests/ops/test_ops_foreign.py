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


def test_the_gpu_can_be_put_to_sleep_for_a_number_of_cycles(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "_sleep", asked.append)  # raises where torch has none
    foreign.sleep_on_gpu(1000)
    assert asked == [1000]
