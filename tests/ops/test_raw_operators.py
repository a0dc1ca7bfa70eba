"""The operators themselves, called with what would make them read outside their tensors."""

import importlib

import pytest
import torch
from op_cases import Size, arguments

SHORT = "one element less"
WRONG = [
    ("topk_logprobs", 1, 0),
    ("topk_logprobs", 1, -1),
    ("topk_logprobs", 1, 31),
    ("topk_logprobs", 1, 2**40),
    ("mix_logits", 0, SHORT),
    ("mix_logits", 0, []),
    ("mix_logits", 0, [torch.zeros(3, 30), torch.zeros(2, 30)]),
    ("mix_logits", 0, [torch.zeros(3, 30), torch.zeros(90)]),
    ("mix_logits", 1, SHORT),
    *[("mix_logits", 2, k) for k in (0, -1, 31, 2**40)],
    ("mix_logits", 3, torch.zeros(2)),
    ("mix_logits", 4, torch.zeros(2)),
    ("mix_logits", 5, torch.zeros(3).long()),
    ("mix_logits", 6, torch.zeros(3).long()),
    ("reward_head", 1, SHORT),
    ("reward_head", 2, torch.empty(0)),
    ("reward_head", 2, torch.zeros(2)),
    ("vocab_reward", 0, SHORT),
    ("vocab_reward", 2, SHORT),
    *[("ratio_sample", place, SHORT) for place in range(7)],
    *[("ratio_keep", place, SHORT) for place in range(6)],
    *[("ratio_step", place, SHORT) for place in range(8)],
    ("ratio_step", 9, torch.empty(0)),
    *[("candidate_attention", place, SHORT) for place in range(7)],
    *[("candidate_attention", 10, rows) for rows in (torch.zeros(2).long(), torch.zeros(3).int())],
    *[("candidate_attention", 8, window) for window in (0, -1, -(2**63))],
    *[("candidate_attention", 9, softcap) for softcap in (0.0, -1.0, float("nan"))],
    *[("prefix_bt_loss", place, SHORT) for place in range(6)],
    ("prefix_bt_loss", 8, 0),
    ("prefix_bt_loss", 8, -(2**63)),
]


@pytest.mark.parametrize("space", ["rgtg_fast", "rgtg_fast_triton"])
@pytest.mark.parametrize(("op", "place", "value"), WRONG)
def test_a_wrong_argument_is_an_error_and_not_a_read(space, op, place, value):
    if space == "rgtg_fast_triton":
        library = pytest.importorskip("rgtg_fast.kernels.library")
        if op not in library.KERNELS:
            pytest.skip(f"{op} has no Triton kernel")
    else:
        importlib.import_module("rgtg_fast._C")
    given = [*arguments(op, Size(rows=3))[0]]
    while place >= len(given):  # arguments that may be left out
        given.append(None)
    if value is SHORT:
        value = given[place][: len(given[place]) - 1]
    operator = getattr(getattr(torch.ops, space), op)
    operator(*given)
    given[place] = value
    with pytest.raises(RuntimeError):
        operator(*given)
