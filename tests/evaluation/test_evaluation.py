"""`python -m rgtg_fast eval` on the embedded models, against slow plain computations."""

import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny import gpt2_rm, tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rgtg_fast
from rgtg_fast.cli import main
from rgtg_fast.demo.run import ASSETS
from rgtg_fast.evaluation import answers, stages
from rgtg_fast.scorers import KINDS, AttentionCreditScorer
from rgtg_fast.training.output_folder import locked

PROMPTS, TOKENS, K, BETA = 8, 8, 10, 2.0
GUIDE = str(ASSETS / "rm_partial")
RUNS = [
    {"name": "base"},
    {"name": "greedy", "do_sample": False},
    {"name": "top-k", "top_k": 5, "top_p": 0.9, "temperature": 0.8},
    {"name": "pargs", "reward_model": GUIDE, "k": K, "beta": [0.5, BETA], "temperature": 0.7},
    {"name": "best", "best_of": 3, "select_by": GUIDE},
]


def gold(prompt, answer, finished):
    return len(answer) + 1000 * finished


def shorter(prompt, a, b):
    return float(len(a) < len(b))


calls = []


def fails_in_its_sixth_pair(prompt, a, b):
    if len(calls) == 10:
        raise ValueError("enough")
    calls.append((prompt, a, b))
    return 1.0


def config(folder, **changes):
    values = {
        "model": str(ASSETS / "lm"),
        "prompts": str(ASSETS / "prompts.jsonl"),
        "judge": str(ASSETS / "rm_full"),
        "output_dir": str(folder / "out"),
        "limit": PROMPTS,
        "max_new_tokens": TOKENS,
        "batch_size": 5,
        "seeds": 2,
        "resamples": 200,
        "win_judge": "test_evaluation:shorter",
        "device": "cpu",
        "runs": RUNS,
    }
    (folder / "cfg.yaml").write_text(yaml.safe_dump(values | changes))
    return str(folder / "cfg.yaml")


