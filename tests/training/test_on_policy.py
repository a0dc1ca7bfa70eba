"""Rounds of sampling from the guided policy, labelling and training on what it meets."""

import json

import on_policy
import pytest
import torch
import transformers
import yaml
from local_http import Quiet, served
from on_policy import config, rows
from safetensors.torch import load_file
from tiny import EOS, gpt2_lm, tokenizer
from training import text_pairs, write_rows

import rgtg_fast
from rgtg_fast.cli import main
from rgtg_fast.on_policy import run as rounds_of
from rgtg_fast.on_policy import train_on_policy
from rgtg_fast.training import PreferenceDataset


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_round_trains_on_what_the_guided_policy_gave_and_the_judge_preferred(folder):
    metrics = train_on_policy(config(folder, own={"rounds": 1}))
    out = folder / "out"
    assert metrics == json.loads((out / "metrics.json").read_text())
    (figures,) = metrics["rounds"]
    assert figures["guide"] == str(out / "round-0") and metrics["model"] == str(out / "round-1")
    # The tokens are those that generate_many gives with the guide of round 0.
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "lm").eval()
    rm = transformers.AutoModelForSequenceClassification.from_pretrained(out / "round-0").eval()
    tok = tokenizer()
    prompts = [tok(p)["input_ids"] for p in on_policy.PROMPTS for _ in range(3)]
    seed = int(rgtg_fast.ops.split_seed(42, 2)[1])
    expected = rgtg_fast.generate_many(
        lm,
        prompts,
        reward_model=rm,
        batch_size=4,
        do_sample=True,
        seed=seed,
        max_new_tokens=6,
        beta=2.0,
        k=5,
        top_k=0,
    )
    tokens = {answer.index: answer.tokens for answer in expected}
    (path,) = (out / "round-1").glob("*.answers.*")
    answers = rows(path)[1:]
    assert len(answers) == figures["answers"] == 18
    for row in answers:
        end = [] if row["end"] is None else [row["end"]]
        assert row["ids"] + end == tokens[row["i"]]
    # Every pair is of two answers to one prompt, the one with the higher score chosen.
    own = rows(out / "round-1" / "own_pairs.jsonl")
    assert len(own) == figures["own"] > 0
    for pair in own:
        won, lost = (
            tok.decode(pair["prompt_ids"] + pair[side], skip_special_tokens=True)
            for side in ("chosen_ids", "rejected_ids")
        )
        assert on_policy.polite([won]) > on_policy.polite([lost])
        assert pair["chosen_ids"] in [
            tokens[i] for i in range(18) if prompts[i] == pair["prompt_ids"]
        ]
    # They are trained on beside the given ones.
    given = PreferenceDataset(folder / "train.jsonl", tok).rows
    pairs = rows(out / "round-1" / "pairs.jsonl")
    assert len(pairs) == figures["given"] + figures["own"] == 48 + len(own)
    assert pairs[48:] == own and sorted(map(str, pairs[:48])) == sorted(map(str, given))


@pytest.mark.slow
def test_a_round_has_the_pairs_of_those_before_and_a_share_of_the_given_ones(folder):
    metrics = train_on_policy(config(folder, own={"mix": 0.25, "pairs": "best_worst"}))
    one, two = metrics["rounds"]
    assert (one["given"], two["given"]) == (12, 12) and two["earlier"] == one["own"]
    assert one["own"] <= len(on_policy.PROMPTS)
    second = rows(folder / "out" / "round-2" / "pairs.jsonl")
    first = rows(folder / "out" / "round-1" / "own_pairs.jsonl")
    assert second[12 : 12 + len(first)] == first
    assert not same(*(weights(folder / "out" / f"round-{n}") for n in (1, 2)))


