"""Graphs kept over calls, by the emulation: captured once, and the tokens of the eager loop."""

import gc
import random
import threading
import warnings
import weakref

import pytest
import torch
import zoo
from graph_cases import BATCH
from graph_emulated import install

import rgtg_fast
from rgtg_fast.decode import graphs, kept
from rgtg_fast.models.reward_model import RewardModel
from rgtg_fast.scorers import AutoregressiveScorer, VocabRewardScorer

COLUMNS = ("rewards", "kl", "candidate_ids", "candidate_logprobs", "candidate_rewards")


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    monkeypatch.setattr(graphs, "WORTH", 1)
    monkeypatch.setattr(kept, "ROUND", 32)
    monkeypatch.setattr(kept, "_shelf", kept._Shelf())
    return install(monkeypatch)


def guided(lm, rm, cuda_graph=True, **options):
    common = {**BATCH, "k": 4, "max_new_tokens": 10, "return_dict_in_generate": True}
    common |= {"check_nan": False, "output_candidates": True, "seed": 5, "top_k": 0}
    common["speculate"] = False  # what runs without a graph: it rounds differently
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(cuda_graph|CUDA graph).*")
        return rgtg_fast.generate(lm, reward_model=rm, cuda_graph=cuda_graph, **(common | options))


def assert_same(got, want):
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want)
        return
    assert torch.equal(got.sequences, want.sequences)
    for name in COLUMNS:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)
    for a, b in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def prompts(*lengths, seed=3):
    return zoo.left_pad(zoo.prompts(seed, lengths))


def reward_of(kind, lm, name="llama"):
    if kind == "head":
        width = lm.config.get_text_config().hidden_size
        weight = torch.randn(width, generator=torch.Generator().manual_seed(0))
        return rgtg_fast.RewardHead(lm, weight)
    own = {"genarm": AutoregressiveScorer, "farma": VocabRewardScorer}
    return own[kind](zoo.lm(name)) if kind in own else zoo.rm(name)


@pytest.mark.parametrize("kind", ["classifier", "head", "genarm", "farma"])
@pytest.mark.parametrize(("lm", "rm"), [("llama", "gpt2"), ("gemma3", "mistral")])
def test_a_second_call_captures_nothing_and_gives_the_same(cuda, kind, lm, rm):
    lm = zoo.lm(lm)
    rm = reward_of(kind, lm, rm)
    inputs = [prompts(9, 2, 14), prompts(4, 7, 3, seed=4), prompts(11, 17, 1, seed=5)]
    for i, batch in enumerate(inputs):
        options = {**batch, "do_sample": True, "seed": i, "max_new_tokens": 8 + 2 * i}
        options |= {"eos_reward": "previous"} if kind in ("classifier", "head") else {}
        options |= {"eos_token_id": 5, "beta": 1.0 + i}
        want = guided(lm, rm, cuda_graph=False, **options)
        assert_same(guided(lm, rm, **options), want)
        assert len(cuda.captures) == 1
    assert cuda.replays > 20


def test_another_output_of_the_same_label_is_another_graph(cuda):
    lm, rm = zoo.lm("llama"), zoo.build_rm("gpt2", num_labels=3)
    for problem in (None, "regression", "multi_label_classification"):
        reward = RewardModel(rm, label=1, problem_type=problem)
        assert_same(guided(lm, reward), guided(lm, reward, cuda_graph=False))
    assert len(cuda.captures) == 3


SHAPES = [(9, 2, 14), (4, 7, 3), (5,), (12,), (3, 8)]
OPTIONS = [
    {"do_sample": True, "output_candidates": False},
    {"do_sample": True, "temperature": 0.5, "beta": 2.0},
    {"return_dict_in_generate": False, "suppress_tokens": [zoo.PAD, 9]},
    {"do_sample": True, "eos_token_id": [5, 11], "sync_every": 4},
    {"eos_token_id": [5, 11], "eos_reward": "previous", "top_p": 0.9, "do_sample": True},
]


