"""The index of what followed what, against the same estimate written in Python."""

import math
import threading
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgtg_fast import _C
from rgtg_fast.ops.reference import gumbel_noise

ids = st.lists(st.integers(0, 3), max_size=40)


class Oracle:
    def __init__(self, order):
        self.order, self.followed, self.texts = order, defaultdict(Counter), defaultdict(list)

    def extend(self, row, tokens):
        text = self.texts[row]
        for token in tokens:
            for m in range(1, min(self.order, len(text)) + 1):
                self.followed[tuple(text[-m:])][token] += 1
            text.append(token)

    def draft(self, row, n, position, seed, do_sample):
        text, start = list(self.texts[row]), len(self.texts[row])
        while len(text) < start + n and (p := self.estimate(text)):
            at = position + len(text) - start
            value = {v: math.log(q) + do_sample * noise(seed, at, v) for v, q in p.items()}
            text.append(min(value, key=lambda v: (-value[v], v)))
        return text[start:]

    def estimate(self, text):
        p = {}
        for m in range(1, min(self.order, len(text)) + 1):
            counts = self.followed.get(tuple(text[-m:]))
            if not counts:
                break
            scale = 1 / (counts.total() + 1)
            p = {v: (counts[v] + p.get(v, 0)) * scale for v in counts.keys() | p.keys()}
        return p


def noise(seed, position, token):
    import torch

    args = [torch.tensor([x]) for x in (seed, position)]
    return float(gumbel_noise(*args, torch.tensor([[token]]))[0, 0])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 2), ids), max_size=5), st.booleans())
def test_guesses_are_the_oracles(order, pieces, do_sample):
    index, oracle = _C.DraftIndex(order=order), Oracle(order)
    for row, tokens in pieces:
        index.extend(row, tokens)
        oracle.extend(row, tokens)
    for row in range(3):
        got = index.draft(row, n=6, position=7, seed=-5, do_sample=do_sample)
        if row not in oracle.texts:
            assert got == []
        else:
            assert got == oracle.draft(row, 6, 7, -5, do_sample)


def test_a_passage_that_came_before_is_guessed_to_its_end():
    passage = [5, 9, 5, 2, 5, 9, 7, 1, 5, 9, 5, 3]
    index = _C.DraftIndex(order=4)
    index.extend(0, passage)
    index.extend(1, passage[:5])
    assert index.draft(1, n=7, position=0, seed=0, do_sample=False) == passage[5:]


def test_a_text_that_left_is_unknown_and_its_tokens_are_not():
    index = _C.DraftIndex()
    index.extend(0, [1, 2, 3])
    index.leave(0)
    assert index.draft(0, n=2, position=0, seed=0, do_sample=False) == []
    index.extend(0, [1])  # a new text: nothing precedes its first token
    assert index.draft(0, n=2, position=0, seed=0, do_sample=False) == [2, 3]


def test_the_index_stays_within_its_capacity():
    index = _C.DraftIndex(order=3, capacity=100)
    for row in range(50):
        index.extend(row, list(range(row, row + 20)))
        assert len(index) <= 100


@pytest.mark.parametrize("wrong", [{"order": 0}, {"order": 65}, {"capacity": 0}])
def test_sizes_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="order from 1 to 64"):
        _C.DraftIndex(**wrong)


def test_threads_on_one_index():
    index = _C.DraftIndex(order=4, capacity=500)

    def work(row):
        for i in range(200):
            index.extend(row, [i % 7, row, i % 3])
            index.draft(row, n=4, position=i, seed=row, do_sample=True)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert 0 < len(index) <= 500
