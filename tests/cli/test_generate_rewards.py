"""`rgtg-fast generate`: every reward and preset that a command line or YAML can say."""

import json
import math

import peft
import pytest
import torch
import yaml
from local_http import Quiet, served
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import rgtg_fast
from rgtg_fast import Reward, WeightedRewards, presets
from rgtg_fast.cli import main
from rgtg_fast.demo.run import ASSETS

LM, RM, FULL = (str(ASSETS / name) for name in ("lm", "rm_partial", "rm_full"))
PROMPTS = [json.loads(line)["prompt"] for line in (ASSETS / "prompts.jsonl").open()][:3]
OPTIONS = {"max_new_tokens": 5, "do_sample": True, "seed": 0}


def count_words(texts):
    """A reward for tests: the number of words."""
    return [float(len(text.split())) for text in texts]


def lm(name=LM):
    return AutoModelForCausalLM.from_pretrained(name).eval()


def classifier(name=RM):
    return AutoModelForSequenceClassification.from_pretrained(name).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models beside the embedded ones: three labels, another language model, a head, an adapter."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(LM)
    labels = {"num_labels": 3, "id2label": {0: "kind", 1: "safe", 2: "short"}}
    config = AutoConfig.from_pretrained(RM, **labels, initializer_range=0.5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(root / "labels")
    other = lm()
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.05 * torch.randn_like(weight)
    other.save_pretrained(root / "other")
    base = AutoModelForSequenceClassification.from_pretrained(LM, num_labels=1)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    peft.get_peft_model(base, lora).save_pretrained(root / "adapter")
    for name in ("labels", "other", "adapter"):
        tokenizer.save_pretrained(root / name)
    (root / "head").mkdir()
    save_file({"weight": torch.randn(96)}, root / "head" / "reward_head.safetensors")
    return root


@pytest.fixture
def server():
    class Handler(Quiet):
        def do_POST(self):
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["query"]
            body = json.dumps({"rewards": count_words(texts)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with served(Handler) as address:
        yield f"{address}/score"


def answers(folder, config, *flags):
    """What a job of this YAML gives: rows by their line."""
    files = {"model": LM, "input": str(folder / "in.jsonl"), "output": str(folder / "out.jsonl")}
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    (folder / "in.jsonl").write_text(rows)
    (folder / "job.yaml").write_text(yaml.safe_dump(OPTIONS | files | config))
    main(["generate", "--config", str(folder / "job.yaml"), *flags])
    got = [json.loads(line) for line in (folder / "out.jsonl").open()]
    return {row["id"]: row for row in got}


def assert_gives(folder, config, want, *flags, reward=lambda rewards: rewards[-1]):
    """The job of `config` has the answers of `generate_many` with the options `want`."""
    got = answers(folder, config, *flags)
    tokenizer = AutoTokenizer.from_pretrained(LM)
    many = rgtg_fast.generate_many(lm(), PROMPTS, tokenizer=tokenizer, **OPTIONS | want)
    for answer in many:
        row = got.pop(answer.index + 1)
        assert "error" not in row and row["tokens"] == answer.tokens
        value = reward(answer.rewards)
        assert row["reward"] == (value if value is None else pytest.approx(value, abs=1e-4))
        assert row["kl"] == pytest.approx(math.fsum(answer.kl), abs=1e-4)
    assert got == {}


def test_a_sum_by_flags(tmp_path):
    flags = ("--reward-model", RM, "--weight", "2", "--reward-model", FULL, "--weight=-0.5")
    want = {"reward_model": WeightedRewards([classifier(), classifier(FULL)], [2, -0.5])}
    assert_gives(tmp_path, {}, want, *flags)


def test_a_sum_by_yaml_of_parts_with_options_of_their_own(tmp_path, folders):
    parts = [
        {"model": RM, "weight": 0.7, "clamp": [-1, 1]},
        {"model": str(folders / "labels"), "label": {"safe": 1.0, "short": -1.0}, "weight": 0.3},
    ]
    config = {"reward_model": {"parts": parts, "reduction": "min", "clamp": [-2, 2]}}
    labels = Reward(classifier(folders / "labels"), reward_label={"safe": 1.0, "short": -1.0})
    ours = [Reward(classifier()).clamp(-1, 1), labels]
    want = WeightedRewards(ours, [0.7, 0.3], reduction="min", bounds=(-2, 2))
    assert_gives(tmp_path, config, {"reward_model": want})


def test_a_label_by_a_flag(tmp_path, folders):
    config = {"reward_model": str(folders / "labels")}
    want = {"reward_model": classifier(folders / "labels"), "reward_label": "safe"}
    assert_gives(tmp_path, config, want, "--reward-label", "safe")


@pytest.mark.parametrize("kind", ["genarm", "seq2seq"])
def test_the_reward_of_an_autoregressive_model_is_the_sum_over_its_tokens(tmp_path, folders, kind):
    other = str(folders / "other")
    want = {"reward_model": lm(other), "reward_kind": kind, "k": None, "top_k": 0}
    config = {"reward_model": other, "k": None, "top_k": 0}
    assert_gives(tmp_path, config, want, "--reward-kind", kind, reward=math.fsum)


def test_a_sum_of_both_kinds_has_no_reward_of_an_answer(tmp_path, folders):
    other = str(folders / "other")
    config = {"reward_model": [RM, {"model": other, "kind": "genarm", "weight": 0.5}]}
    parts = [classifier(), Reward(lm(other), reward_kind="genarm")]
    want = {"reward_model": WeightedRewards(parts, [1, 0.5])}
    assert_gives(tmp_path, config, want, reward=lambda rewards: None)


def test_a_policy_and_its_reference(tmp_path, folders):
    other = str(folders / "other")
    config = {"reward_model": {"policy": other, "reference": LM}}
    assert_gives(tmp_path, config, {"reward_model": (lm(other), lm())})


def test_a_function_and_a_server(tmp_path, server):
    want = {"reward_model": count_words}
    assert_gives(tmp_path, {"reward_model": f"{__name__}:count_words"}, want)
    (tmp_path / "server").mkdir()
    config = {"reward_model": {"url": server, "batch_size": 4, "deadline": 30}}
    assert_gives(tmp_path / "server", config, want)


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_a_head_and_an_adapter_on_the_language_model(tmp_path, folders, kind):
    config = {"reward_model": {"model": str(folders / kind), "kind": kind}}
    got = answers(tmp_path, config)
    model, tokenizer = lm(), AutoTokenizer.from_pretrained(LM)
    if kind == "head":
        weight = load_file(folders / "head" / "reward_head.safetensors")["weight"]
        reward = rgtg_fast.RewardHead(model, weight)
    else:
        reward = rgtg_fast.RewardAdapter.from_pretrained(model, folders / "adapter")
    many = rgtg_fast.generate_many(
        model, PROMPTS, tokenizer=tokenizer, reward_model=reward, **OPTIONS
    )
    assert {a.index + 1: a.tokens for a in many} == {i: row["tokens"] for i, row in got.items()}


def test_a_preset_by_a_flag_and_what_the_job_says_over_it(tmp_path):
    got = presets.args(classifier()) | {"beta": 0.5}
    want = {n: v for n, v in got.items() if n != "do_sample"} | {"do_sample": True}
    assert_gives(tmp_path, {"reward_model": RM, "beta": 0.5}, want, "--preset", "args")


def test_presets_of_language_models_take_them_in_their_order(tmp_path, folders):
    other = str(folders / "other")
    config = {"reward_model": [other, LM], "preset": {"name": "dexperts", "alpha": 1.5}}
    assert_gives(tmp_path, config, presets.dexperts(lm(other), lm(), alpha=1.5))
    (tmp_path / "one").mkdir()
    config = {"reward_model": other, "preset": "genarm"}
    assert_gives(tmp_path / "one", config, presets.genarm(lm(other)), reward=math.fsum)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"reward_model": None}, "reward_model is missing; pass --reward-model"),
        ({"reward_model": 5}, "reward_model=5; write a folder or hub name, a URL"),
        ({"reward_model": {"weight": 1}}, "a mapping with one of model, url, function"),
        ({"reward_model": {"model": RM, "lable": 1}}, "reward_model: lable: did you mean label?"),
        ({"reward_model": {"parts": []}}, "parts=[]; write a list of rewards"),
        ({"reward_model": [RM, "./gone"]}, "reward_model[1]: no model at './gone'"),
        ({"reward_model": {"model": RM, "kind": "rad"}}, "kind='rad'; pass one of classifier"),
        ({"reward_model": {"policy": LM}}, "reference=None; write a text"),
        ({"reward_model": {"url": "ftp://x"}}, "pass the http:// or https:// URL"),
        ({"reward_model": "math:sin_"}, "'math:sin_' cannot be imported"),
        ({"preset": "argz"}, "preset='argz'; name one of aad, args"),
        ({"preset": {"name": "args", "alpha": 2}}, "preset args, with 1 models in reward_model"),
        ({"preset": "ilql"}, "needs the weights of heads"),
        ({"preset": "dexperts"}, "missing a required argument: 'anti_expert'"),
        ({"betta": 2}, "unknown key betta: did you mean beta?"),
        ({"top_p": 1.5}, "top_p=1.5 must lie in (0, 1]"),
        ({"speculate": 4}, "speculate= is not an option of generate_many"),
        ({"k": 65}, "k=65 is out of range"),
        ({"batch_size": 0}, "batch_size=0; pass at least 1"),
        ({"dtype": "int8"}, "dtype='int8'; pass one of auto"),
        ({"device": "gpu"}, "device='gpu'; write auto, cpu or cuda"),
        ({"engine": "tpu"}, "engine='tpu'; pass one of hf, vllm, ray"),
        ({"shard": 3}, "shard=3; write i/n"),
        ({"model": "./gone"}, "model: no model at './gone'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_what_cannot_be_used_is_one_line_before_any_answer(tmp_path, capsys, config, message):
    with pytest.raises(SystemExit) as end:
        answers(tmp_path, {"reward_model": RM} | config)
    assert end.value.code == 2 and message in str(end.value) and "\n" not in str(end.value)
    output = tmp_path / "out.jsonl"
    assert not output.exists() or output.read_bytes() == b""


def test_weights_need_their_models(tmp_path):
    with pytest.raises(SystemExit, match="--weight is given 1 times, and --reward-model 0 times"):
        answers(tmp_path, {}, "--weight", "1")


def test_a_reward_model_without_a_tokenizer_says_what_to_write(tmp_path):
    classifier().save_pretrained(tmp_path / "rm")
    with pytest.raises(SystemExit, match="has no tokenizer; write a mapping with model: and"):
        answers(tmp_path, {"reward_model": str(tmp_path / "rm")})
    config = {"reward_model": {"model": str(tmp_path / "rm"), "tokenizer": LM}}
    assert_gives(tmp_path, config, {"reward_model": classifier()})


def gone(texts):
    """A reward for tests: a server that has gone away after some steps."""
    gone.calls += 1
    if gone.calls > 4:
        raise ValueError("no scores came")
    return count_words(texts)


def test_a_reward_that_fails_on_the_way_is_a_failure_that_can_be_gone_on_from(tmp_path, capsys):
    gone.calls = 0
    config = {"reward_model": f"{__name__}:gone", "batch_size": 1, "max_new_tokens": 3}
    with pytest.raises(SystemExit, match=r"no scores came.*the same command goes on") as end:
        answers(tmp_path, config)
    assert end.value.code == 1
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 1
    gone.calls = -1000
    assert answers(tmp_path, config).keys() == {1, 2, 3}
    assert "1 answered already" in capsys.readouterr().err