def test_calls_of_all_kinds_in_random_order(cuda):
    """Graphs that fit are used again and no others: the tokens are always those of the loop."""
    lm, rms = zoo.lm("llama"), [zoo.rm("gpt2"), zoo.rm("llama")]
    draw = random.Random(0)
    kinds = set()
    for turn in range(40):
        shape, options, rm = draw.choice(SHAPES), draw.choice(OPTIONS), draw.choice(rms)
        kinds.add((len(shape), OPTIONS.index(options), rms.index(rm)))
        common = {
            **prompts(*shape, seed=turn),
            "seed": turn,
            "max_new_tokens": draw.choice([6, 12]),
        }
        want = guided(lm, rm, cuda_graph=False, **common, **options)
        got = guided(lm, rm, **common, **options)
        if not isinstance(want, torch.Tensor) and options.get("output_candidates") is False:
            assert torch.equal(got.sequences, want.sequences)
        else:
            assert_same(got, want)
        assert len(kept._shelf.entries) <= kept.MOST
    assert cuda.replays > 200


def test_longer_calls_than_a_graph_has_room_for_capture_anew(cuda):
    lm, rm = zoo.lm("llama"), zoo.rm("gpt2")
    for tokens, captures in ((10, 1), (18, 1), (40, 2), (10, 2)):
        want = guided(lm, rm, cuda_graph=False, max_new_tokens=tokens)
        assert_same(guided(lm, rm, max_new_tokens=tokens), want)
        assert len(cuda.captures) == captures


