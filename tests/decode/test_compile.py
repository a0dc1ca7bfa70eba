"""`generate(compile=True)`: the same answers as without, on models of many kinds."""

import functools
import os
import subprocess
import sys
import warnings

import pytest
import torch
import zoo
from graph_cases import BATCH, LMS, RMS
from graph_emulated import install
from lora_checkpoints import make_checkpoint
from marks import some_slow

import rgtg_fast
from rgtg_fast.decode import compiling, graphs
from rgtg_fast.models import compiled

STATS = torch._dynamo.utils.counters["stats"]
COLUMNS = ("rewards", "kl", "candidate_ids", "candidate_logprobs", "candidate_rewards")


def guided(lm, rm, compile=True, **options):
    """A run whose every forward is compiled where `compile` is True; if not, that is an error."""
    common = {**BATCH, "k": 4, "max_new_tokens": 10, "return_dict_in_generate": True}
    common |= {"output_candidates": True, "seed": 5}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True")
        return rgtg_fast.generate(lm, reward_model=rm, compile=compile, **(common | options))


def assert_same(lm, rm, compilations, tolerance=1e-4, **options):
    want, before = guided(lm, rm, compile=False, **options), STATS["unique_graphs"]
    got = guided(lm, rm, **options)
    assert STATS["unique_graphs"] - before == compilations
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want)
        return
    assert torch.equal(got.sequences, want.sequences)
    for name in COLUMNS:
        torch.testing.assert_close(
            got[name], want[name], rtol=tolerance, atol=tolerance, equal_nan=True
        )
    guided(lm, rm, **(options | {"max_new_tokens": 17, "seed": 6, "beta": 0.5}))
    assert STATS["unique_graphs"] - before == compilations  # kept over calls


@pytest.fixture
def traced(monkeypatch):
    """No inductor: what is compiled, and when, does not depend on what is made of the graph."""
    eager = functools.partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(compiled, "COMPILER", eager)


def a_head(lm):
    width = lm.config.get_text_config().hidden_size
    weight = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return rgtg_fast.RewardHead(lm, weight)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "family", some_slow([("llama",), ("gpt2",), ("qwen2",), ("qwen3",), ("gemma2_eager",)], 2)
)
def test_answers_of_inductor_are_those_without(family, do_sample):
    lm, rm = zoo.build_lm(family), zoo.build_rm(family)
    assert_same(lm, rm, 2, do_sample=do_sample)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_of_inductor_with_a_head_on_the_language_model(family):
    lm = zoo.build_lm(family)
    assert_same(lm, a_head(lm), 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [1, 3])
def test_answers_of_inductor_with_an_adapter(family, rows, tmp_path):
    _, lm = make_checkpoint(tmp_path, family)
    adapter = rgtg_fast.RewardAdapter.from_pretrained(lm, tmp_path)
    assert_same(lm, adapter, 1, **{name: t[:rows, -5:] for name, t in BATCH.items()})


@pytest.mark.slow
def test_bf16_differs_by_its_rounding():
    lm, rm = (m.to(torch.bfloat16) for m in (zoo.build_lm("llama"), zoo.build_rm("llama")))
    truth = guided(lm.float(), rm.float(), compile=False, max_new_tokens=1)
    lm, rm = lm.to(torch.bfloat16), rm.to(torch.bfloat16)
    one = {"max_new_tokens": 1}
    plain, got = guided(lm, rm, compile=False, **one), guided(lm, rm, **one)
    allowed = 2 * (plain.candidate_rewards - truth.candidate_rewards).abs().max()
    assert (got.candidate_rewards - truth.candidate_rewards).abs().max() <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("family", list(dict.fromkeys(LMS + RMS)))
def test_every_family_with_fused_attention_is_traced_whole(family, traced):
    lm = zoo.build_lm(family if family in LMS else "llama")
    assert_same(lm, zoo.build_rm(family), 2, do_sample=True)


@pytest.mark.slow
def test_rows_that_leave_are_compiled_for_once(traced):
    lm, rm = zoo.build_lm("llama"), zoo.build_rm("llama")
    options = {"return_dict_in_generate": False, "output_candidates": False}
    answers = guided(lm, rm, compile=False, **options)[:, BATCH["input_ids"].shape[1] :]
    eos = [int(answers[0, 2]), int(answers[1, 4])]
    # two models, each for several rows and for one
    assert_same(lm, rm, 4, eos_token_id=eos, **options)


