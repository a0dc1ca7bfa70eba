"""What rows that come and go cost: slots, moves, and forwards of their prompts."""

import pytest
import torch
import zoo

import rgtg_fast
from rgtg_fast.models.cache import SLACK
from rgtg_fast.models.extents import Extent, fitted, in_order
from rgtg_fast.scorers import make_scorer

K = 4


def joined(*lengths, family="llama"):
    scorer = make_scorer(zoo.rm(family), k=K, max_length=64)
    return scorer, scorer.join(zoo.prompts(1, lengths))


def test_extents_take_the_smallest_gap_that_holds_them():
    taken = [Extent(0, 4), Extent(10, 5), Extent(18, 2)]
    assert fitted(taken, 30, [3]) == [Extent(15, 3)]
    assert fitted(taken, 30, [6, 3, 10]) == [Extent(4, 6), Extent(15, 3), Extent(20, 10)]
    assert fitted(taken, 30, [11]) is None
    assert in_order([3, 2]) == [Extent(0, 3), Extent(3, 2)]


def test_a_row_takes_the_place_of_one_that_left_and_no_other_moves():
    scorer, (_, second, _) = joined(12, 9, 14)
    (cache,) = scorer.caches
    places, stores = list(cache.extents), [store.data_ptr() for store in cache.stores]
    scorer.leave([second])
    scorer.join(zoo.prompts(2, (9,)))
    assert cache.extents == [places[0], places[2], places[1]]
    assert [store.data_ptr() for store in cache.stores] == stores


def test_the_stores_are_as_large_as_the_rows_there_are():
    scorer, handles = joined(30, 5, 17, 9)
    (cache,) = scorer.caches
    of_one = cache.nbytes() / cache.stores[0].shape[2]

    def slots():
        return cache.nbytes() / of_one

    assert slots() == 30 + 5 + 17 + 9 + 4 * (K + SLACK)
    scorer.leave([handles[0], handles[3]])
    ids = torch.arange(2 * K).view(2, K) + 5
    for _ in range(SLACK + 1):  # the rows outgrow their places once
        scorer.score(ids)
        scorer.commit(torch.tensor([1, 2]))
    assert slots() <= 5 + 17 + 2 * (SLACK + 1) + 2 * (K + SLACK)
    scorer.leave(handles[1:3])
    scorer.join(zoo.prompts(3, (6,)))
    assert slots() == 6 + K + SLACK


@pytest.mark.parametrize("way", ["tree", "expand"])
def test_a_prompt_is_run_once_for_its_copies(way, monkeypatch):
    rm, lm = zoo.rm("llama"), zoo.lm("llama")
    seen = []
    real = rgtg_fast.models.parts.ModelParts.forward_base

    def counted(self, input_ids, **kwargs):
        seen.append(tuple(input_ids.shape))
        return real(self, input_ids, **kwargs)

    batch = zoo.left_pad(zoo.prompts(4, (7, 11)))
    options = {"reward_model": rm, "k": K, "max_new_tokens": 4, "reward_method": way}
    options |= {"do_sample": True, "seed": torch.arange(6)}
    rgtg_fast.generate(lm, **batch, num_return_sequences=3, **options)  # probed
    monkeypatch.setattr(rgtg_fast.models.parts.ModelParts, "forward_base", counted)
    three = rgtg_fast.generate(lm, **batch, num_return_sequences=3, **options)
    assert [shape for shape in seen if shape[1] == 11] == [(2, 11)] * 2
    for row in range(6):
        prompt = zoo.prompts(4, (7, 11))[row // 3]
        own = options | {"seed": options["seed"][row : row + 1]}
        alone = rgtg_fast.generate(lm, prompt[None], **own)[0, len(prompt) :]
        assert torch.equal(three[row, 11:], alone)