def read(folder):
    results = json.loads((folder / "out" / "results.json").read_text())
    lines = (folder / "out" / "texts.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def rows(folder, name):
    (path,) = (folder / "out" / "rows").glob(f"{name}.*.jsonl")
    return path, [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    main(["eval", "--config", config(folder)])
    return folder


@pytest.fixture(scope="module")
def loaded():
    lm = AutoModelForCausalLM.from_pretrained(ASSETS / "lm").eval()
    rms = {
        name: AutoModelForSequenceClassification.from_pretrained(ASSETS / name).eval()
        for name in ("rm_full", "rm_partial")
    }
    return lm, rms, AutoTokenizer.from_pretrained(ASSETS / "lm")


def whole(row):
    """An answer's ids with the EOS that ended it."""
    return row["ids"] + ([] if row["end"] is None else [row["end"]])


def prompt_ids(loaded, row):
    line = (ASSETS / "prompts.jsonl").read_text().splitlines()[row["i"]]
    return loaded[2](json.loads(line)["prompt"])["input_ids"]


@torch.no_grad()
def plain_logits(loaded, row):
    prompt, answer = prompt_ids(loaded, row), whole(row)
    return loaded[0](torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()


def test_everything_is_written(done):
    results, texts = read(done)
    names = ["base", "greedy", "top-k", "pargs beta=0.5", "pargs beta=2.0", "best"]
    assert list(results["runs"]) == names
    assert len(texts) == PROMPTS * 2
    assert all(list(line["answers"]) == names for line in texts)
    assert all(len(line["answers"]["best"]["others"]) == 2 for line in texts)
    for image in ("reward_over_kl.png", "runs.png"):
        assert (done / "out" / image).read_bytes().startswith(b"\x89PNG")
    report = (done / "out" / "report.md").read_text()
    assert "| pargs beta=2.0 |" in report and "Differences to base" in report
    assert "win rate over base" in report


def test_the_base_has_no_divergence_from_itself(done):
    for name in ("kl", "log_ratio"):
        assert read(done)[0]["runs"]["base"]["metrics"][name]["mean"] == 0


def test_likelihood_is_that_of_plain_forwards(done, loaded):
    for run in ("base.0.answers", "pargs_beta=2.0.1.answers"):
        for row in rows(done, run)[1][::3]:
            logp = torch.log_softmax(plain_logits(loaded, row), -1)
            ids = torch.tensor(whole(row))[:, None]
            assert row["logp"] == pytest.approx(logp.gather(1, ids).sum().item(), abs=1e-4)


def test_greedy_answers_have_the_divergence_of_a_certain_policy(done, loaded):
    for row in rows(done, "greedy.0.answers")[1]:
        assert row["kl"] == pytest.approx(-row["logp"]) == row["log_ratio"]
        assert plain_logits(loaded, row).argmax(-1).tolist() == whole(row)


def test_warped_sampling_diverges_as_the_warped_policy(done, loaded):
    for row in rows(done, "top-k.1.answers")[1][::2]:
        logp = torch.log_softmax(plain_logits(loaded, row), -1)
        kl = ratio = 0.0
        for step, token in zip(logp, whole(row), strict=True):
            top = (step / 0.8).topk(5)
            q = top.values.softmax(0)
            kept = q.cumsum(0) - q < 0.9
            q = q[kept] / q[kept].sum()
            kl += (q * (q.log() - step[top.indices[kept]])).sum().item()
            ratio += (q.log() - step[top.indices[kept]])[top.indices[kept] == token].item()
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        assert row["log_ratio"] == pytest.approx(ratio, abs=1e-4)


@torch.no_grad()
def test_guided_answers_diverge_as_the_ratio_policy(done, loaded):
    for row in rows(done, "pargs_beta=2.0.0.answers")[1][::4]:
        logp, prefix = torch.log_softmax(plain_logits(loaded, row), -1), prompt_ids(loaded, row)
        kl = ratio = 0.0
        for step, token in zip(logp, whole(row), strict=True):
            top = step.topk(K)
            texts = torch.tensor([[*prefix, int(v)] for v in top.indices])
            rewards = loaded[1]["rm_partial"](texts).logits[:, 0].double()
            logq = ((top.values + BETA * rewards) / 0.7).log_softmax(0)
            kl += (logq.exp() * (logq - top.values)).sum().item()
            ratio += (logq - top.values)[top.indices == token].item()
            proxy = rewards[top.indices == token].item()
            prefix = [*prefix, token]
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        assert row["log_ratio"] == pytest.approx(ratio, abs=1e-4)
        assert row["proxy"] == pytest.approx(proxy, abs=1e-4)


@torch.no_grad()
def test_rewards_are_those_of_the_judge_alone(done, loaded):
    for run in ("base.1", "best.0"):
        rewards = rows(done, f"{run}.rewards")[1]
        for row, rated in list(zip(rows(done, f"{run}.answers")[1], rewards, strict=True))[::3]:
            ids = torch.tensor([prompt_ids(loaded, row) + whole(row)])
            reward = loaded[1]["rm_full"](ids).logits.item()
            assert rated["reward"] == pytest.approx(reward, abs=1e-4)


def test_the_best_of_n_is_the_selectors(done):
    for row in rows(done, "best.0.answers")[1]:
        assert row["proxy"] >= max(other["proxy"] for other in row["others"])
        assert row["kl"] == pytest.approx(math.log(3) - 2 / 3)
    assert read(done)[0]["runs"]["best"]["kl_is"] == "bound"


def test_wins_compare_the_same_prompt_and_seed(done):
    results, texts = read(done)
    wins = []
    for line in texts:
        ours, base = (line["answers"][name] for name in ("top-k", "base"))
        a, b = len(ours["text"]), len(base["text"])
        assert ours["win"] == 0.5 + ((a < b) - (a > b)) / 2
        wins.append(ours["win"])
    mean = results["runs"]["top-k"]["win_rate"]["mean"]
    assert mean == pytest.approx(sum(wins) / len(wins))


def test_seeds_differ_and_greedy_runs_need_one(done):
    _, texts = read(done)
    one, other = ([line["answers"] for line in texts if line["seed"] == s] for s in (0, 1))
    assert any(a["base"]["text"] != b["base"]["text"] for a, b in zip(one, other, strict=True))
    assert all(a["greedy"]["text"] == b["greedy"]["text"] for a, b in zip(one, other, strict=True))


@pytest.fixture
def copied(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    return tmp_path


def test_what_is_finished_is_not_generated_again(copied, monkeypatch):
    before = read(copied)
    monkeypatch.setattr(answers.Answerer, "batch", None)
    main(["eval", "--config", config(copied)])
    after = read(copied)
    assert after[0]["runs"] == before[0]["runs"] and after[1] == before[1]


def test_a_run_goes_on_where_it_was_killed(copied, monkeypatch):
    path, before = rows(copied, "pargs_beta=2.0.0.answers")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:7], lines[7][:20]]))  # six rows and a piece
    batches = []
    batch = answers.Answerer.batch

    def counted(self, prompts, numbers, of_prompts):
        batches.append((self.run.name, list(numbers)))
        return batch(self, prompts, numbers, of_prompts)

    monkeypatch.setattr(answers.Answerer, "batch", counted)
    with pytest.warns(UserWarning, match="cut short"):
        main(["eval", "--config", config(copied)])
    assert batches == [("pargs beta=2.0", [5, 6, 7])]
    after = rows(copied, "pargs_beta=2.0.0.answers")[1]
    assert [row["ids"] for row in after] == [row["ids"] for row in before]


