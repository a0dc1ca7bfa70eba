"""Compiled forwards of siblings: the same numbers, compiled once, never those of a model that was.

Most of these only trace (`backend="eager"`): what is kept, for which calls, and what is noticed
does not depend on what is made of the graph. tests/decode/test_compile.py runs inductor.
"""

import functools
import gc
import threading
import weakref

import pytest
import torch
import zoo
from torch import nn

from rgtg_fast.models import compiled
from rgtg_fast.models.compiled import CompiledSiblings
from rgtg_fast.models.reward_model import RewardModel
from rgtg_fast.models.siblings import SiblingForward

K = 4
STATS = torch._dynamo.utils.counters["stats"]


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    eager = functools.partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(compiled, "COMPILER", eager)


@pytest.fixture
def rm():
    return small_rm()


def small_rm(family="llama"):
    return zoo.build_rm(family, num_hidden_layers=1)


def forward_of(rm, rows=1, prompt=5, capacity=20, compile=True):
    parts = RewardModel(rm)
    forward = SiblingForward(parts.twin(), K, capacity, True)
    if compile:
        forward.compiled = CompiledSiblings(parts, True)
    ids = torch.randint(3, zoo.VOCAB, (rows, prompt), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[-1, : prompt // 3] = 0
    forward.prefill(ids, mask)
    return forward


def hidden_states(forward, steps=2):
    """Of a few steps, whose winners differ from row to row."""
    generator, out = torch.Generator().manual_seed(0), []
    rows = len(forward.position)
    for _ in range(steps):
        ids = torch.randint(3, zoo.VOCAB, (rows, K), generator=generator)
        out.append(forward.siblings(ids))
        forward.commit(torch.randint(0, K, (rows,), generator=generator))
    return torch.stack(out)


@torch.no_grad()
def assert_same(rm, **sizes):
    want = hidden_states(forward_of(rm, compile=False, **sizes))
    forward = forward_of(rm, **sizes)
    got = hidden_states(forward)
    assert forward.compiled is not None
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def compilations(run):
    before = STATS["unique_graphs"]
    run()
    return STATS["unique_graphs"] - before


def test_one_compilation_serves_prompts_and_capacities_of_all_lengths(rm):
    def calls():
        for prompt, capacity in ((5, 20), (9, 8), (3, 70)):
            assert_same(rm, prompt=prompt, capacity=capacity)

    assert compilations(calls) == 1


@pytest.mark.slow
def test_one_compilation_serves_every_number_of_rows_from_two_on(rm):
    def calls():
        for rows in (3, 2, 5):
            assert_same(rm, rows=rows)

    assert compilations(calls) == 1


@pytest.mark.slow
@torch.no_grad()
def test_rows_that_leave_and_a_cache_that_grows(rm):
    want, got = (forward_of(rm, rows=3, capacity=1, compile=c) for c in (False, True))
    for rows in ([0, 1, 2], [2, 0], [1]):
        for forward in (want, got):
            forward.keep_rows(torch.tensor(rows))
        torch.testing.assert_close(hidden_states(got), hidden_states(want), rtol=1e-5, atol=1e-5)


def change_in_place(rm):
    for parameter in rm.parameters():
        parameter.mul_(1.25)


def replace_a_parameter(rm):
    mlp = rm.model.layers[0].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight * 1.5)


def replace_a_module(rm):
    wide = rm.config.hidden_size
    rm.model.layers[0].self_attn.o_proj = nn.Sequential(nn.Linear(wide, wide), nn.Tanh())


def patch_a_forward(rm):
    mlp = rm.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) * 3


def change_an_attribute(rm):
    rm.model.layers[0].self_attn.scaling = 0.9


def change_the_epsilon(rm):
    rm.model.norm.variance_epsilon = 0.5


SLOW = (replace_a_parameter, replace_a_module, change_an_attribute, change_the_epsilon)
CHANGES = [change_in_place, patch_a_forward]
CHANGES += [pytest.param(change, marks=pytest.mark.slow) for change in SLOW]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_changes_of_a_model_between_calls_is_seen(change, rm):
    assert_same(rm)
    before = hidden_states(forward_of(rm))
    change(rm)
    assert_same(rm)
    assert (hidden_states(forward_of(rm)) - before).abs().max() > 1e-3


@torch.no_grad()
def test_threads_that_begin_at_once_compile_once(rm):
    want, got = hidden_states(forward_of(rm, compile=False)), {}
    barrier = threading.Barrier(3)

    def call(i):
        with torch.no_grad():
            forward = forward_of(rm)
            barrier.wait()
            got[i] = hidden_states(forward)

    def calls():
        threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
        [t.start() for t in threads]
        [t.join() for t in threads]

    assert compilations(calls) == 1
    for i in range(3):
        torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_compiled_goes_with_its_model():
    gc.collect()  # models of other tests are not counted
    rm = small_rm()
    forward = forward_of(rm)
    hidden_states(forward)
    store, model = weakref.ref(forward.cache.stores[0]), weakref.ref(rm)
    before = len(compiled._of_models)
    del forward
    assert store() is None  # at once: nothing of a call outlives it
    del rm
    gc.collect()
    assert model() is None and len(compiled._of_models) == before - 1


@torch.no_grad()
def test_few_forwards_of_a_model_are_kept(rm, monkeypatch):
    monkeypatch.setattr(compiled, "MOST", 2)
    forwards = compiled._forwards_of(rm)
    first = weakref.ref(forwards.get(("first",)).run)
    kept = forwards.get(("second",))
    forwards.get(("third",))
    gc.collect()
    assert first() is None and forwards.get(("second",)) is kept


class Asks(nn.Module):
    """A norm that asks the device something, which ends a graph."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return x if bool((x != x).any()) else self.norm(x)


@torch.no_grad()
def test_a_model_that_cannot_be_traced_runs_as_it_is_and_says_why(rm):
    rm.model.norm = Asks(rm.model.norm)
    want = hidden_states(forward_of(rm, compile=False))
    for _ in range(2):  # the first failure may have been a passing one
        forward = forward_of(rm)
        with pytest.warns(UserWarning, match=r"compile=True has no effect on Llama.*data-dep"):
            assert torch.equal(hidden_states(forward), want)
        assert forward.compiled is None
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["total"]
    with pytest.warns(UserWarning, match="data-dep"):
        hidden_states(forward_of(rm))
    assert frames["total"] == before  # not tried a third time


@torch.no_grad()
def test_an_interrupted_compilation_is_made_again(rm, monkeypatch):
    own, begun = compiled.COMPILER, []

    def interrupted_once(function):
        whole = own(function)

        def run(*arguments):
            begun.append(True)
            if len(begun) == 1:
                raise KeyboardInterrupt
            return whole(*arguments)

        return run

    monkeypatch.setattr(compiled, "COMPILER", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        hidden_states(forward_of(rm))
    assert_same(rm)
