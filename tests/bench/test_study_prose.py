"""The study's third task: its corpus, its gold reward, and a run of some models in small."""

import hashlib
import importlib
import itertools
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench" / "quality"))
    return lambda name: importlib.import_module(f"study_parts.{name}")


def test_sentences_are_words_and_marks_of_plain_sentences_once_each(study):
    text = (
        "Mr. Speaker, we’ve ended the long war; now let us all work. Too short. "
        "In 1945 we had\n 12 millions of men in arms over there. "
        "We have well-kept roads from\nhere to the sea. "
        "We have well-kept roads from here to the sea. "
    )
    assert study("corpus").sentences([text]) == [
        "speaker , we've ended the long war ; now let us all work .",
        "we have well-kept roads from here to the sea .",
    ]


def test_another_archive_is_refused_and_the_right_one_is_fetched_once(study, tmp_path):
    fetched = study("corpus").fetched
    write = (sys.executable, "-c", "open('a.txt', 'x').write('text')")
    digest = hashlib.sha256(b"text").hexdigest()
    path = fetched(tmp_path / "data", "a.txt", write, digest)
    assert path.read_text() == "text"
    assert fetched(tmp_path / "data", "a.txt", ("no-such-command",), digest) == path
    with pytest.raises(ValueError, match=r"b.txt could not be fetched .* by hand"):
        fetched(tmp_path / "data", "b.txt", ("no-such-command",), digest)
    path.write_text("another")
    with pytest.raises(ValueError, match=r"has SHA-256 .* wanted"):
        fetched(tmp_path / "data", "a.txt", write, digest)


LEXICON = {"good": 2.0, "bad": -3.0}


@pytest.mark.parametrize(
    ("prompt", "reply", "gold"),
    [
        ("we have had a", "bad year , good .", 0.7 * (-3 * 5 / 7 + 2) - 0.1 * 7),
        ("we have had a", "good year , bad .", 0.7 * (2 * 5 / 7 - 3) - 0.1 * 7),
        ("we have had a", "good good man", 0.7 * 2 * 5 / 7 - 0.1 * 7 - 0.5 - 0.5),  # no end, twice
        ("we have had a", "man of the sea .", -0.1 * 6),
    ],
)
def test_the_gold_reward_of_a_sentence_by_hand(study, prompt, reply, gold):
    assert study("prose").gold_reward(LEXICON, prompt, reply) == pytest.approx(gold)
    unfinished = study("prose").gold_reward(LEXICON, prompt, reply, False)
    assert unfinished == pytest.approx(gold - 1)


def text(_):
    parts = itertools.product(
        ("the", "a", "our"), ("good", "bad", "old"), ("land", "sea"), ("kind", "free")
    )
    return [" ".join(f"{d} {a} men of the {b} are {c} today.".capitalize() for d, a, b, c in parts)]


@pytest.fixture
def small_task(study, tmp_path):
    sizes = study("tasks").Sizes(2, 2, 2, 16, 4, 4, 1, 1, corpus=4, lm_epochs=20)
    return study("prose").prose_task(tmp_path, sizes, text, lambda _: LEXICON)


def test_prompts_are_apart_and_answers_are_finished_samples_of_the_language_model(
    study, small_task, tmp_path
):
    prompts = [prompt for split in small_task.prompts.values() for prompt in split]
    assert len(set(prompts)) == len(prompts) > 4
    train = small_task.prompts["train"]
    replies = {small_task.sample_reply(train[0], random.Random(i)) for i in range(20)}
    assert 1 < len(replies) <= study("prose").SAMPLES
    tokens = small_task.tokenizer(list(replies))["input_ids"]
    assert all(len(ids) < small_task.max_new_tokens for ids in tokens)
    assert small_task.tokenizer.decode(small_task.tokenizer(train[0])["input_ids"]) == train[0]
    before = (tmp_path / "prose_lm" / "model.safetensors").stat().st_mtime_ns
    again = study("prose").prose_task(tmp_path, small_task.sizes, text, lambda _: LEXICON)
    assert again.prompts == small_task.prompts
    assert (tmp_path / "prose_lm" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_task_with_some_models_is_added_to_a_study(study, small_task, tmp_path, monkeypatch):
    units, report = study("units"), study("report")
    monkeypatch.setitem(study("tasks").K, "prose", 4)
    betas = dict.fromkeys(small_task.betas, (1.0, 4.0))
    task = replace(small_task, max_new_tokens=6, betas=betas, ks=(2,))
    units.run_all([task], [1], tmp_path)
    written = {path.name for path in (tmp_path / "prose").glob("*.json")}
    kinds = ("base", "partial", "full", "genarm", "genarm_prefix")
    assert written == {f"seed1_{kind}.json" for kind in kinds}
    out = tmp_path / "out"
    report.write(tmp_path, out, ["recipe", "support", "prose"], [1])
    path = out / "study.json"
    record = json.loads(path.read_text())
    found = record["tasks"]["prose"]
    assert set(found["over_beta"]) == {
        "ARGS",
        "ARGS-G",
        "PARGS",
        "PARGS-G",
        "GenARM",
        "GenARM-prefix",
    }
    assert "PARGS - ARGS" in found["gaps_at_equal_kl"]
    assert list(found["over_k"]["PARGS"]) == ["2", "4"]
    assert "smaller" not in found and "over-optimisation" in (out / "study.md").read_text()
    # Beside another task, whose figures stay.
    record["tasks"] = {"recipe": found | {"seeds": [7]}}
    path.write_text(json.dumps(record))
    report.write(tmp_path, out, ["prose"], [1])
    record = json.loads(path.read_text())
    assert record["tasks"]["recipe"]["seeds"] == [7] and record["tasks"]["prose"] == found
    assert list(record["renewed"]) == ["all of prose"]
    record["tasks"].pop("prose")
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="report `full` and `partial` too"):
        report.write(tmp_path, out, ["prose"], [1], ("genarm",))


def test_the_tokenizer_is_the_same_in_every_run(study):
    sentences = study("corpus").sentences(text(None))
    one, other = (study("prose")._tokenizer(sentences) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    assert one.decode(one(sentences[0])["input_ids"]) == sentences[0]