@pytest.mark.slow
def test_steps_with_pruned_candidates_run_as_they_are(traced):
    lm, rm = zoo.build_lm("llama"), zoo.build_rm("llama")
    options = {"reward_range": (-0.5, 0.5), "output_candidates": False}
    want = guided(lm, rm, compile=False, **options)
    got = guided(lm, rm, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.candidates_scored, want.candidates_scored)


def test_auto_compiles_where_a_graph_serves_enough_steps(monkeypatch):
    """The emulated capture records operators of torch, so the function is left as it is."""
    lm, made = zoo.build_lm("llama", num_hidden_layers=1), []
    head = a_head(lm)
    monkeypatch.setattr(compiled, "COMPILER", lambda function: made.append(function) or function)
    monkeypatch.setattr(compiling, "WORTH", 8)
    options = {"compile": "auto", "check_nan": False, "output_candidates": False, "top_k": 0}
    guided(lm, head, **options)  # on a CPU no graph serves a step
    assert not made
    cuda = install(monkeypatch)
    monkeypatch.setattr(graphs, "WORTH", 1)
    guided(lm, head, **(options | {"max_new_tokens": 7}))
    assert not made and cuda.replays
    want = guided(lm, head, **(options | {"cuda_graph": False}))
    assert not made
    replays = cuda.replays
    got = guided(lm, head, **options)
    assert len(made) == 1 and cuda.replays > replays
    assert torch.equal(got.sequences, want.sequences)


class Length:
    def prefill(self, input_ids, attention_mask):
        pass

    def score(self, ids):
        return ids.float() / 10

    def commit(self, slot):
        pass


REFUSED = {
    "a scorer": (lambda: Length(), {}, "scoring by 'Length'"),
    "dense masks": (lambda: zoo.rm("gpt_oss"), {}, "static cache without masks"),
    "another method": (lambda: zoo.rm("llama"), {"reward_method": "expand"}, "scoring by 'expand'"),
    "Hugging Face's cache": (
        lambda: Length(),
        {"cache_implementation": "static"},
        "Hugging Face's own cache",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_said(case, traced):
    reward_model, options, words = REFUSED[case]
    lm = zoo.lm("llama") if "cache_implementation" in options else zoo.lm("gpt_oss")
    common = {**BATCH, "k": 4, "max_new_tokens": 2, "reward_model": reward_model()} | options
    want = rgtg_fast.generate(lm, **common)
    with pytest.warns(UserWarning, match=rf"compile=True has no effect on .*{words}"):
        got = rgtg_fast.generate(lm, compile=True, **common)
    assert torch.equal(got, want)


def test_a_scorer_of_an_earlier_call_is_compiled_for_that_alone(monkeypatch):
    lm, made = zoo.build_lm("gpt_oss"), []
    monkeypatch.setattr(compiled, "COMPILER", lambda function: made.append(1) or function)
    scorer = rgtg_fast.scorers.make_scorer(zoo.build_rm("llama"), k=4)
    options = {**BATCH, "k": 4, "max_new_tokens": 3, "reward_model": scorer}
    with pytest.warns(UserWarning, match="the language model"):
        rgtg_fast.generate(lm, compile=True, **options)
    assert scorer.compiled is not None and made
    rgtg_fast.generate(lm, **options)
    assert scorer.compiled is None


def test_a_hook_is_never_compiled_in(traced):
    lm, rm = zoo.build_lm("gpt_oss"), zoo.build_rm("llama", num_hidden_layers=1)
    rm.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    options = {**BATCH, "k": 4, "max_new_tokens": 2, "reward_model": rm}
    with pytest.warns(UserWarning, match="hooks"):
        got = rgtg_fast.generate(lm, compile=True, **options)
    assert torch.equal(got, rgtg_fast.generate(lm, **options))


ALONE = """
import torch, zoo, rgtg_fast, warnings
from graph_cases import BATCH
options = dict(BATCH, k=4, max_new_tokens=2, reward_model=zoo.rm("llama"))
want = rgtg_fast.generate(zoo.lm("llama"), **options)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    got = rgtg_fast.generate(zoo.lm("llama"), compile=True, **options)
assert torch.equal(got, want)
print([str(w.message) for w in said if "compile=True" in str(w.message)])
"""


@pytest.mark.slow
def test_a_missing_compiler_is_named(tmp_path):
    path = os.pathsep.join(sys.path)
    env = os.environ | {"CXX": "no-such-compiler", "PYTHONPATH": path}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", ALONE], env=env, capture_output=True, text=True, check=True
    )
    assert "compiler" in run.stdout and "no-such-compiler" in run.stdout