def test_two_threads_never_share_a_graph(cuda):
    lm, rm = zoo.lm("llama"), zoo.rm("gpt2")
    want = {seed: guided(lm, rm, cuda_graph=False, seed=seed, do_sample=True) for seed in range(6)}
    errors, start = [], threading.Barrier(2)

    def work(seeds):
        try:
            start.wait()
            for seed in seeds:
                assert_same(guided(lm, rm, seed=seed, do_sample=True), want[seed])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(s,)) for s in ((0, 1, 2), (3, 4, 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(cuda.captures) == len(kept._shelf.entries) == 2


@pytest.mark.parametrize("which", ["lm", "rm", "head"])
def test_a_graph_goes_with_its_models(cuda, which):
    lm, rm = zoo.build_lm("llama"), zoo.build_rm("gpt2")
    if which == "head":
        rm = reward_of("head", lm)
    guided(lm, rm)
    (entry,) = kept._shelf.entries
    graph = weakref.ref(entry[-1].graph)
    del entry
    gone = weakref.ref(lm if which == "lm" else rm)
    if which == "lm":
        del lm
    else:
        del rm
    gc.collect()
    assert gone() is None and graph() is None and not kept._shelf.entries
    assert not any(cuda.pools.values())


def weights_in_place(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def weights_loaded(model):
    model.load_state_dict({n: t * 1.1 for n, t in model.state_dict().items()})


def weights_replaced(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def data_replaced(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data = layer.weight.data * 1.5


def layer_replaced(model):
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def setting_changed(model):
    model.model.norm.variance_epsilon = 0.5


CHANGES = {weights_in_place: 1, weights_loaded: 1, weights_replaced: 2, data_replaced: 2}
CHANGES |= {layer_replaced: 2, setting_changed: 2}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["lm", "rm"])
def test_changed_models_are_seen(cuda, change, which):
    lm, rm = zoo.build_lm("llama"), zoo.build_rm("llama")
    first = guided(lm, rm)
    change(lm if which == "lm" else rm)
    want = guided(lm, rm, cuda_graph=False)
    of_all = ("candidate_logprobs", "candidate_rewards")
    assert any(not torch.equal(want[name], first[name]) for name in of_all)
    assert_same(guided(lm, rm), want)
    assert len(cuda.captures) == CHANGES[change] and len(kept._shelf.entries) == 1


def test_numerics_that_differ_capture_anew(cuda):
    lm, rm = zoo.lm("llama"), zoo.rm("gpt2")
    guided(lm, rm)
    with torch.autocast("cpu", torch.bfloat16):
        want = guided(lm, rm, cuda_graph=False)
        assert_same(guided(lm, rm), want)
    assert len(cuda.captures) == 2
    with torch.inference_mode():
        guided(lm, rm)
    assert len(cuda.captures) == 3
    guided(lm, rm)
    assert len(cuda.captures) == 3


def test_a_hook_is_seen(cuda):
    lm, rm, seen = zoo.build_lm("llama"), zoo.rm("gpt2"), []
    guided(lm, rm)
    lm.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    guided(lm, rm, cuda_graph=None)
    assert len(seen) >= 10


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_call_that_fails_leaves_no_graph(cuda, monkeypatch, at):
    lm, rm = zoo.lm("llama"), zoo.rm("gpt2")
    want = guided(lm, rm)
    replay, left = graphs.TorchGraph.replay, [at]

    def broken(self):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        replay(self)

    monkeypatch.setattr(graphs.TorchGraph, "replay", broken)
    with pytest.raises(KeyboardInterrupt):
        guided(lm, rm, seed=6)
    assert not kept._shelf.entries
    monkeypatch.setattr(graphs.TorchGraph, "replay", replay)
    assert_same(guided(lm, rm), want)
    assert len(cuda.captures) == 2


def test_nothing_that_was_returned_or_given_changes_later(cuda):
    lm, rm = zoo.lm("llama"), zoo.rm("gpt2")
    beta, seeds = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1, 2, 3])
    given = beta.clone(), seeds.clone()
    first = guided(lm, rm, beta=beta, seed=seeds, do_sample=True)
    fixed = [first.sequences.clone(), first.rewards.clone()]
    fixed += [
        t.clone() for layer in first.past_key_values.layers for t in (layer.keys, layer.values)
    ]
    guided(lm, rm, beta=3.0, seed=9, do_sample=True, **prompts(4, 7, 3))
    assert len(cuda.captures) == 1
    now = [first.sequences, first.rewards]
    now += [t for layer in first.past_key_values.layers for t in (layer.keys, layer.values)]
    assert all(torch.equal(a, b) for a, b in zip(now, fixed, strict=True))
    assert torch.equal(beta, given[0]) and torch.equal(seeds, given[1])


def test_rows_that_leave_give_the_graph_back(cuda):
    lm, rm = zoo.lm("llama"), zoo.rm("llama")
    batch = zoo.left_pad(zoo.prompts(2, (9, 2, 14, 5, 7, 3, 11, 6)))
    width = batch["input_ids"].shape[1]
    options = {**batch, "max_new_tokens": 30, "do_sample": True, "return_dict_in_generate": False}
    free = guided(lm, rm, cuda_graph=False, compact=False, **options)
    early, late = free[:, width : width + 6], free[:, width + 6 :]
    options["eos_token_id"] = [t for t in range(zoo.VOCAB) if t not in early and t in late][:8]
    want = guided(lm, rm, cuda_graph=False, **options)
    sizes = []
    for _ in range(2):
        assert torch.equal(guided(lm, rm, **options), want)
        sizes.append(list(cuda.captures))
    first, both = sizes
    assert first[0] == 8 and len(first) > 1 and 8 not in both[len(first) :]


def test_graphs_are_few_and_can_be_freed(cuda, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 2)
    lm, rm = zoo.lm("llama"), zoo.rm("gpt2")
    for k in (2, 3, 4):
        guided(lm, rm, k=k)
    assert len(kept._shelf.entries) == 2 and len(cuda.streams) == 3
    guided(lm, rm, k=4)
    assert len(cuda.captures) == 3
    rgtg_fast.free_graphs()
    assert not kept._shelf.entries and not any(cuda.pools.values())
    monkeypatch.setattr(kept, "MOST_BYTES", 10)
    guided(lm, rm, k=4)
    assert not kept._shelf.entries


def test_a_cache_of_the_callers_is_not_kept(cuda):
    from transformers import DynamicCache

    lm, rm = zoo.lm("llama"), zoo.rm("gpt2")
    own = DynamicCache()
    guided(lm, rm, past_key_values=own, return_dict_in_generate=False, output_candidates=False)
    assert own.get_seq_length() > 0 and not kept._shelf.entries