def test_without_given_pairs_the_model_itself_guides_the_first_round(folder):
    values = config(folder, own={"rounds": 1})
    del values["train"]
    metrics = train_on_policy(values)
    assert metrics["rounds"][0]["guide"] == str(folder / "rm")
    assert metrics["rounds"][0]["given"] == 0
    assert not (folder / "out" / "round-0").exists()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_models_and_another_does_not(folder):
    one, two, other = (
        train_on_policy(config(folder, out, own={"rounds": 1}, seed=seed))["model"]
        for out, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    one, two, other = (load_file(f"{model}/model.safetensors") for model in (one, two, other))
    assert same(one, two) and not same(one, other)


@pytest.mark.slow
def test_more_rounds_go_on_from_those_that_are_there(folder, monkeypatch):
    train_on_policy(config(folder, own={"rounds": 1}))
    before = weights(folder / "out" / "round-1")
    trained = []
    train_as = rounds_of.train_as
    monkeypatch.setattr(
        rounds_of, "train_as", lambda s, *rest: (trained.append(s), train_as(s, *rest))[1]
    )
    metrics = train_on_policy(config(folder))
    assert [s.args["output_dir"] for s in trained] == [str(folder / "out" / "round-2")]
    assert len(metrics["rounds"]) == 2 and same(before, weights(folder / "out" / "round-1"))
    assert train_on_policy(config(folder)) == metrics and len(trained) == 1


def test_an_interrupted_round_is_gone_on_with_and_asks_the_judge_for_the_rest_only(folder):
    asked = []

    def judge(texts):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(texts)
        return on_policy.polite(texts)

    def again(texts):
        asked.append(texts)
        return on_policy.polite(texts)

    again.__qualname__ = judge.__qualname__
    values = config(folder, own={"rounds": 1, "judge": judge})
    with pytest.raises(KeyboardInterrupt):
        train_on_policy(values)
    assert [len(texts) for texts in asked] == [1, 4, 4]  # the first is the rehearsal
    values["on_policy"]["judge"] = again
    train_on_policy(values)
    assert [len(texts) for texts in asked[3:]] == [4, 4, 2]
    assert len({text for texts in asked[1:] for text in texts}) <= 18


@pytest.mark.parametrize(
    ("loss_type", "model", "judge", "more"),
    [
        pytest.param("full", "rm", "polite", {}, marks=pytest.mark.slow),
        ("farma", "lm", "polite", {"candidates": "sum"}),
        pytest.param("genarm", "lm", "polite", {"k": None}, marks=pytest.mark.slow),
        ("rad", "rm", "share", {}),
        pytest.param("prefix", "lm", "polite", {"frozen": True}, marks=pytest.mark.slow),
    ],
)
def test_every_loss_type_has_its_rounds(folder, loss_type, model, judge, more):
    own = {"rounds": 1, "judge": f"on_policy:{judge}"} | {
        name: more.pop(name) for name in ("candidates", "k") if name in more
    }
    if loss_type == "rad":
        labelled = [{"prompt": "order 1:", "text": " thank you", "label": 1}] * 4
        write_rows(folder / "train.jsonl", labelled)
    metrics = train_on_policy(config(folder, model=model, loss_type=loss_type, own=own, **more))
    figures = metrics["rounds"][0]
    assert figures["own"] > 0 and 0 <= figures["guide_accuracy"] <= 1 and figures["kl"] > 0
    if loss_type == "rad":
        (row, *_) = rows(folder / "out" / "round-1" / "own_pairs.jsonl")
        assert 0 <= row["label"] <= 1 and row["answer_ids"]


@pytest.mark.slow
def test_an_adapter_is_refined_from_its_base_in_every_round(folder):
    lora = {"r": 2, "target_modules": "all-linear"}
    metrics = train_on_policy(config(folder, lora=lora))
    assert len(metrics["rounds"]) == 2
    assert (folder / "out" / "round-2" / "adapter_config.json").is_file()


def test_a_full_sequence_reward_model_judges_token_ids(folder):
    metrics = train_on_policy(config(folder, own={"rounds": 1, "judge": str(folder / "rm")}))
    (path,) = (folder / "out" / "round-1").glob("*.answers.*")
    (scores,) = (folder / "out" / "round-1").glob("*.rewards.*")
    rm = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "rm").eval()
    row, score = rows(path)[1], rows(scores)[1]["reward"]
    end = [] if row["end"] is None else [row["end"]]
    ids = tokenizer()(on_policy.PROMPTS[0])["input_ids"] + row["ids"] + end
    with torch.no_grad():
        assert score == pytest.approx(float(rm(torch.tensor([ids])).logits), abs=1e-4)
    assert metrics["rounds"][0]["score"] is not None


