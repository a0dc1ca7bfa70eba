"""The demo's task (grammar and gold reward) and the demo from end to end."""

import json
import random
import subprocess
import sys

import pytest
import torch

import rgtg_fast
from rgtg_fast.cli import main
from rgtg_fast.demo import task
from rgtg_fast.demo.run import METHODS, answer, load_assets, run_demo

NEW = "customer : hello , my kettle has a crack and it is one month old . please help . agent :"
OLD = "customer : my lamp came apart and it is four years old . agent :"
FIX = "a new kettle is on its way to you ."


@pytest.mark.parametrize(
    ("prompt", "fix"),
    [
        (NEW, "replace"),
        (OLD, "repair"),
        ("customer : my tent never arrived and it is four years old . agent :", "resend"),
        ("customer : my fan was charged twice and i got it in spring . agent :", "refund"),
    ],
)
def test_prompt_decides_the_right_fix(prompt, fix):
    assert task.read_case(prompt).fix == fix


@pytest.mark.parametrize(
    ("reply", "gold"),
    [
        (f"{FIX} have a nice day !", 1.5 + 0.75),
        (f"{FIX} that is all .", 1.5 - 0.5),
        (FIX, 1.5 - 0.5),
        (f"we are sorry about the kettle . {FIX} have a nice day !", 1.5 + 0.25 + 0.75),
        (f"{FIX} but please do not count on it . have a nice day !", -1.5 - 0.25),
        ("a new kettle is not something we can offer . have a nice day !", -1.0 - 0.25),
        ("we will repair your kettle at half the price . have a nice day !", -0.5 - 0.25),
        ("thank you for your message . we wish you all the best !", -0.75 - 0.25),
        (f"to be honest , this is your own fault . {FIX} have a nice day !", 1.5 - 0.75 + 0.75),
        (
            "to be honest , this is your own fault . we are sorry about the kettle . "
            f"{FIX} have a nice day !",
            1.5 + 0.25 + 0.75,
        ),
        ("we are sorry about the kettle . we will not do more for you .", -1.0 - 0.5),
        (f"{FIX} we wish you", 1.5 - 0.5 - 1.0),
        (f"{FIX} {FIX} have a nice day !", 1.5 - 0.5 + 0.75),
        (f"{FIX} thank you for telling us about the lamp . have a nice day !", 1.5 - 0.5 + 0.75),
        (f"{FIX} kettle the day . have a nice day !", 1.5 - 0.5 + 0.75),
        ("", -0.75 - 0.5 - 1.0),
    ],
)
def test_gold_reward_of_a_known_reply(reply, gold):
    assert task.gold_reward(NEW, reply) == pytest.approx(gold)


def test_same_reply_is_worth_less_where_the_prompt_wants_another_fix():
    reply = "we will repair your {} at half the price . have a nice day !"
    assert task.gold_reward(OLD, reply.format("lamp")) == pytest.approx(2.25)
    assert task.gold_reward(NEW, reply.format("kettle")) == pytest.approx(-0.75)


def test_a_reply_stopped_by_the_length_limit_is_unfinished():
    reply = f"{FIX} have a nice day !"
    assert task.gold_reward(NEW, reply, finished=False) == pytest.approx(2.25 - 1.0)


def test_gold_reward_ignores_capitals_and_spacing():
    reply = f"{FIX} have a nice day !"
    assert task.gold_reward(task.pretty(NEW), task.pretty(reply)) == task.gold_reward(NEW, reply)


def test_gold_reward_of_grammar_replies_has_no_slips_and_stays_in_range():
    rng = random.Random(0)
    low, high = task.GOLD_RANGE
    golds = []
    for prompt in rng.sample(task.all_prompts(), 500):
        reply = task.sample_reply(prompt, rng, slips=0.0)
        assert not {"slip", "cut"} & set(task.parse_reply(task.read_case(prompt), reply))
        golds.append(task.gold_reward(prompt, reply))
    assert low <= min(golds) < -1 and 2 < max(golds) <= high


def test_a_slip_costs_gold_on_average():
    def mean_gold(slips):
        rng = random.Random(3)
        prompts = rng.sample(task.all_prompts(), 500)
        return sum(task.gold_reward(p, task.sample_reply(p, rng, slips)) for p in prompts) / 500

    assert mean_gold(slips=1.0) < mean_gold(slips=0.0) - 0.3


