"""Rewards foreseen from hidden states: fitted to what they are, one position at a time."""

import threading

import pytest
import torch

from rgtg_fast.decode import fitted
from rgtg_fast.decode.fitted import FittedHead

WIDTH, VOCAB, K = 16, 50, 6


def positions(count, seed=0):
    """Hidden states, candidates, and rewards that are linear in a hidden state's direction."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9))
    hidden = torch.randn(count, WIDTH, generator=generator)
    ids = torch.rand(count, VOCAB, generator=generator).topk(K).indices
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    return hidden, ids, torch.einsum("nkh,nh->nk", truth[ids], unit)


def unseen_error(head):
    hidden, ids, rewards = positions(200, seed=1)
    above = rewards - rewards.mean(1, keepdim=True)
    return float((head(hidden, ids) - above).square().mean() / above.square().mean())


def test_what_is_foreseen_comes_to_be_what_is_seen():
    head = FittedHead()
    hidden, ids, rewards = positions(3000)
    assert torch.equal(head(hidden[:2], ids[:2]), torch.zeros(2, K))
    for i in range(0, 3000, 3):
        head.observe(hidden[i : i + 3], ids[i : i + 3], rewards[i : i + 3], VOCAB)
    assert unseen_error(head) < 0.25


def test_many_positions_with_the_same_candidates_are_no_larger_a_step():
    head = FittedHead()
    hidden, ids, rewards = (t[:1].expand(64, -1) for t in positions(1))
    for _ in range(50):
        error = head.observe(hidden, ids, rewards, VOCAB)
    assert error.abs().max() < 1e-3


def test_rewards_that_are_not_finite_leave_the_others_as_they_are():
    hidden, ids, rewards = positions(40)
    spoiled = rewards.clone()
    spoiled[::2, 1], spoiled[1::2, 0] = torch.nan, -torch.inf
    head, other = FittedHead(), FittedHead()
    for i in range(40):
        error = head.observe(hidden[i : i + 1], ids[i : i + 1], spoiled[i : i + 1], VOCAB)
        assert error.isfinite().all() and error[0, 1 - i % 2] == 0
        kept = spoiled[i].isfinite()
        other.observe(hidden[i : i + 1], ids[i : i + 1, kept], rewards[i : i + 1, kept], VOCAB)
    assert torch.allclose(head(hidden, ids), other(hidden, ids))
    head.observe(torch.full((1, WIDTH), torch.nan), ids[:1], rewards[:1], VOCAB)
    assert head(hidden, ids).isfinite().all()


def test_tokens_beyond_the_room_are_foreseen_as_nothing(monkeypatch):
    monkeypatch.setattr(fitted, "LARGEST", 4 * (WIDTH + 1) * 10)
    head = FittedHead()
    hidden, ids, rewards = positions(100)
    for _ in range(3):
        head.observe(hidden, ids, rewards, VOCAB)
    assert head.count <= 10
    assert (head(hidden, ids) != 0).any() and (head(hidden, ids) == 0).any()


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_of_one_call_is_not_that_of_the_next(first):
    head = FittedHead()
    hidden, ids, rewards = positions(20)
    for inference in (first, not first, first):
        with torch.inference_mode(inference):
            head.observe(hidden, ids, rewards, VOCAB)
            head(hidden, ids)


def test_threads_share_a_head():
    head, errors = FittedHead(), []

    def work(seed):
        try:
            hidden, ids, rewards = positions(600, seed)
            for i in range(600):
                head(hidden[i : i + 1], ids[i : i + 1])
                head.observe(hidden[i : i + 1], ids[i : i + 1], rewards[i : i + 1], VOCAB)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors and unseen_error(head) < 0.3
