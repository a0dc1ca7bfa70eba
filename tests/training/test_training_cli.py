"""`python -m rgtg_fast train`: from a config file to a folder that generate can use."""

import textwrap
import types

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tiny import gpt2_lm, gpt2_rm, tokenizer
from training import config, train, trainer, write_rows

import rgtg_fast
from rgtg_fast.cli import main
from rgtg_fast.training import PreferenceDataset, fit_head, pair_features
from rgtg_fast.training.metrics import label_metrics, pair_metrics, prefix_report
from rgtg_fast.training.output_folder import last_checkpoint
from rgtg_fast.training.settings import check_settings, read_settings
from rgtg_fast.training.trainer_options import check_trainer_options

MINIMAL = {"model": "m", "train": "t.jsonl", "output_dir": "o"}


def fenced(text, language):
    return text.split(f"```{language}\n")[1].split("```")[0]


def run_card(out, capsys):
    """What the Python code of the model card makes as `out`."""
    names = {}
    exec(fenced((out / "README.md").read_text(), "python"), names)
    tok = transformers.AutoTokenizer.from_pretrained(out)
    assert tok.decode(names["out"][0]) in capsys.readouterr().out
    return names["out"]


def test_a_run_writes_model_metrics_plot_and_card(folder, capsys):
    metrics, out = train(folder)
    assert "train: 48 of 48 rows kept" in capsys.readouterr().out
    assert metrics["steps"] == 20 and metrics["data"]["eval"]["kept"] == 24
    assert metrics["eval"]["mean"]["accuracy"] > 0.9
    assert set(metrics["eval"]["deciles"]) == {str(d) for d in range(10, 101, 10)}
    assert (out / "accuracy_by_prefix.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "accuracy_by_prefix.png" in card and "48 of 48 rows" in card
    assert run_card(out, capsys).shape[1] > 1
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "<eos>"


def test_the_settings_in_the_card_are_those_of_the_run(folder):
    lora = "lora={r: 2, target_modules: all-linear}"
    _, out = train(folder, lora, "max_steps=1", "learning_rate=1e-5", "first=2", "margin=0.5")
    text = (out / "README.md").read_text()
    assert check_settings(yaml.safe_load(fenced(text, "yaml"))) == read_settings(
        folder / "cfg.yaml", [lora, "max_steps=1", "learning_rate=1e-5", "first=2", "margin=0.5"]
    )


LORA = "lora={r: 2, target_modules: all-linear}"


@pytest.mark.parametrize(
    ("overrides", "model", "guide"),
    [
        (["loss_type=farma"], "lm", "VocabRewardScorer(rm)"),
        (["loss_type=genarm"], "lm", "AutoregressiveScorer(rm)"),
        (["loss_type=genarm", LORA], "lm", "AutoregressiveScorer(rm)"),
        (["loss_type=genarm_prefix"], "lm", "AutoregressiveScorer(rm)"),
        (["loss_type=seq2seq"], "lm", "RewriteScorer(rm)"),
        (["loss_type=seq2seq", LORA], "lm", "RewriteScorer(rm, separator=2)"),
        (["loss_type=full"], "lm", "reward_model=rm,"),
        ([LORA], "lm", "reward_model=rm,"),
        (["frozen=true"], "lm", "RewardHead(lm, weight)"),
        (["loss_type=rad", "train={}", "eval=null"], "rm", "reward_model=rm,"),
        (["loss_type=soft_q", "train={}", "eval=null"], "lm", "VocabRewardScorer(rm)"),
        (["loss_type=soft_q", "train={}", "eval=null", LORA], "lm", "VocabRewardScorer(rm)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_what_the_card_says_runs_as_written(folder, capsys, overrides, model, guide):
    labelled = folder / "labelled.jsonl"
    labelled.write_text('{"text": "thank you", "label": 1}\n{"text": "no", "label": 0}\n')
    overrides = [o.replace("train={}", f"train={labelled}") for o in overrides]
    # Room for the draft beside the answer.
    gpt2_lm(initializer_range=0.1, n_positions=128).save_pretrained(folder / "lm")
    _, out = train(folder, *overrides, "max_steps=2", model=model)
    assert guide in fenced((out / "README.md").read_text(), "python")
    assert run_card(out, capsys).shape[1] > 1


def test_the_example_of_the_package_runs_as_written(folder, monkeypatch, capsys):
    """With local files in place of the hub's."""
    monkeypatch.chdir(folder)
    (folder / "pairs.jsonl").write_text((folder / "train.jsonl").read_text())
    (folder / "held_out.jsonl").write_text((folder / "eval.jsonl").read_text())
    doc = textwrap.dedent(rgtg_fast.training.__doc__.split("::\n")[1].split("It is a ")[0])
    code = doc.replace('"gpt2"', repr(str(folder / "lm")))
    exec(code.replace('"rm", ', '"out", num_train_epochs=1, use_cpu=True, '), {})
    assert "eval_accuracy_decile_50" in capsys.readouterr().out


def test_labelled_texts_train_rad(folder):
    rows = [{"text": "thank you", "label": 1}, {"text": "no", "label": 0}] * 4
    path = folder / "labelled.jsonl"
    write_rows(path, rows)
    metrics, out = train(
        folder, "loss_type=rad", f"train={path}", f"eval={path}", "max_steps=2", "leaks=allow"
    )
    assert set(metrics["eval"]) == {"full", "deciles"}
    assert "squared error" in (out / "README.md").read_text()


def test_a_frozen_model_gets_a_head_only(folder):
    metrics, out = train(folder, "frozen=true", "l2=0.01", model="lm")
    assert metrics["eval"]["mean"]["accuracy"] > 0.8
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "lm")
    pairs = PreferenceDataset(folder / "train.jsonl", tokenizer())
    fit = fit_head(pair_features(lm, pairs), l2=0.01)
    weight = load_file(out / "reward_head.safetensors")["weight"]
    torch.testing.assert_close(weight, fit.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loss_type", ["prefix", "full"])
def test_the_report_of_a_head_is_that_of_a_classifier_with_it(folder, loss_type):
    options = (f"loss_type={loss_type}", "label_smoothing=0.1", "l2=0.01")
    metrics, out = train(folder, "frozen=true", *options, model="lm")
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "lm")
    data = [PreferenceDataset(folder / f"{n}.jsonl", tokenizer()) for n in ("train", "eval")]
    features = pair_features(lm, data[0], full=loss_type == "full")
    fit = fit_head(features, l2=0.01, label_smoothing=0.1)
    weight = load_file(out / "reward_head.safetensors")["weight"]
    torch.testing.assert_close(weight, fit.weight, rtol=1e-3, atol=1e-3)
    rm = gpt2_rm(initializer_range=0.1, n_positions=128)
    rm.load_state_dict(lm.transformer.state_dict(prefix="transformer."), strict=False)
    rm.score.weight.data = weight[None]
    predicted = trainer(folder, rm, data[1]).predict(data[1])
    expected = prefix_report(predicted.predictions, predicted.label_ids)
    for kind in ("full", "mean"):
        assert metrics["eval"][kind] == pytest.approx(expected[kind])
    for kind in ("deciles", "lengths"):
        for key, value in expected[kind].items():
            assert metrics["eval"][kind][key]["pairs"] == value["pairs"]
            assert metrics["eval"][kind][key]["accuracy"] == pytest.approx(value["accuracy"])


def test_training_rows_are_held_out_and_adapters_saved(folder):
    lora = "lora={r: 2, target_modules: all-linear}"
    metrics, out = train(folder, "hold_out=12", lora, "max_steps=2", evaluate=False)
    assert metrics["data"]["train"]["kept"] == 36 and metrics["data"]["eval"]["kept"] == 12
    assert (out / "adapter_model.safetensors").exists()


def test_a_run_goes_on_from_its_last_checkpoint(folder):
    options = ("lr_scheduler_type=constant", "save_steps=2", "logging_steps=1")
    train(folder, "max_steps=4", *options)
    cut = folder / "out" / "checkpoint-5"  # killed while it wrote
    cut.mkdir()
    (cut / "trainer_state.json").write_text('{"global_step": 5, ')
    assert last_checkpoint(folder / "out").name == "checkpoint-4"
    metrics, out = train(folder, "max_steps=6", "resume=true", *options)
    assert metrics["steps"] == 6 and (out / "checkpoint-6").exists()
    assert [entry["step"] for entry in metrics["history"]] == [1, 2, 3, 4, 5, 6]
    mean = sum(entry["loss"] for entry in metrics["history"]) / 6
    assert metrics["train_loss"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rte": 1}, "unknown key learning_rte: did you mean learning_rate?"),
        ({"modl": "x"}, "unknown key modl: did you mean model?"),
        ({"model": None}, "lacks model"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is no float"),
        ({"max_steps": 2.5}, "max_steps: 2.5 is no int"),
        ({"max_steps": 10**26}, "max_steps: 1000.* is out of range"),
        ({"learning_rate": 10**400}, "learning_rate: 1000.* is out of range"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is out of range"),
        ({"learning_rate": "inf"}, "learning_rate: inf is out of range"),
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


def test_a_strategy_that_yaml_reads_as_false_is_no(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text("model: m\ntrain: t\noutput_dir: o\nsave_strategy: no\n")
    args = read_settings(path, ["eval_strategy=no", "bf16=no"]).args
    assert args["save_strategy"] == args["eval_strategy"] == "no" and args["bf16"] is False


def test_a_named_set_starts_at_the_authors_first_prefix():
    assert check_settings(MINIMAL | {"train": "tldr:x.jsonl"}).args["first"] == 2
    assert check_settings(MINIMAL | {"train": "tldr", "first": 1}).args["first"] == 1


def test_the_command_line_ends_with_the_message(tmp_path):
    with pytest.raises(SystemExit, match="train: no config file"):
        main(["train", "--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=./nowhere", "model='./nowhere' cannot be loaded by AutoTokenizer"),
        ("tokenizer=./nowhere", "tokenizer='./nowhere' cannot be loaded"),
        ("train=no/pairs.csv", "no data at 'no/pairs.csv'"),
        ("lora={rank: 3}", "lora: .*unexpected keyword argument 'rank'"),
        ("lora={r: x}", "lora makes no adapter: '<=' not supported"),
        ("resume=true", "holds no whole checkpoint to go on from"),
        ("resume=nowhere", "resume='nowhere' is no folder"),
        ("output_dir=cfg.yaml", "output_dir='cfg.yaml' is no directory"),
        ("max_steps=null", "max_steps: None is no int"),
        ("learning_rate=[1]", r"learning_rate: \[1\] is no float"),
        ("frozen=true margin=1.0", "margin has no part in the fit of a frozen"),
        ("frozen=true resume=true", "frozen: true fits a head only"),
        ("eval=eval.jsonl hold_out=3", "hold_out and eval are both given"),
        ("hold_out=48 eval=null", "48 rows to hold out leave nothing of 48 rows"),
        ("max_length=4", "48 with an empty answer after the cut at max_length"),
        ("seed=-1", "Seed must be between 0 and"),
        ("data_seed=-1", "data_seed=-1; pass at least 0"),
        ("per_device_train_batch_size=0", "per_device_train_batch_size=0; pass at least 1"),
        ("per_device_eval_batch_size=-2", "per_device_eval_batch_size=-2; pass at least 1"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps=0; pass at least 1"),
        ("eval_accumulation_steps=0", "eval_accumulation_steps=0; pass at least 1"),
        ("learning_rate=-1", "learning_rate=-1.0; pass at least 0"),
        ("learning_rate=inf", "learning_rate: inf is out of range"),
        ("neftune_noise_alpha=-1", "neftune_noise_alpha=-1.0; pass at least 0"),
        ("max_steps=0", "max_steps=0 and num_train_epochs=3.0 train nothing"),
        ("max_steps=-1 num_train_epochs=0", "num_train_epochs=0.0 train nothing"),
        ("prediction_loss_only=true", "prediction_loss_only=True leaves no rewards"),
        ("dtype=float8_e4m3fn", "dtype='float8_e4m3fn'; write float32"),
        ("optim=adam", "adam is not a valid OptimizerNames"),
        ("lora={r: 0}", "`r` should be a positive integer"),
        ("lora={r: 1.5}", "lora makes no adapter"),
        ("lora={r: 1000000000000000, target_modules: all-linear}", "lora makes no adapter"),
        ("lora={r: 2, target_modules: nothing}", "No modules were targeted"),
        ("lora={r: 2, target_modules: [1]}", "lora makes no adapter"),
        ("lora={r: 2, target_modules: '('}", "lora makes no adapter"),
        ("lora={r: 2, lora_alpha: x}", "lora makes no adapter"),
        ("lora={r: 2, r: 3}", "'r' is given twice"),
        ("lora=" + "[" * 5000, "is not YAML: maximum recursion"),
        ("seed=" + "9" * 5000, "is not YAML: Exceeds the limit"),
        ("output_dir=cfg.yaml/sub", "cannot be written to"),
        ("lr_scheduler_kwargs={foo: 1}", "lr_scheduler_kwargs={'foo': 1} makes no schedule of"),
        ("lr_scheduler_type=cosine lr_scheduler_kwargs=5", "lr_scheduler_kwargs=5 makes no"),
        ("lr_scheduler_type=warmup_stable_decay", "lr_scheduler_kwargs={} makes no schedule"),
        ("report_to=abacus", "report_to='abacus' is not installed here, or not known"),
        ("metric_for_best_model=eval_mse", "metric_for_best_model='mse'; pass one of 'loss', 'acc"),
        ("resume_from_checkpoint=nowhere", "resume_from_checkpoint='nowhere' has no effect"),
        ("eval=train.jsonl", "48 of 48 training rows are in the eval set too"),
    ],
)
def test_foreseeable_mistakes_end_with_one_line(folder, monkeypatch, override, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=f"train: .*{message}"):
        train(folder, *override.split(" ") if "{" not in override else [override])
    assert not [p for p in (folder / "out").glob("*") if p.name != ".lock"]


def test_a_key_given_twice_in_the_config_is_named(tmp_path):
    (tmp_path / "cfg.yaml").write_text("model: m\ntrain: t\nmodel: n\noutput_dir: o\n")
    with pytest.raises(ValueError, match=r"cfg.yaml is not YAML: 'model' is given twice"):
        read_settings(tmp_path / "cfg.yaml")


def test_accuracy_counts_each_prefix_length_once_it_differs():
    margins = torch.tensor([[0.0, 1.0, 2.0, 9.0], [-1.0, 9.0, 9.0, 9.0]])
    labels = torch.tensor([[3, 2, 1], [1, 1, 0]])  # lengths, equal tokens
    report = prefix_report(margins, labels)
    assert (report["full"]["accuracy"], report["full"]["pairs"]) == (0.5, 2)
    assert report["mean"]["accuracy"] == 0.5  # both of 2, and 0 of 1
    assert report["lengths"]["1"]["pairs"] == 1 and report["lengths"]["2"]["accuracy"] == 1.0
    assert report["deciles"]["10"]["pairs"] == 1


def test_accuracy_rounds_deciles_up_and_halves_ties():
    margins = torch.tensor([[-1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, -1.0, -1.0]])
    labels = torch.tensor([[3, 2, 0], [3, 3, 0], [1, 3, 0]])
    report = prefix_report(margins, labels)
    right = {"30": 2 / 3, "40": 2 / 3, "60": 2 / 3, "70": 0.5, "100": 0.5}
    assert {k: report["deciles"][k]["accuracy"] for k in right} == pytest.approx(right)
    assert report["full"]["ci95"] == pytest.approx(1.96 * 0.5 / 3**0.5)
    assert prefix_report(margins[:1], labels[:1])["full"]["pairs"] == 1


def test_a_reporter_that_is_not_installed_is_named_and_what_is_there(monkeypatch, tmp_path):
    names = "rgtg_fast.training.trainer_options.get_available_reporting_integrations"
    monkeypatch.setattr(names, lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=r"^report_to='wandb' is not.*one of tensorboard, none$"):
        check_trainer_options(config(tmp_path, report_to="wandb"), "pairs")
    check_trainer_options(config(tmp_path, report_to="tensorboard"), "pairs")


def test_the_metrics_that_may_choose_the_best_model_are_those_that_evaluation_reports(tmp_path):
    long = types.SimpleNamespace(
        predictions=np.ones((1, 512)), label_ids=np.array([[512.0, 512.0, 0.0]])
    )
    for name in ("loss", *pair_metrics(long)):
        check_trainer_options(config(tmp_path, metric_for_best_model=f"eval_{name}"), "pairs")
    long.label_ids = np.array([[1.0, 512.0]])
    for name in ("loss", *label_metrics(long)):
        check_trainer_options(config(tmp_path, metric_for_best_model=name), "labelled")