def test_rewards_cut_short_are_judged_again_in_the_same_batches(copied, monkeypatch):
    path, _ = rows(copied, "pargs_beta=2.0.0.rewards")
    whole_file, asked = path.read_bytes(), []
    path.write_bytes(whole_file[:-1])
    score = stages.Classifier.score

    def counted(self, prompts, answers):
        asked.append(len(answers))
        return score(self, prompts, answers)

    monkeypatch.setattr(stages.Classifier, "score", counted)
    with pytest.warns(UserWarning, match="cut short"):
        main(["eval", "--config", config(copied)])
    assert asked == [8] and path.read_bytes() == whole_file


def test_another_judge_rates_the_same_answers(copied, monkeypatch):
    before = read(copied)[1]
    monkeypatch.setattr(answers.Answerer, "batch", None)
    main(["eval", "--config", config(copied, judge="test_evaluation:gold"), "plots=false"])
    for line, old in zip(read(copied)[1], before, strict=True):
        for name, answer in line["answers"].items():
            assert answer["text"] == old["answers"][name]["text"]
            assert answer["reward"] == len(answer["text"]) + 1000 * (answer["end"] is not None)


def test_no_verdict_is_lost_where_the_win_judge_fails(copied):
    path = config(copied, win_judge="test_evaluation:fails_in_its_sixth_pair", plots=False)
    calls.clear()
    with pytest.raises(SystemExit, match="enough"):
        main(["eval", "--config", path])
    asked = set(calls)
    calls.clear()
    with pytest.raises(SystemExit, match="enough"):
        main(["eval", "--config", path])
    assert len(calls) == 10 and not asked & set(calls)


def test_the_key_of_an_endpoint_is_written_nowhere(tmp_path, monkeypatch, endpoint):
    monkeypatch.setenv("MY_KEY", "do-not-tell")
    with endpoint(lambda body, count: (200, "A")) as (url, seen):
        judge = {"url": url, "model": "m", "key_env": "MY_KEY"}
        path = config(tmp_path, runs=RUNS[:2], limit=2, seeds=1, win_judge=judge, plots=False)
        main(["eval", "--config", path])
    assert seen[0][2]["Authorization"] == "Bearer do-not-tell"
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 5 and not any(b"do-not-tell" in file.read_bytes() for file in files)


def test_the_report_says_where_the_judge_guides(tmp_path):
    path = config(tmp_path, runs=[RUNS[0], RUNS[4]], limit=2, seeds=1, plots=False)
    with pytest.warns(UserWarning, match="proxy rewards"):
        main(["eval", "--config", path, f"judge={GUIDE}", "allow_same_judge=true"])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "also the guide or selector of best: there, reward is the proxy" in report
    assert report.count("| ≤ 0.432") == 1 and report.count("| ≤ +0.432") == 1


def test_other_settings_keep_the_old_answers(copied):
    old, _ = rows(copied, "base.0.answers")
    main(["eval", "--config", config(copied, runs=RUNS[:1]), "max_new_tokens=2", "seeds=1"])
    assert old.exists() and len(list(old.parent.glob("base.0.answers.*"))) == 2
    assert max(len(line["answers"]["base"]["text"].split()) for line in read(copied)[1]) <= 2