@pytest.mark.slow
def test_a_server_judges_texts(folder):
    class Judge(Quiet):
        def do_POST(self):
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["query"]
            body = json.dumps({"rewards": on_policy.polite(texts)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with served(Judge) as url:
        by_server = train_on_policy(config(folder, own={"rounds": 1, "judge": url}))
    by_function = train_on_policy(config(folder, "other", own={"rounds": 1}))
    assert same(*(load_file(f"{m['model']}/model.safetensors") for m in (by_server, by_function)))
    assert url not in (folder / "out" / "on_policy.json").read_text()


def test_labels_by_hand_are_waited_for_and_then_taken(folder, capsys):
    values = config(folder, own={"judge": "hand", "rounds": 1})
    metrics = train_on_policy(values)
    path = folder / "out" / "round-1" / "to_label.jsonl"
    assert metrics["to_label"] == str(path)
    assert f"in {path}, set better to a, b or tie in every line" in capsys.readouterr().out
    asked = rows(path)
    assert {frozenset(row) for row in asked} == {frozenset(("id", "prompt", "a", "b", "better"))}
    write_rows(path, [row | {"better": "a"} for row in asked[:-1]] + asked[-1:])
    assert train_on_policy(values)["to_label"] == str(path)  # one is missing
    labels = ["b", "tie", *["a"] * (len(asked) - 2)]
    labelled = [row | {"better": label} for row, label in zip(asked, labels, strict=True)]
    write_rows(path, labelled)
    metrics = train_on_policy(values)
    own = rows(folder / "out" / "round-1" / "own_pairs.jsonl")
    assert metrics["rounds"][0]["own"] == len(own) == len(asked) - 1
    texts = tokenizer().batch_decode([r["chosen_ids"] for r in own], skip_special_tokens=True)
    assert texts == [row[row["better"]] for row in labelled if row["better"] != "tie"]
    assert rows(path) == labelled


def test_equal_answers_are_nothing_to_label(folder):
    own = {"judge": "hand", "rounds": 1, "beta": 0.0, "temperature": 1e-4}
    with pytest.raises(ValueError, match="round 1 gives no pair"):
        train_on_policy(config(folder, own=own, max_steps=1))
    assert not (folder / "out" / "round-1" / "to_label.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"better": "c"}, "line 1: better='c'; write one of a, b, tie"),
        ({"a": "other"}, "line 1: a is not what was written there"),
        ({"id": "9-9-9"}, "line 1 is none of the pairs to label"),
    ],
)
def test_a_line_that_was_spoilt_by_hand_is_named(folder, change, said):
    values = config(folder, own={"judge": "hand", "rounds": 1})
    path = folder / "out" / "round-1" / "to_label.jsonl"
    train_on_policy(values)
    write_rows(path, [rows(path)[0] | change, *rows(path)[1:]])
    with pytest.raises(ValueError, match=said):
        train_on_policy(values)


def test_the_command_line_and_the_card(folder, capsys):
    values = config(folder)
    (folder / "cfg.yaml").write_text(yaml.safe_dump(values))
    command = ["train", "--config", str(folder / "cfg.yaml"), "max_steps=2"]
    main([*command, "--on-policy", "rounds=1", "pairs=best_worst"])
    out = folder / "out"
    assert f"the reward model is {out / 'round-1'}" in capsys.readouterr().out
    card = (out / "round-1" / "README.md").read_text()
    assert "Round 1 of on-policy refinement (arXiv 2403.19279, labels by a judge)" in card
    assert "Round 0, on the given pairs" in (out / "round-0" / "README.md").read_text()
    assert json.loads((out / "round-1" / "metrics.json").read_text())["steps"] == 2
    code = card.split("```python\n")[1].split("```")[0]
    assert f"lm = AutoModelForCausalLM.from_pretrained({json.dumps(str(folder / 'lm'))})" in code
    exec(code, {})


@pytest.mark.slow
def test_held_out_pairs_are_the_same_in_every_round_and_never_trained_on(folder):
    metrics = train_on_policy(config(folder, hold_out=8))
    held = rows(folder / "out" / "held_out.jsonl")
    assert len(held) >= 8
    for number in (0, 1, 2):
        pairs = rows(folder / "out" / f"round-{number}" / "pairs.jsonl")
        assert not [row for row in pairs if row in held]
    assert metrics["rounds"][1]["eval"]["full"]["pairs"] == len(held)


OTHER_VOCABULARY = {"vocab_size": 40}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"own": {"rounds": 0}}, "rounds=0; pass at least 1"),
        ({"own": {"samples": 1}}, "samples=1; pass at least 2"),
        ({"own": {"mix": 1.5}}, "mix=1.5; pass a share"),
        ({"own": {"pairs": "some"}}, "pairs='some'; pass one of 'all', 'best_worst'"),
        ({"own": {"judge": None}}, "on_policy lacks judge"),
        ({"own": {"judge": 3}}, "judge=3; write a folder"),
        ({"own": {"judge": "on_policy:none"}}, "judge='on_policy:none' cannot be imported"),
        ({"own": {"judge": "no/where"}}, "judge: there is no folder 'no/where'"),
        ({"own": {"judge": "hand", "draw": True}}, "draw has no part in labels by hand"),
        ({"own": {"judge": "hand"}, "loss_type": "rad"}, "judge=hand gives pairs"),
        ({"own": {"sampels": 3}}, "unknown key on_policy: sampels: did you mean samples"),
        ({"own": {"do_sample": False}}, "unknown key on_policy: do_sample"),
        ({"own": {"prompts": "none.jsonl"}}, "no file at 'none.jsonl'"),
        ({"own": {"beta": "high"}}, "beta"),
        ({"own": {"k": 65}}, "k=65"),
        ({"own": {"max_new_tokens": 500}}, "500"),
        ({"resume": True}, "resume has no part in on-policy rounds"),
        ({"overwrite": True}, "overwrite has no part"),
        ({"train": None, "hold_out": 4}, "hold_out is taken from the pairs of train"),
        ({"on_policy": 3}, "on_policy is 3; write a mapping"),
    ],
    ids=str,
)
def test_bad_input_is_an_error_before_anything_is_trained(folder, monkeypatch, changes, said):
    monkeypatch.setattr(rounds_of, "train_as", lambda *_: pytest.fail("it has trained"))
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        train_on_policy(config(folder, **changes))
    assert not (folder / "out" / "on_policy.json").exists()


