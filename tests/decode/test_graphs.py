"""Guided steps by CUDA graph, on CPU by the emulation of graph_emulated.py: the same as without.

The rows, columns and caches of a run whose steps are captured and replayed must be those of the
loop that launches each step, bit for bit.
"""

import gc
import importlib
import itertools
import re
import warnings
import weakref

import pytest
import tiny
import torch
import transformers as tf
import zoo
from graph_cases import BATCH, LMS, PROCESSORS, RMS, WIDTH, OddNorm
from graph_emulated import install
from transformers import StoppingCriteria

import rgtg_fast
from rgtg_fast.decode import graphs, kept
from rgtg_fast.models.cache import SiblingCache
from rgtg_fast.scorers import AutoregressiveScorer, VocabRewardScorer

STEPS, K = 14, 4
COLUMNS = ("rewards", "kl", "candidate_ids", "candidate_logprobs", "candidate_rewards")


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """The emulated torch.cuda, with what it was asked for."""
    monkeypatch.setattr(graphs, "WORTH", 1)
    monkeypatch.setattr(kept, "_shelf", kept._Shelf())
    return install(monkeypatch)


def guided(lm, rm, cuda_graph=True, **options):
    """A run without fallback: where the graph is not used for a reason, that is an error."""
    common = {**BATCH, "k": K, "max_new_tokens": STEPS, "return_dict_in_generate": True}
    common |= {"check_nan": False, "output_candidates": True, "seed": 5, "top_k": 0}
    common["speculate"] = False  # what runs without a graph: it rounds differently
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(cuda_graph|CUDA graph).*")
        return rgtg_fast.generate(lm, reward_model=rm, cuda_graph=cuda_graph, **(common | options))


def assert_same_with_graph(cuda, lm="llama", rm="llama", captures=1, **options):
    """Runs with and without graph are equal; so many captures were made, and replayed."""
    lm, rm = (zoo.lm(lm), zoo.rm(rm)) if isinstance(lm, str) else (lm, rm)
    want = guided(lm, rm, cuda_graph=False, **options)
    assert not cuda.log
    got = guided(lm, rm, **options)
    assert len(cuda.captures) == captures and cuda.replays > 0
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want)
        return want, got
    assert torch.equal(got.sequences, want.sequences)
    for name in COLUMNS:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)
    return want, got


