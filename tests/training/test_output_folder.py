"""One run a folder: nothing is mixed, nothing foreign is lost, and what was cut off goes on."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from tiny import gpt2_rm
from training import train, trainer
from transformers import Trainer

from rgtg_fast.training import PrefixRewardTrainer
from rgtg_fast.training.output_folder import last_checkpoint, locked, remove_run, run_files

LORA = "lora={r: 2, target_modules: all-linear}"
EACH_TWO = ("max_steps=6", "save_steps=2", "logging_steps=1")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(out):
    return load_file(out / "model.safetensors")


def fail_at(monkeypatch, of, name, step, error=KeyboardInterrupt):
    """`of.name` raises at this step of the run, and `stop()` mends it."""
    original = getattr(of, name)

    def failing(self, *args, **kwargs):
        if self.state.global_step == step:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(of, name, failing)
    return lambda: monkeypatch.setattr(of, name, original)


def test_a_used_folder_is_refused_untouched_with_the_ways_out(folder):
    _, out = train(folder, LORA, "max_steps=1")
    before = contents(out)
    with pytest.raises(SystemExit) as refusal:
        train(folder, "max_steps=1")
    for way in ("holds a finished run", "resume: true", "overwrite: true", "another output_dir"):
        assert way in str(refusal.value)
    assert contents(out) == before


def test_a_folder_with_a_model_of_other_origin_is_refused(folder):
    (folder / "out").mkdir()
    (folder / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"files that a run writes \(adapter_config.json\)"):
        train(folder, "max_steps=1")


def test_overwrite_removes_the_old_run_and_nothing_foreign(folder):
    _, out = train(folder, LORA, "max_steps=1")
    foreign = {"notes.txt", "checkpoint-1/notes.txt", "checkpoint-best/model.safetensors"}
    for name in foreign:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    train(folder, "max_steps=2", "overwrite=true")
    names = {str(path) for path in contents(out)}
    assert foreign < names and "model.safetensors" in names
    assert not {name for name in names if "adapter" in name}
    assert all((out / name).read_text() == "mine" for name in foreign)


@pytest.mark.parametrize(
    ("overrides", "model"), [((), "rm"), ((LORA,), "rm"), (("loss_type=genarm",), "lm")]
)
def test_all_that_a_run_writes_is_known_to_overwrite(folder, overrides, model):
    _, out = train(folder, "max_steps=1", *overrides, model=model)
    assert len(run_files(out)) > 7
    remove_run(out)
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_a_mistake_in_the_config_leaves_the_old_run_as_it_was(folder):
    _, out = train(folder, "max_steps=1")
    before = contents(out)
    with pytest.raises(SystemExit, match="no data at"):
        train(folder, "overwrite=true", "train=nowhere.jsonl")
    with pytest.raises(SystemExit, match="lies in output_dir"):
        train(folder, "overwrite=true", f"model={out}")
    with pytest.raises(SystemExit, match="drop one of them"):
        train(folder, "overwrite=true", "resume=true")
    assert contents(out) == before


def test_two_runs_into_one_folder_are_refused(folder):
    with locked(folder / "out"), pytest.raises(SystemExit, match="written by another process"):
        train(folder, "max_steps=1")
    train(folder, "max_steps=1")


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (Trainer, "_save_rng_state"),
        pytest.param(Trainer, "training_step", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_says_how_to_go_on_and_ends_as_an_uninterrupted_one(
    folder, monkeypatch, capsys, of, name
):
    _, out = train(folder, *EACH_TWO)
    whole = weights(out)
    mend = fail_at(monkeypatch, of, name, 4)
    with pytest.raises(SystemExit) as stop:
        train(folder, *EACH_TWO, "overwrite=true")
    kept = out / f"checkpoint-{2 if name == '_save_rng_state' else 4}"
    assert stop.value.code == 130 and last_checkpoint(out) == kept
    said = capsys.readouterr().err
    assert f"train: interrupted; the last checkpoint is {kept}; go on with resume=true" in said
    assert "Traceback" not in said and not (out / "metrics.json").exists()
    mend()
    with pytest.raises(SystemExit, match="holds a half-finished run"):
        train(folder, *EACH_TWO)
    metrics, _ = train(folder, *EACH_TWO, "resume=true")
    assert metrics["steps"] == 6
    for key, value in weights(out).items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=0)


def test_an_interrupt_before_the_first_checkpoint_says_so(folder, monkeypatch, capsys):
    mend = fail_at(monkeypatch, Trainer, "training_step", 1)
    with pytest.raises(SystemExit):
        train(folder, *EACH_TWO)
    assert "nothing had been written; the same command starts again" in capsys.readouterr().err
    mend()
    train(folder, *EACH_TWO)


def test_a_checkpoint_that_is_written_again_is_not_whole_before_its_end(folder, monkeypatch):
    _, out = train(folder, *EACH_TWO)
    mend = fail_at(monkeypatch, Trainer, "_save_rng_state", 2)
    trained = trainer(out, gpt2_rm(initializer_range=0.1), save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trained.train()
    mend()
    assert (out / "checkpoint-2" / "model.safetensors").exists()
    assert last_checkpoint(out).name == "checkpoint-6"
    (out / "checkpoint-6" / "trainer_state.json").unlink()
    assert last_checkpoint(out).name == "checkpoint-4"


def test_a_run_cut_off_after_its_last_step_only_writes_what_is_missing(folder, monkeypatch):
    mend = fail_at(monkeypatch, PrefixRewardTrainer, "predict", 6)
    with pytest.raises(SystemExit):
        train(folder, *EACH_TWO)
    mend()
    fail_at(monkeypatch, Trainer, "training_step", 6, AssertionError)
    metrics, out = train(folder, *EACH_TWO, "resume=true")
    assert metrics["steps"] == 6 and len(metrics["history"]) == 6
    last = load_file(out / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(value, last[key]) for key, value in weights(out).items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resume=true"], "is finished, at step 6; raise max_steps"),
        (["resume=true", "max_steps=4"], "is at step 6, beyond the 4 steps"),
        (["resume=true", "max_steps=-1", "num_train_epochs=0.5"], "at step 6, beyond the 3 steps"),
        (["resume=true", "max_steps=9", LORA], "holds a whole model and the run trains an adapter"),
        (["resume={out}/checkpoint-2"], "is not the last checkpoint"),
        (["resume={out}/checkpoint-half"], "holds no whole checkpoint"),
    ],
)
def test_a_resume_that_cannot_be_right_is_refused_untouched(folder, overrides, message):
    _, out = train(folder, *EACH_TWO)
    (out / "checkpoint-half").mkdir()
    before = contents(out)
    with pytest.raises(SystemExit, match=message):
        train(folder, *EACH_TWO, *(o.replace("{out}", str(out)) for o in overrides))
    assert contents(out) == before


@pytest.mark.parametrize("room", [40_000, 200_000])  # bytes: less than the model, the optimiser
def test_a_full_disk_is_named_and_leaves_nothing_that_looks_finished(folder, room):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(SystemExit, match=r"cannot be written to, is the disk full\?"):
            train(folder, *EACH_TWO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (folder / "out" / "metrics.json").exists()
    assert last_checkpoint(folder / "out") is None
    train(folder, *EACH_TWO, "overwrite=true")


def test_figures_are_written_whole_or_not_at_all(folder, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rgtg_fast.training.output_folder.os.replace", full)
    with pytest.raises(SystemExit, match="is the disk full"):
        train(folder, "max_steps=1")
    assert not [p for p in (folder / "out").iterdir() if "metrics" in p.name]


def test_an_adapter_names_its_local_base_by_an_absolute_path(folder, monkeypatch):
    monkeypatch.chdir(folder)
    _, out = train(folder, LORA, "max_steps=1", "model=rm")
    for where in (out, out / "checkpoint-1"):
        base = json.loads((where / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert base == str(folder / "rm")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1)


def test_a_hub_name_of_a_base_stays_as_it_is(folder, tmp_path):
    from peft import LoraConfig

    model = gpt2_rm()
    model.name_or_path = "owner/name"
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear")
    trained = trainer(tmp_path, model, peft_config=lora)
    assert trained.model.peft_config["default"].base_model_name_or_path == "owner/name"


def test_an_adapter_whose_base_is_gone_is_an_error_that_names_the_base(folder):
    _, out = train(folder, LORA, "max_steps=1")
    (folder / "rm").rename(folder / "moved")
    with pytest.raises(SystemExit, match=f"its base model {str(folder / 'rm')!r} is not there"):
        train(folder, f"model={out}", f"output_dir={folder / 'next'}", f"tokenizer={out}")


def test_a_run_ends_with_a_table_of_its_figures(folder, capsys):
    metrics, out = train(folder, "max_steps=3", "hold_out=12", evaluate=False)
    table = capsys.readouterr().out
    rows = dict(
        [cell.strip() for cell in line.strip("│\n").split("│")]
        for line in table.splitlines()
        if line.startswith("│")
    )
    assert rows["train loss"] == f"{metrics['train_loss']:.4f} after 3 steps"
    assert rows["eval loss"] == f"{metrics['eval_loss']:.4f}"
    half = metrics["eval"]["deciles"]["50"]
    assert rows["eval accuracy, half of the answer"].startswith(f"{half['accuracy']:.3f} ±")
    assert rows["train rows"] == "36 used, 0 dropped, 12 held out"
    assert float(rows["seconds"]) > 0
    assert table.endswith(f"wrote {out}\n")


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_even_one_that_is_killed(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is being written by another process"), locked(folder):
            pass
    finally:
        other.kill()
        other.communicate()
    with locked(folder), pytest.raises(ValueError, match="another process"), locked(folder):
        pass
    with locked(folder):
        pass


def test_a_file_is_no_folder_to_hold(tmp_path):
    (tmp_path / "out").write_text("")
    wrong = pytest.raises(ValueError, match="is no directory; name a folder")
    with wrong, locked(tmp_path / "out"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    wrong = pytest.raises(ValueError, match=r"output_dir='.*' cannot be written to \(Not a dir")
    with wrong, locked(tmp_path / "file" / "out"):
        pass
