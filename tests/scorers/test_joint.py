"""Rewards and logits from one forward give the tokens of two separate models."""

import pytest
import tiny
import torch
import zoo
from lora_checkpoints import make_checkpoint

import rgtg_fast
from rgtg_fast.scorers import TreeScorer
from rgtg_fast.scorers.joint import JointScorer

STEPS = 10
OPTIONS = {
    **zoo.left_pad(zoo.prompts()),
    "k": 4,
    "beta": 2.0,
    "max_new_tokens": STEPS,
    "return_dict_in_generate": True,
    "output_candidates": True,
}
COLUMNS = ("rewards", "kl", "candidate_logprobs", "candidate_rewards")
FUSED = ["llama", "qwen2", "mistral", "mixtral", "gpt2", "gpt_neox", "gemma3", "llama4"]


def a_head(lm, layer=-1):
    width = lm.config.get_text_config().hidden_size
    weight = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return rgtg_fast.RewardHead(lm, weight / width**0.5, layer)


@pytest.fixture
def forwards(monkeypatch):
    """Batches and tokens of all forwards of joint scorers, and of tree scorers beside them."""
    seen = {"joint": [], "tree": []}
    for name, owner in (("joint", JointScorer), ("tree", TreeScorer)):
        hidden = owner._hidden

        def counted(self, ids, rows, name=name, hidden=hidden):
            seen[name].append(tuple(ids.shape))
            return hidden(self, ids, rows)

        monkeypatch.setattr(owner, "_hidden", counted)
    return seen


def both_ways(lm, rm, forwards, **options):
    """The run on shared forwards, and that of language model and reward model apart."""
    options = OPTIONS | options
    rgtg_fast.generate(lm, reward_model=rm, **(options | {"max_new_tokens": 1}))  # probed
    for shapes in forwards.values():
        shapes.clear()
    joint = rgtg_fast.generate(lm, reward_model=rm, **options)
    assert len(forwards["joint"]) == STEPS and not forwards["tree"]
    apart = rgtg_fast.generate(lm, reward_model=rm, cache_implementation="dynamic", **options)
    forwards["tree"] = [shape for shape in forwards["tree"] if shape == (3, 4)]  # not the probe's
    assert len(forwards["joint"]) == STEPS and len(forwards["tree"]) == STEPS
    return joint, apart


def assert_same(joint, apart):
    assert torch.equal(joint.sequences, apart.sequences)
    running = ~joint.rewards.isnan()  # what is computed for a row after its end means nothing
    assert torch.equal(running, ~apart.rewards.isnan())
    assert torch.equal(joint.candidate_ids[running], apart.candidate_ids[running])
    for name in COLUMNS:
        ours, theirs = joint[name][running], apart[name][running]
        assert torch.allclose(ours, theirs, atol=2e-4, rtol=1e-4), name