def test_answers_end_with_their_eos(loaded, tmp_path):
    path = config(tmp_path, runs=RUNS[:1], limit=6, seeds=1, max_new_tokens=48, plots=False)
    main(["eval", "--config", path])
    found = rows(tmp_path, "base.0.answers")[1]
    ended = [row for row in found if row["end"] is not None]
    assert len({len(row["ids"]) for row in ended}) > 1
    assert all(not {0, 1} & set(row["ids"]) for row in found)  # neither padding nor EOS
    for row in ended:
        assert row["end"] == 1
        logp = torch.log_softmax(plain_logits(loaded, row), -1)
        expected = logp.gather(1, torch.tensor(whole(row))[:, None]).sum().item()
        assert row["logp"] == pytest.approx(expected, abs=1e-3)


def test_guides_of_every_kind_answer(tmp_path, loaded):
    lm = str(ASSETS / "lm")
    weight = torch.linspace(-1, 1, loaded[0].config.hidden_size)
    save_file({"weight": weight}, tmp_path / "reward_head.safetensors")
    gpt2_rm(n_positions=256).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    folders = {"SequenceClassification": GUIDE, "CausalLM": lm, "head": str(tmp_path)}
    runs = [
        *(
            {"name": name, "kind": name, "reward_model": folders[kind.holds]}
            for name, kind in KINDS.items()
        ),
        {"name": "text", "reward_model": str(tmp_path / "other"), "k": 3},
        {"name": "both", "reward_model": GUIDE, "best_of": 2, "select_by": GUIDE},
    ]
    main(["eval", "--config", config(tmp_path, runs=runs), "limit=2", "max_new_tokens=2"])
    results, _ = read(tmp_path)
    for name in (*KINDS, "text"):
        metrics = results["runs"][name]["metrics"]
        assert metrics["kl"]["mean"] > 0 and math.isfinite(metrics["proxy"]["mean"])
    for row in rows(tmp_path, "head.0.answers")[1]:
        ids = torch.tensor([prompt_ids(loaded, row) + whole(row)])
        reward = loaded[0].model(ids).last_hidden_state[0, -1] @ weight
        assert row["proxy"] == pytest.approx(reward.item(), abs=1e-4)
    assert results["runs"]["both"]["metrics"]["kl"]["mean"] is None  # of its best: unknown
    # The base as its own guide, so that the reward of an answer is its log-probability.
    for row in rows(tmp_path, "autoregressive.0.answers")[1]:
        assert row["proxy"] == pytest.approx(row["logp"], abs=1e-4)


def test_the_options_of_a_kind_reach_its_scorer(tmp_path, loaded):
    credit = {"name": "credit", "kind": "attention_credit", "reward_model": GUIDE, "beta": 3.0}
    runs = [credit | {"options": {"share": 0.9}, "do_sample": False}]
    options = {"limit": 2, "seeds": 1, "win_judge": None, "plots": False}
    main(["eval", "--config", config(tmp_path, runs=runs, **options)])
    for row in rows(tmp_path, "credit.0.answers")[1]:
        out = rgtg_fast.generate(
            loaded[0],
            torch.tensor([prompt_ids(loaded, row)]),
            reward_model=AttentionCreditScorer(loaded[1]["rm_partial"], share=0.9),
            beta=3.0,
            max_new_tokens=TOKENS,
            return_dict_in_generate=True,
        )
        assert out.sequences[0, -len(whole(row)) :].tolist() == whole(row)
        assert row["proxy"] == pytest.approx(out.rewards[0, -1].item(), abs=1e-4)


def test_a_folder_that_another_process_writes_is_not_touched(copied, monkeypatch):
    monkeypatch.setattr(answers.Answerer, "batch", None)
    before = {file: file.read_bytes() for file in copied.rglob("*.jsonl")}
    with locked(copied / "out"), pytest.raises(SystemExit, match=r"eval: .*another process"):
        main(["eval", "--config", config(copied), "max_new_tokens=3"])
    assert {file: file.read_bytes() for file in copied.rglob("*.jsonl")} == before


def test_a_row_that_is_there_twice_does_not_change_the_figures(copied):
    before = read(copied)[0]["runs"]
    for kind in ("answers", "wins"):
        path, _ = rows(copied, f"pargs_beta=2.0.0.{kind}")
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:3], lines[1], *lines[4:]]))
    with pytest.warns(UserWarning, match="has i=0 where i=2 belongs"):
        main(["eval", "--config", config(copied)])
    assert read(copied)[0]["runs"] == before
