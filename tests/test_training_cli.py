"""`python -m rgtg_fast train`: from a config file to a folder that generate can use."""

import json

import pytest
import torch
import transformers
from tiny import gpt2_lm, gpt2_rm, llama_lm, prompts, tokenizer
from training import text_pairs

import rgtg_fast
from rgtg_fast.cli import main
from rgtg_fast.training.metrics import prefix_report
from rgtg_fast.training.settings import check_settings, read_settings

MINIMAL = {"model": "m", "train": "t.jsonl", "output_dir": "o"}


@pytest.fixture
def folder(tmp_path):
    """A language model, a classifier without head training, data, and a config file's writer."""
    gpt2_lm(initializer_range=0.1).save_pretrained(tmp_path / "lm")
    gpt2_rm(initializer_range=0.1).save_pretrained(tmp_path / "rm")
    for name in ("lm", "rm"):
        tokenizer().save_pretrained(tmp_path / name)
    for name, rows in (("train", text_pairs(48)), ("eval", text_pairs(24, seed=3))):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    transformers.utils.logging.set_verbosity_error()
    return tmp_path


def train(folder, *overrides, model="rm", evaluate=True):
    lines = [
        f"model: {folder / model}",
        f"train: {folder / 'train.jsonl'}",
        *([f"eval: {folder / 'eval.jsonl'}"] if evaluate else []),
        f"output_dir: {folder / 'out'}",
        "max_steps: 20",
        "learning_rate: 2e-3",
        "per_device_train_batch_size: 8",
        "use_cpu: true",
        "disable_tqdm: true",
    ]
    (folder / "cfg.yaml").write_text("\n".join(lines) + "\n")
    main(["train", "--config", str(folder / "cfg.yaml"), *overrides])
    return json.loads((folder / "out" / "metrics.json").read_text()), folder / "out"


def test_a_run_writes_model_metrics_plot_and_card(folder, capsys):
    metrics, out = train(folder)
    assert "train: 48 of 48 rows kept" in capsys.readouterr().out
    assert metrics["steps"] == 20 and metrics["data"]["eval"]["kept"] == 24
    assert metrics["eval"]["mean"]["accuracy"] > 0.9
    assert set(metrics["eval"]["deciles"]) == {str(d) for d in range(10, 101, 10)}
    assert (out / "accuracy_by_prefix.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "accuracy_by_prefix.png" in card and "48 of 48 rows" in card
    rm = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    tok = transformers.AutoTokenizer.from_pretrained(out)
    assert tok.eos_token == "<eos>"
    rgtg_fast.generate(llama_lm(), **prompts(4), reward_model=rm, k=3, max_new_tokens=2)


@pytest.mark.parametrize(
    ("loss_type", "scorer"), [("farma", "VocabRewardScorer"), ("genarm", "AutoregressiveScorer")]
)
def test_models_over_the_vocabulary_say_how_they_guide(folder, loss_type, scorer):
    metrics, out = train(folder, f"loss_type={loss_type}", "max_steps=2", model="lm")
    assert metrics["loss_type"] == loss_type and 0 <= metrics["eval"]["full"]["accuracy"] <= 1
    assert scorer in (out / "README.md").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(out)


def test_labelled_texts_train_rad(folder):
    rows = [{"text": "thank you", "label": 1}, {"text": "no", "label": 0}] * 4
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics, out = train(
        folder, "loss_type=rad", f"train={path}", f"eval={path}", "max_steps=2", "leaks=allow"
    )
    assert set(metrics["eval"]) == {"full", "deciles"}
    assert "squared error" in (out / "README.md").read_text()


def test_a_frozen_model_gets_a_head_only(folder):
    metrics, out = train(folder, "frozen=true", "l2=0.01", model="lm")
    assert metrics["eval"]["mean"]["accuracy"] > 0.8
    from safetensors.torch import load_file

    assert load_file(out / "reward_head.safetensors")["weight"].shape == (32,)
    assert "RewardHead" in (out / "README.md").read_text()


def test_training_rows_are_held_out_and_adapters_saved(folder):
    lora = "lora={r: 2, target_modules: all-linear}"
    metrics, out = train(folder, "hold_out=12", lora, "max_steps=2", evaluate=False)
    assert metrics["data"]["train"]["kept"] == 36 and metrics["data"]["eval"]["kept"] == 12
    assert (out / "adapter_model.safetensors").exists()
    assert "AutoPeftModelForSequenceClassification" in (out / "README.md").read_text()


def test_a_run_goes_on_from_its_last_checkpoint(folder):
    options = ("lr_scheduler_type=constant", "save_steps=2", "logging_steps=1")
    train(folder, "max_steps=4", *options)
    metrics, out = train(folder, "max_steps=6", "resume=true", *options)
    assert metrics["steps"] == 6 and (out / "checkpoint-6").exists()
    assert [entry["step"] for entry in metrics["history"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rte": 1}, "unknown key learning_rte: did you mean learning_rate?"),
        ({"modl": "x"}, "unknown key modl: did you mean model?"),
        ({"model": None}, "lacks model"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is no float"),
        ({"max_steps": 2.5}, "max_steps: 2.5 is no int"),
        ({"lora": "yes"}, "lora is 'yes'; write a mapping"),
        ({"hold_out": -1}, "hold_out=-1"),
        ({"frozen": True, "loss_type": "rad"}, "frozen"),
    ],
)
def test_mistakes_in_the_config_are_named(values, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        check_settings(MINIMAL | values)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text("model: m\ntrain: t\noutput_dir: o\nlearning_rate: 5e-6\n")
    settings = read_settings(path, ["margin=1e-1", "max_steps=7"])
    assert settings.args["learning_rate"] == 5e-6
    assert settings.args["margin"] == 0.1 and settings.args["max_steps"] == 7


def test_a_named_set_starts_at_the_authors_first_prefix():
    assert check_settings(MINIMAL | {"train": "tldr:x.jsonl"}).args["first"] == 2
    assert check_settings(MINIMAL | {"train": "tldr", "first": 1}).args["first"] == 1


def test_the_command_line_ends_with_the_message(tmp_path):
    with pytest.raises(SystemExit, match="train: no config file"):
        main(["train", "--config", str(tmp_path / "none.yaml")])


def test_accuracy_counts_each_prefix_length_once_it_differs():
    margins = torch.tensor([[0.0, 1.0, 2.0, 9.0], [-1.0, 9.0, 9.0, 9.0]])
    labels = torch.tensor([[3, 2, 1], [1, 1, 0]])  # lengths, equal tokens
    report = prefix_report(margins, labels)
    assert (report["full"]["accuracy"], report["full"]["pairs"]) == (0.5, 2)
    assert report["mean"]["accuracy"] == 0.5  # both of 2, and 0 of 1
    assert report["lengths"]["1"]["pairs"] == 1 and report["lengths"]["2"]["accuracy"] == 1.0
    assert report["deciles"]["10"]["pairs"] == 1