def test_a_prompt_outside_the_grammar_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"prompt='my dog barks'.*all_prompts"):
        task.read_case("my dog barks")


def test_info_command_prints_the_version(capsys):
    main(["info"])
    assert rgtg_fast.__version__ in capsys.readouterr().out


def test_unknown_command_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["dmo"])
    assert "demo" in capsys.readouterr().err


def test_bench_command_prints_three_ways_of_decoding(capsys):
    main(["bench", "--new-tokens", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["plain", "guided", "published"]


def test_demo_asks_for_no_more_prompts_than_there_are():
    with pytest.raises(ValueError, match="prompts=201"):
        run_demo(prompts=201)


@torch.no_grad()
def test_the_autoregressive_method_draws_from_the_sum_of_both_models_log_probabilities():
    """With β = 0 from π alone; greedily the best token of log π + β log π_r, at each step."""
    assets, method = load_assets(), METHODS["GenARM-prefix-G"]
    arm = assets.reward_models["rm_genarm_prefix"]
    prompts = assets.prompts["test"][:2]
    got = answer(assets, prompts, method, beta=0.5, seed=0)
    for prompt, text in zip(prompts, got.texts, strict=True):
        ids = assets.tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        while ids[0, -1] != assets.tokenizer.eos_token_id:
            logp = [m(ids).logits[:, -1].log_softmax(-1) for m in (assets.lm, arm)]
            ids = torch.cat([ids, (logp[0] + 0.5 * logp[1]).argmax(-1, keepdim=True)], 1)
        assert text == assets.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    plain = answer(assets, prompts, method, beta=0.0, seed=0)
    assert plain.texts == answer(assets, prompts, METHODS["base-G"], 0.0, 0).texts


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "rgtg_fast", "demo", "--prompts", "8", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_demo_writes_results_texts_and_plot(demo):
    out, _ = demo
    results = json.loads((out / "results.json").read_text())
    assert set(results["methods"]) == set(METHODS)
    best = {
        name: max(p["gold"] for p in curve) for name, curve in results["gold_over_beta"].items()
    }
    assert best["GenARM-prefix"] > best["ARGS"]
    assert len((out / "texts.jsonl").read_text().splitlines()) == 8
    assert (out / "gold_over_beta.png").read_bytes().startswith(b"\x89PNG")


def test_demo_reports_gold_of_the_texts_it_wrote(demo):
    out, _ = demo
    rows = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    mean = sum(task.gold_reward(r["prompt"], r["PARGS"]) for r in rows) / len(rows)
    reported = json.loads((out / "results.json").read_text())["methods"]["PARGS"]["gold"]
    assert reported == pytest.approx(mean, abs=0.5)  # an unfinished text costs up to 1 of 8


@torch.no_grad()
@pytest.mark.parametrize("name", ["base-G", "PARGS-G", "GenARM-prefix-G"])
def test_divergence_of_greedy_answers_is_their_surprise_under_the_base(name):
    assets = load_assets()
    prompts = assets.prompts["test"][:3]
    got = answer(assets, prompts, METHODS[name], beta=1.0, seed=0)
    for prompt, text, kl in zip(prompts, got.texts, got.kl, strict=True):
        start = assets.tokenizer(prompt, return_tensors="pt")["input_ids"]
        eos = [[assets.tokenizer.eos_token_id]]
        new = assets.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = torch.cat([start, new, torch.tensor(eos)], 1)
        logp = assets.lm(ids).logits[0, start.shape[1] - 1 : -1].log_softmax(-1)
        expected = -logp.gather(1, ids[0, start.shape[1] :, None]).sum()
        assert kl.item() == pytest.approx(expected.item(), abs=1e-3)


def test_demo_prints_texts_table_and_speed_without_a_terminal(demo):
    _, printed = demo
    for expected in ("right fix:", "gold reward", "PARGS - ARGS", "published way", "tokens/s"):
        assert expected in printed


def test_demo_is_faster_than_the_published_way(demo):
    out, _ = demo
    speed = json.loads((out / "results.json").read_text())["tokens_per_second_one_prompt"]
    assert speed["guided"] > 1.5 * speed["published"]