@pytest.mark.parametrize("family", [*FUSED, "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_head_on_the_language_model(family, do_sample, forwards):
    """gpt_oss and deepseek_v3 run their siblings under a mask."""
    lm = zoo.lm(family)
    assert_same(*both_ways(lm, a_head(lm), forwards, do_sample=do_sample, seed=3))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_head_on_an_inner_layer(layer, forwards):
    lm = zoo.lm("llama")
    assert_same(*both_ways(lm, a_head(lm, layer), forwards))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_an_adapter_on_the_language_model(family, do_sample, forwards, tmp_path):
    peft_model, lm = make_checkpoint(tmp_path, family)
    adapter = rgtg_fast.RewardAdapter.from_pretrained(lm, tmp_path)
    options = {"do_sample": do_sample, "seed": 4}
    joint, apart = both_ways(lm, adapter, forwards, **options)
    assert_same(joint, apart)
    separate = rgtg_fast.generate(lm, reward_model=peft_model, **OPTIONS, **options)
    assert_same(joint, separate)


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_rows_that_end_leave_both_halves(kind, forwards, tmp_path):
    _, lm = make_checkpoint(tmp_path)
    rm = rgtg_fast.RewardAdapter.from_pretrained(lm, tmp_path) if kind == "adapter" else a_head(lm)
    options = OPTIONS | {"return_dict_in_generate": False, "output_candidates": False}
    options |= {"eos_token_id": zoo.EOS, "pad_token_id": zoo.PAD, "do_sample": True}
    options |= {"sequence_bias": {(zoo.EOS,): 4.0}, "max_new_tokens": 20}
    for name in ("input_ids", "attention_mask"):
        options[name] = options[name].repeat(2, 1)
    options["seed"] = torch.arange(6) + 8
    compact = rgtg_fast.generate(lm, reward_model=rm, **options)
    batches = [shape[0] for shape in forwards["joint"]]
    assert batches[0] == 6 and batches[-1] < 6, "rows should have left"
    whole = rgtg_fast.generate(lm, reward_model=rm, compact=False, **options)
    apart = rgtg_fast.generate(lm, reward_model=rm, cache_implementation="dynamic", **options)
    assert torch.equal(compact, whole) and torch.equal(compact, apart)


def test_eos_has_the_reward_of_the_prefix_where_asked(forwards):
    lm = zoo.lm("llama")
    bias = {"sequence_bias": {(zoo.EOS,): 5.0}, "eos_reward": "previous"}
    bias |= {"eos_token_id": zoo.EOS, "pad_token_id": zoo.PAD}
    joint = rgtg_fast.generate(lm, reward_model=a_head(lm), **OPTIONS, **bias)
    apart = rgtg_fast.generate(
        lm, reward_model=a_head(lm), cache_implementation="dynamic", **OPTIONS, **bias
    )
    assert forwards["joint"] and forwards["tree"]
    assert_same(joint, apart)


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_the_cache_given_back_is_the_language_models(kind, forwards, tmp_path):
    _, lm = make_checkpoint(tmp_path, "gpt2")
    rm = rgtg_fast.RewardAdapter.from_pretrained(lm, tmp_path) if kind == "adapter" else a_head(lm)
    joint, apart = both_ways(lm, rm, forwards)
    assert joint.past_key_values.get_seq_length() == apart.past_key_values.get_seq_length()
    for ours, theirs in zip(
        joint.past_key_values.layers, apart.past_key_values.layers, strict=True
    ):
        answer = slice(OPTIONS["input_ids"].shape[1], None)
        assert torch.allclose(ours.keys[:, :, answer], theirs.keys[:, :, answer], atol=1e-4)


def test_the_vocabulary_is_projected_for_the_winner_only(monkeypatch):
    lm = tiny.llama_lm()
    rows = []
    lm.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    options = {**tiny.prompts(5, 9), "max_new_tokens": 4, "k": 6}
    rgtg_fast.generate(lm, reward_model=a_head(lm), **options)
    assert rows[-4:] == [(2, 1, 32)] * 4


def test_a_head_on_another_model_is_a_reward_model_like_any_other(forwards):
    lm, other = zoo.lm("llama"), zoo.lm("qwen2")
    out = rgtg_fast.generate(lm, reward_model=a_head(other), speculate=False, **OPTIONS)
    assert not forwards["joint"] and len(forwards["tree"]) >= STEPS
    plain = rgtg_fast.generate(lm, reward_model=a_head(other), reward_method="reencode", **OPTIONS)
    assert torch.equal(out.sequences, plain.sequences)
    torch.testing.assert_close(out.rewards, plain.rewards, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_kept_rows_keep_their_own_prefixes_in_both_halves(tmp_path):
    _, lm = make_checkpoint(tmp_path)
    adapter = rgtg_fast.RewardAdapter.from_pretrained(lm, tmp_path)
    ids = OPTIONS["input_ids"], OPTIONS["attention_mask"]
    all_rows, kept = (JointScorer(adapter, 4, fused=True, capacity=32) for _ in range(2))
    for scorer in (all_rows, kept):
        scorer.prefill(*ids)
    rows, candidates = torch.tensor([2, 0]), torch.arange(12).view(3, 4) * 5 + 3
    for step in range(3):
        want = all_rows.score(candidates + step)
        got = kept.score((candidates + step)[rows] if step else candidates)
        assert torch.allclose(got, want[rows] if step else want, atol=1e-5)
        slot = torch.tensor([step, 1, 3 - step])
        all_rows.commit(slot)
        kept.commit(slot[rows] if step else slot)
        if step == 0:
            kept.keep_rows(rows)
        assert torch.allclose(kept.next_hidden, all_rows.next_hidden[rows], atol=1e-5)