def test_a_judge_that_gives_no_number_is_found_before_anything_is_trained(folder, monkeypatch):
    monkeypatch.setattr(rounds_of, "train_as", lambda *_: pytest.fail("it has trained"))
    with pytest.raises(ValueError, match="judge gave nan"):
        train_on_policy(config(folder, own={"judge": lambda texts: [float("nan")] * len(texts)}))


def test_models_of_two_vocabularies_are_refused(folder):
    tok = tokenizer()
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(tok._tokenizer).from_str(
            tok._tokenizer.to_str().replace('"<bos>"', '"<go>"')
        ),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    gpt2_lm(initializer_range=0.1).save_pretrained(folder / "lm2")
    other.save_pretrained(folder / "lm2")
    with pytest.raises(ValueError, match="have different vocabularies"):
        train_on_policy(config(folder, own={"lm": str(folder / "lm2")}))


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused_with_what_has_changed(folder):
    train_on_policy(config(folder, own={"rounds": 1}))
    with pytest.raises(ValueError, match="the rounds of a run with another on_policy: beta, seed;"):
        train_on_policy(config(folder, seed=7, own={"rounds": 1, "beta": 1.0}))
    write_rows(folder / "train.jsonl", text_pairs(48, seed=9))
    with pytest.raises(ValueError, match="another train;"):
        train_on_policy(config(folder, own={"rounds": 1}))
    (folder / "mine").mkdir()
    (folder / "mine" / "on_policy.json.part").write_text("")  # of a kill
    (folder / "mine" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\)"):
        train_on_policy(config(folder, "mine"))


def test_answers_that_are_all_alike_to_the_judge_are_an_error(folder):
    with pytest.raises(ValueError, match="round 1 gives no pair"):
        train_on_policy(config(folder, own={"judge": lambda texts: [1.0] * len(texts)}))


def test_labels_outside_the_loss_types_range_are_an_error(folder):
    write_rows(folder / "train.jsonl", [{"text": "thank you", "label": 1}] * 4)
    with pytest.raises(ValueError, match=r"the judge gave .*labels in \[0, 1\]"):
        own = {"judge": lambda texts: [2.0 + len(text) for text in texts]}
        train_on_policy(config(folder, loss_type="rad", own=own))


def test_an_answer_cut_at_its_limit_has_no_eos_behind_it(folder):
    ends = [EOS, *range(50, 150)]  # so that some answers end early
    lm = gpt2_lm(initializer_range=0.1, n_positions=128)
    lm.generation_config.eos_token_id = ends
    lm.save_pretrained(folder / "lm")
    train_on_policy(config(folder, own={"rounds": 1}))
    own = rows(folder / "out" / "round-1" / "own_pairs.jsonl")
    answers = [row[side] for row in own for side in ("chosen_ids", "rejected_ids")]
    assert {len(ids) for ids in answers} > {6}
    assert all(ids[-1] in ends for ids in answers if len(ids) < 6)
    assert any(ids[-1] not in ends for ids in answers)
    assert not any(set(ids[:-1]) & set(ends) for ids in answers)


@pytest.mark.slow
def test_each_round_takes_the_next_prompts(folder):
    own = {"prompts_per_round": 4, "rounds": 3}
    train_on_policy(config(folder, own=own, max_steps=1))
    taken = []
    for number in (1, 2, 3):
        (path,) = (folder / "out" / f"round-{number}").glob("*.answers.*")
        assert len(rows(path)[1:]) == 12
        pairs = rows(folder / "out" / f"round-{number}" / "own_pairs.jsonl")
        taken.append({tuple(row["prompt_ids"]) for row in pairs})
    assert len(taken[0] | taken[1]) > 4 and max(map(len, taken)) <= 4
