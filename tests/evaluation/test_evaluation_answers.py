"""Answers of `rgtg-fast eval` are those of the models alone, whatever stands beside them."""

import pytest
from test_evaluation import GUIDE, RUNS, config, read, rows
from transformers import AutoTokenizer

from rgtg_fast.cli import main
from rgtg_fast.demo.run import ASSETS


def test_min_p_leaves_the_likeliest_token_alone(tmp_path):
    runs = [{"name": "min-p", "min_p": 0.999}, {"name": "greedy", "do_sample": False}]
    path = config(tmp_path, runs=runs, limit=4, seeds=1, win_judge=None, plots=False)
    main(["eval", "--config", path])
    ours, greedy = (rows(tmp_path, f"{run['name']}.0.answers")[1] for run in runs)
    for row, same in zip(ours, greedy, strict=True):
        assert row["ids"] == same["ids"]
        assert row["kl"] == pytest.approx(-row["logp"], abs=1e-5)
        assert row["log_ratio"] == pytest.approx(-row["logp"], abs=1e-5)


def test_one_prompt_again_and_again_is_answered_anew(tmp_path):
    (tmp_path / "p.jsonl").write_text((ASSETS / "prompts.jsonl").read_text().split("\n")[0] + "\n")
    text = (tmp_path / "p.jsonl").read_text() * 6
    (tmp_path / "p.jsonl").write_text(text)
    runs = [
        {"name": "base"},
        {"name": "pargs", "reward_model": GUIDE},
        {"name": "best", "reward_model": GUIDE, "best_of": 2, "select_by": GUIDE},
    ]
    path = config(tmp_path, runs=runs, prompts=str(tmp_path / "p.jsonl"), batch_size=3, seeds=1)
    main(["eval", "--config", path, "win_judge=", "plots=false"])
    for name in ("base", "pargs"):
        found = [row["text"] for row in rows(tmp_path, f"{name}.0.answers")[1]]
        assert len(set(found)) >= 4 and found[:3] != found[3:]
    best = rows(tmp_path, "best.0.answers")[1]
    assert sum(row["text"] != row["others"][0]["text"] for row in best) >= 3


def test_padding_with_eos_changes_no_answer(tmp_path):
    tok = AutoTokenizer.from_pretrained(ASSETS / "lm")
    tok.pad_token = tok.eos_token
    tok.save_pretrained(tmp_path / "tok")
    found = {}
    for name in (str(ASSETS / "lm"), str(tmp_path / "tok")):
        path = config(tmp_path, runs=RUNS[2:4], limit=6, seeds=1, max_new_tokens=40)
        main(["eval", "--config", path, f"tokenizer={name}", "win_judge=", "plots=false"])
        found[name] = read(tmp_path)[1]
    ours, other = found.values()
    assert {a["end"] for line in ours for a in line["answers"].values()} == {1, None}
    for line, same in zip(ours, other, strict=True):
        for name, answer in line["answers"].items():
            for key in ("text", "end"):
                assert same["answers"][name][key] == answer[key]
            for key in ("logp", "kl", "log_ratio", "reward"):
                assert same["answers"][name][key] == pytest.approx(answer[key], abs=1e-4)