@pytest.mark.parametrize("lm", ["llama", "gpt2", "gemma3", "mistral"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_rewards_from_the_language_model_itself(cuda, lm, do_sample):
    lm = zoo.lm(lm)
    width = lm.config.get_text_config().hidden_size
    weight = torch.randn(width, generator=torch.Generator().manual_seed(0))
    assert_same_with_graph(cuda, lm, rgtg_fast.RewardHead(lm, weight), do_sample=do_sample)


@pytest.mark.parametrize("kind", [AutoregressiveScorer, VocabRewardScorer])
@pytest.mark.parametrize(("lm", "rm"), [("llama", "gpt2"), ("gemma3", "mistral")])
def test_rewards_of_every_next_token(cuda, kind, lm, rm):
    eos = an_eos(lm, kind(zoo.lm(rm)), do_sample=True)
    options = {"do_sample": True, "eos_token_id": eos, "sync_every": 3}
    assert_same_with_graph(cuda, zoo.lm(lm), kind(zoo.lm(rm)), **options)
    cuda.log.clear()
    options |= {"return_dict_in_generate": False, "input_ids": BATCH["input_ids"][[0, 1, 2, 1]]}
    options["attention_mask"] = BATCH["attention_mask"][[0, 1, 2, 1]]
    want = guided(zoo.lm(lm), kind(zoo.lm(rm)), cuda_graph=False, **options)
    assert torch.equal(guided(zoo.lm(lm), kind(zoo.lm(rm)), **options), want)


@pytest.mark.parametrize("kind", [AutoregressiveScorer, VocabRewardScorer])
def test_next_token_rewards_on_hugging_faces_cache_are_a_reason(cuda, kind):
    scorer = kind(zoo.lm("bloom"))
    options = {**BATCH, "max_new_tokens": 4, "check_nan": False, "cuda_graph": True}
    with pytest.warns(UserWarning, match="no effect: scoring by 'next_token'"):
        rgtg_fast.generate(zoo.lm("llama"), reward_model=scorer, **options)


def an_eos(lm="llama", rm="llama", rows=slice(None), **options):
    """A token that ends one of `rows` some steps before the last, and no row before its sixth
    step: when steps are replayed."""
    rm = zoo.rm(rm) if isinstance(rm, str) else rm
    out = guided(zoo.lm(lm), rm, cuda_graph=False, **options)
    early, later = out.sequences[:, WIDTH : WIDTH + 5], out.sequences[rows, WIDTH + 5 : -3]
    return next(int(t) for t in later.flatten() if t not in early)


@pytest.mark.parametrize(
    ("lm", "rm"),
    [*((lm, "llama") for lm in LMS), *(("llama", rm) for rm in RMS), ("gpt2", "gemma3")],
)
def test_every_fused_model(cuda, lm, rm):
    eos = an_eos(lm, rm, do_sample=True)
    assert_same_with_graph(cuda, lm, rm, do_sample=True, eos_token_id=eos)


@pytest.mark.parametrize("sync_every", [1, 3, 16])
@pytest.mark.parametrize("eos_reward", ["hidden", "previous"])
def test_rows_that_end(cuda, eos_reward, sync_every):
    options = {"eos_token_id": an_eos(), "eos_reward": eos_reward, "sync_every": sync_every}
    want, _ = assert_same_with_graph(cuda, **options)
    assert want.rewards.isnan().any()


def test_all_rows_end_long_before_the_last_step(cuda):
    first = guided(zoo.lm("llama"), zoo.rm("llama"), cuda_graph=False)
    eos = first.sequences[:, WIDTH + 6].tolist()
    want, _ = assert_same_with_graph(cuda, eos_token_id=eos, max_new_tokens=40, sync_every=16)
    assert want.rewards.shape[1] < STEPS


@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4"])
def test_windows_that_move_and_chunks_that_end(cuda, name):
    assert_same_with_graph(cuda, name, name, max_new_tokens=30)


def test_own_prompts_and_row_options(cuda):
    own = zoo.left_pad(zoo.prompts(3, (4, 11, 6)))
    assert_same_with_graph(
        cuda,
        reward_input_ids=own["input_ids"],
        reward_attention_mask=own["attention_mask"],
        beta=torch.tensor([0.5, 1.0, -2.0]),
        temperature=torch.tensor([0.5, 1.0, 2.0]),
        seed=torch.tensor([1, 2, 3]),
        do_sample=True,
    )


def test_reward_model_with_fewer_ids(cuda):
    rm = zoo.build_rm("llama", vocab_size=zoo.VOCAB - 2)
    tokenizer = tiny.tokenizer()
    options = {"tokenizer": tokenizer, "reward_tokenizer": tokenizer}
    options["input_ids"] = BATCH["input_ids"].clamp(max=zoo.VOCAB - 3)
    assert_same_with_graph(cuda, zoo.lm("llama"), rm, k=40, **options)


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_of_scores(cuda, name):
    assert_same_with_graph(cuda, do_sample=True, **{name: PROCESSORS[name]})


def test_no_new_capture_without_compaction_whatever_ends(cuda):
    assert_same_with_graph(
        cuda, eos_token_id=an_eos(), compact=False, return_dict_in_generate=False
    )


@pytest.mark.parametrize("sync_every", [1, 4])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_leave_at_halves_and_the_rest_is_captured_anew(cuda, family, sync_every):
    batch = zoo.left_pad(zoo.prompts(2, (9, 2, 14, 5, 7, 3, 11, 6)))
    options = {**batch, "max_new_tokens": 40, "do_sample": True, "return_dict_in_generate": False}
    options |= {"eos_reward": "previous", "sync_every": sync_every}
    models = zoo.lm(family), zoo.rm(family)
    free = guided(*models, cuda_graph=False, compact=False, **options)
    early, late = free[:, WIDTH : WIDTH + 6], free[:, WIDTH + 6 :]
    options["eos_token_id"] = [t for t in range(zoo.VOCAB) if t not in early and t in late][:8]
    whole = guided(*models, cuda_graph=False, compact=False, **options)
    assert torch.equal(guided(*models, **options), whole)
    sizes = cuda.captures
    assert sizes[0] == 8 and len(sizes) > 1
    assert all(2 * b <= a for a, b in itertools.pairwise(sizes))


def test_the_cache_that_is_returned(cuda):
    options = {"eos_token_id": [an_eos(rows=row) for row in range(3)], "sync_every": 16}
    want, got = assert_same_with_graph(cuda, **options, max_new_tokens=30)
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
    for a, b in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_a_length_criterion_shorter_than_the_configuration(cuda):
    criteria = [tf.generation.MaxLengthCriteria(WIDTH + 9)]
    want, _ = assert_same_with_graph(cuda, stopping_criteria=criteria)
    assert want.sequences.shape[1] == WIDTH + 9


def test_nan_is_flagged_with_its_row_and_step(cuda, monkeypatch):
    module = importlib.import_module("rgtg_fast.guided")
    own = module.RatioPolicy
    flagged = lambda **options: own(**(options | {"check_nan": None}))  # noqa: E731
    monkeypatch.setattr(module, "RatioPolicy", flagged)  # as on a GPU
    rm = zoo.build_rm("llama")
    free = guided(zoo.lm("llama"), rm, cuda_graph=False)
    with torch.no_grad():
        rm.model.embed_tokens.weight[free.candidate_ids[1, 8, 2]] = torch.nan
    messages = []
    for cuda_graph in (False, True):
        with pytest.raises(ValueError, match=r"row \d, step \d+: a NaN") as caught:
            guided(zoo.lm("llama"), rm, cuda_graph=cuda_graph)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and cuda.replays > 0


def test_graphs_are_tried_without_being_asked(cuda):
    guided(zoo.lm("llama"), zoo.rm("llama"), cuda_graph=None)
    assert cuda.replays > 0


def test_few_steps_are_not_worth_a_capture(cuda, monkeypatch):
    monkeypatch.setattr(graphs, "WORTH", 16)
    guided(zoo.lm("llama"), zoo.rm("llama"))
    assert not cuda.captures


@pytest.mark.parametrize("which", ["lm", "rm"])
@pytest.mark.parametrize("seen", ["in the rehearsal", "at the capture"])
def test_what_cannot_be_captured_runs_eagerly_with_one_warning(cuda, which, seen):
    lm, rm = zoo.build_lm("mistral"), zoo.build_rm("mistral")
    eos = an_eos("mistral", "mistral")
    options = {"eos_token_id": eos, "eos_reward": "previous", "max_new_tokens": 20}
    want = guided(lm, rm, cuda_graph=False, **options)
    odd = lm if which == "lm" else rm
    before = graphs.WARM_UP + {"lm": 1, "rm": 2}[which]  # forwards of prompt and eager steps
    limit = 0 if seen == "in the rehearsal" else before
    odd.model.layers[1].input_layernorm = OddNorm(odd.model.layers[1].input_layernorm, limit)
    what = "the host waits for the device in {}" if limit == 0 else "NotCapturable in {}: .*"
    what = what.format(rf"OddNorm \({re.escape(OddNorm.asks_at())}\)")
    with pytest.warns(UserWarning, match=f"could be made of the guided step: {what}") as warned:
        got = rgtg_fast.generate(
            lm, reward_model=rm, **BATCH, k=K, seed=5, top_k=0, check_nan=False,
            return_dict_in_generate=True, output_candidates=True, **options,
        )  # fmt: skip
    assert len([w for w in warned if "CUDA graph" in str(w.message)]) == 1
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.rewards, want.rewards, rtol=0, atol=0, equal_nan=True)
    assert cuda.replays == 0
    # The process is as it was: random numbers, memory pools, the debug mode.
    with cuda.stream(cuda.main):
        torch.rand(2)
    assert not any(cuda.pools.values()) and not cuda.allocating and cuda.sync_debug_mode == 0


@pytest.mark.parametrize("limit", [0, 1 + graphs.WARM_UP])
def test_nothing_of_a_call_outlives_a_failed_capture(cuda, monkeypatch, limit):
    lm, rm = zoo.build_lm("llama"), zoo.build_rm("llama")
    guided(lm, rm, cuda_graph=False)  # probed
    lm.model.layers[1].input_layernorm = OddNorm(lm.model.layers[1].input_layernorm, limit)
    made = []
    init = SiblingCache.__init__

    def noted(self, *args, **kwargs):
        made.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(SiblingCache, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="no CUDA graph") as warned:
            rgtg_fast.generate(lm, reward_model=rm, **BATCH, k=K, check_nan=False)
        del warned
        assert made and all(ref() is None for ref in made)
    finally:
        gc.enable()


def own_criterion(input_ids, scores, **kwargs):
    return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Count(StoppingCriteria):
    __call__ = staticmethod(own_criterion)


REASONS = {
    "stopping criterion Count": {"stopping_criteria": [Count()]},
    "RepetitionPenaltyLogitsProcessor": {"repetition_penalty": 1.2},
    "EtaLogitsWarper": {"eta_cutoff": 0.1, "do_sample": True},
    "with 12 tokens": {"suppress_tokens": list(range(12))},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "check_nan=True": {"check_nan": True},
    "own cache": {"cache_implementation": "static"},
    "scoring by 'expand'": {"reward_method": "expand"},
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_graph_asked_for_in_vain_is_explained(cuda, reason):
    options = {**BATCH, "k": K, "max_new_tokens": 4, "check_nan": False} | REASONS[reason]
    models = {"model": zoo.lm("llama"), "reward_model": zoo.rm("llama")}
    want = rgtg_fast.generate(**models, cuda_graph=False, **options, seed=1)
    with pytest.warns(UserWarning, match=f"cuda_graph=True has no effect: .*{reason}"):
        got = rgtg_fast.generate(**models, cuda_graph=True, **options, seed=1)
    assert str(got) == str(want) and not cuda.log


def test_a_streamer_is_a_reason(cuda):
    class Streamer:
        def put(self, value):
            pass

        def end(self):
            pass

    with pytest.warns(UserWarning, match="a streamer takes each token"):
        guided_with = {**BATCH, "max_new_tokens": 3, "streamer": Streamer(), "cuda_graph": True}
        rgtg_fast.generate(zoo.lm("llama"), reward_model=zoo.rm("llama"), **guided_with)


@pytest.mark.parametrize("which", ["language", "reward"])
def test_hooks_are_a_reason(cuda, which):
    lm, rm = zoo.build_lm("llama"), zoo.build_rm("llama")
    seen = []
    hooked = lm if which == "language" else rm
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    options = {**BATCH, "max_new_tokens": 4, "check_nan": False, "cuda_graph": True}
    with pytest.warns(UserWarning, match=f"the {which} model has hooks .on model.layers.0.mlp"):
        rgtg_fast.generate(lm, reward_model=rm, **options)
    assert len(seen) >= 4


def test_hooks_that_transformers_left_behind_are_none(cuda):
    lm, rm = zoo.build_lm("llama"), zoo.build_rm("llama")
    for model in (lm, rm):
        model(**BATCH, output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in lm.modules())
    assert_same_with_graph(cuda, lm, rm)


def test_rotary_embeddings_that_grow_are_a_reason(cuda):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    rm = zoo.build_rm("llama", rope_parameters=rope)
    options = {**BATCH, "max_new_tokens": 4, "check_nan": False, "cuda_graph": True}
    with pytest.warns(UserWarning, match="reward model has rotary embeddings"):
        rgtg_fast.generate(zoo.lm("llama"), reward_model=rm, **options)


def test_on_a_cpu_there_are_no_graphs(cuda, monkeypatch):
    monkeypatch.delitem(graphs.GRAPHS, "cpu")
    options = {**BATCH, "max_new_tokens": 4, "cuda_graph": True}
    with pytest.warns(UserWarning, match="no effect: the prompts are on a cpu device"):
        rgtg_fast.generate(zoo.lm("llama"), reward_model=zoo.rm("llama"), **options)


@pytest.mark.parametrize("value", [1, "yes"])
def test_cuda_graph_must_be_a_bool_or_none(value):
    with pytest.raises(ValueError, match="cuda_graph="):
        rgtg_fast.RewardGuided(zoo.rm("llama"), cuda_graph=value)


@pytest.mark.parametrize("capturable", [True, False])
def test_the_host_counts_each_step_once(capturable):
    class Counter:
        length, limit = 3, 9

    counter, x = Counter(), torch.zeros(1)

    def step():
        counter.length += 1
        x.add_(1)
        if not capturable:
            x.item()

    run = graphs.Runner(step, graphs.TorchGraph(torch.device("cpu")), lambda: [counter])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for left in range(6, 0, -1):
            run(left)
    assert counter.length == 3 + 6 and x.item() == 6


def test_no_capture_where_a_cache_would_have_to_grow(cuda):
    class Counter:
        length, limit = 3, 8

    run = graphs.Runner(lambda: None, graphs.TorchGraph(torch.device("cpu")), lambda: [Counter()])
    for _ in range(6):
        run(6)
    assert not cuda.captures
