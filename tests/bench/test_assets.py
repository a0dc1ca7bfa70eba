"""The shipped models: they load, are small, were trained without the held-out prompts."""

import copy
import importlib
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rgtg_fast.demo import task
from rgtg_fast.demo.run import ASSETS, load_assets


@pytest.fixture(scope="module")
def assets():
    return load_assets()


@pytest.fixture(scope="module")
def metrics():
    return json.loads((ASSETS / "metrics.json").read_text())


def test_assets_are_under_4_megabytes_together():
    files = [f for f in Path(ASSETS).rglob("*") if f.is_file()]
    assert 0 < sum(f.stat().st_size for f in files) < 4e6


def test_models_load_by_the_auto_classes_without_options():
    lm = AutoModelForCausalLM.from_pretrained(ASSETS / "lm")
    assert lm.config.vocab_size == len(AutoTokenizer.from_pretrained(ASSETS / "lm"))
    for name in ("rm_full", "rm_partial"):
        rm, info = AutoModelForSequenceClassification.from_pretrained(
            ASSETS / name, output_loading_info=True
        )
        assert rm.config.num_labels == 1
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_tokenizer_round_trips_every_sentence_and_keeps_pad_and_eos_apart(assets):
    tokenizer = assets.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for sentence in (s for group in task.SENTENCES.values() for s in group):
        text = sentence.format(product="kettle")
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_held_out_prompts_are_not_in_the_training_corpus(assets, metrics):
    train = set(task.split_prompts(metrics["seed"])["train"])
    test, beta = (set(assets.prompts[split]) for split in ("test", "beta"))
    assert len(test) == 200 and len(beta) == 200
    assert not test & train and not beta & train and not test & beta


def test_the_autoregressive_reward_model_is_a_language_model_that_nothing_is_missing_in():
    arm, info = AutoModelForCausalLM.from_pretrained(
        ASSETS / "rm_genarm_prefix", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert arm.config.vocab_size == len(AutoTokenizer.from_pretrained(ASSETS / "rm_genarm_prefix"))


def prefix_rewards(rm, tokenizer, prompt, reply):
    """Reward of every prefix [T] of `reply` with EOS, each by the public forward's definition."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(f"{prompt} {reply}")["input_ids"] + [tokenizer.eos_token_id]])
    if not hasattr(rm, "score"):  # a language model: its log-probabilities are summed
        logprobs = rm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return logprobs[start - 1 :].cumsum(0)
    return rm.score(rm.model(input_ids=ids).last_hidden_state)[0, start:, 0]


@pytest.fixture(scope="module")
def judged(assets, metrics):
    """Per reward model, whether it orders 250 fresh pairs as gold does, by prefix length."""
    rng = random.Random(1)
    lengths = (8, 16, 24, "full")
    right = {name: {n: [] for n in lengths} for name in assets.reward_models}
    for prompt in task.split_prompts(metrics["seed"])["eval"][:250]:
        replies = [task.sample_reply(prompt, rng) for _ in range(2)]
        gold = [task.gold_reward(prompt, r) for r in replies]
        if gold[0] == gold[1]:
            continue
        for name, rm in assets.reward_models.items():
            with torch.no_grad():
                a, b = (prefix_rewards(rm, assets.tokenizer, prompt, r) for r in replies)
            for n in lengths:
                at = -1 if n == "full" else n - 1
                i, j = (at if n == "full" else min(at, len(r) - 1) for r in (a, b))
                right[name][n].append(bool((a[i] > b[j]) == (gold[0] > gold[1])))
    return {name: {n: sum(v) / len(v) for n, v in by.items()} for name, by in right.items()}


def test_reward_models_judge_full_replies_well(judged):
    assert judged["rm_full"]["full"] > 0.85 and judged["rm_partial"]["full"] > 0.85
    assert judged["rm_genarm_prefix"]["full"] > 0.8


@pytest.mark.parametrize("length", [16, 24])
@pytest.mark.parametrize("name", ["rm_partial", "rm_genarm_prefix"])
def test_partial_reward_models_judge_prefixes_better(judged, name, length):
    assert judged[name][length] > judged["rm_full"][length] + 0.03


@pytest.mark.parametrize("name", ["rm_partial", "rm_genarm_prefix"])
def test_recorded_metrics_say_the_same(metrics, name):
    partial, full = metrics[name]["lengths"], metrics["rm_full"]["lengths"]
    for length in ("16", "32"):
        gap = partial[length]["accuracy"] - full[length]["accuracy"]
        assert gap > partial[length]["ci95"]


def test_metrics_outside_the_shipped_intervals_are_named(metrics, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench" / "quality"))
    outside = importlib.import_module("make_assets").outside
    assert outside(metrics, metrics) == []
    other = copy.deepcopy(metrics)
    other["lm"]["gold"] += 0.9 * metrics["lm"]["gold_ci95"]
    other["lm"]["eval_loss"] += 1.1 * metrics["lm"]["eval_loss_ci95"]
    decile = other["rm_full"]["deciles"]["50"]
    decile["accuracy"] -= 1.1 * decile["ci95"]
    named = [line.split(":")[0] for line in outside(other, metrics)]
    assert named == ["lm.eval_loss", "rm_full.deciles.50.accuracy"]
