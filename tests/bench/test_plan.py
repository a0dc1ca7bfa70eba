"""`rgtg-fast plan`: its formulas against what was measured, and against models that are there."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import save_file

from rgtg_fast.cli import costs, main

RESULTS = Path(__file__).parents[2] / "bench/results"
MEASURED = ["generate_llama_fp32.json", "generate_llama_bf16.json", "generate_gpt2_fp32.json"]


def meta(cls, config, dtype):
    config = copy.deepcopy(config)
    config.pad_token_id = None
    with torch.device("meta"):
        return cls._from_config(config, dtype=dtype)


@pytest.mark.parametrize("file", MEASURED)
def test_the_bytes_of_a_step_are_those_that_were_measured_with(file, monkeypatch):
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    models = importlib.import_module("generate_models")
    record = json.loads((RESULTS / file).read_text())
    shape, dtype = record["options"]["shape"], getattr(torch, record["options"]["dtype"])
    config = models.model_config(shape, 2048)
    config.num_labels = 1
    wide = dtype.itemsize // 2
    lm, rm = (
        costs.sized(meta(cls, config, torch.bfloat16)).wider(wide) for cls in models.CLASSES[shape]
    )
    for cell in record["cells"]:
        rows = {row["name"]: row for row in cell["rows"]}
        device = costs.Device(1e12, cell["bandwidth"]["copy_gb_s"] * 1e9 / costs.REACHED, 1e18)
        for name, size in (("plain", lm.step_bytes), ("auto", lm.step_bytes + rm.step_bytes)):
            assert rows[name]["step_bytes"] == size
            assert rows[name]["floor_ms"] == pytest.approx(
                1e3 * size / (costs.REACHED * device.bandwidth), rel=1e-6
            )
        # On two CPU cores a step took 2.5 to 7 times what its bytes alone would.
        pair, context = costs.Pair(lm, rm, 10), cell["prompt"] + cell["new"] // 2
        for name, step in (("plain", pair.plain_seconds), ("auto", pair.guided_seconds)):
            assert 1.0 < rows[name]["decode_ms"] / (1e3 * step(1, context, device)) < 8.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "deepseek_v3", "falcon_rope"])
def test_a_model_without_weights_has_the_size_of_one_with_them(family):
    model = zoo.lm(family)
    empty = costs.sized(meta(type(model), model.config, torch.bfloat16)).wider(2)
    assert empty == costs.sized(model)
    assert empty.nbytes == sum(p.nbytes for p in model.parameters())


def test_keys_and_values_of_rows_are_those_of_the_caches():
    size = costs.sized(zoo.lm("llama"))
    ids = torch.zeros((3, 20), dtype=torch.int64)
    cache = zoo.lm("llama")(ids, use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert costs.Pair(size, size, 4).row_bytes(20) * 3 == 2 * held + 3 * 4 * size.kv_bytes
    assert costs.Pair(size, None, 4).row_bytes(20) == 24 * size.kv_bytes
    assert costs.Pair(size, None, 4, caches=2).row_bytes(20) == 48 * size.kv_bytes


def sized(weights=1000, kv=10, layers=0, activations=0):
    return costs.Sized(weights, weights // 2, weights, kv, layers, activations)


def test_rows_fit_as_long_as_their_bytes_do():
    pair, device = costs.Pair(sized(), sized(), 4), costs.Device(costs.RESERVED + 10_000, 1.0, 1.0)
    # 2000 of weights; a row of 50 tokens has 500 + 500 + 40
    assert pair.rows_that_fit(50, device) == 7
    assert pair.rows_that_fit(50, device._replace(memory=costs.RESERVED + 1999)) == 0
    prompts = costs.Pair(sized(activations=20), sized(), 4)
    assert prompts.rows_that_fit(50, device) == 3


def test_a_step_takes_what_it_reads_or_what_it_computes():
    reads = costs.Device(0, 1 / costs.REACHED, 1e30)
    pair = costs.Pair(sized(), sized(weights=3000), 4)
    assert pair.plain_seconds(2, 5, reads) == pytest.approx(1000 + 100)
    assert pair.guided_seconds(2, 5, reads) == pytest.approx(1100 + 3100)
    computes = costs.Device(0, 1e30, 1 / costs.REACHED_FLOPS)
    assert pair.guided_seconds(2, 5, computes) == pytest.approx(2 * 1000 + 2 * 4 * 3000)
    adapter = costs.Pair(sized(), None, 4, extra=7, caches=2)
    assert adapter.guided_seconds(2, 5, reads) == pytest.approx(1000 + 200 + 7)
    assert adapter.guided_seconds(2, 5, computes) == pytest.approx(2 * 8 * 1000)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    zoo.lm("llama").config.save_pretrained(root / "lm")
    for name, kind in (("lm", "LlamaForCausalLM"), ("rm", "LlamaForSequenceClassification")):
        config = zoo.lm("llama").config.to_dict() | {"architectures": [kind]}
        (root / name).mkdir(exist_ok=True)
        (root / name / "config.json").write_text(json.dumps(config))
    (root / "head").mkdir()
    save_file({"weight": torch.zeros(5, 3)}, root / "head" / "reward_head.safetensors")
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(7)}, root / "adapter" / "adapter_model.safetensors")
    return root


@pytest.mark.parametrize(
    ("reward", "kind", "extra"),
    [
        ("rm", "classifier", None),
        ("lm", "autoregressive", None),
        ("head", "head", 30),
        ("adapter", "adapter", 14),
    ],
)
def test_what_a_reward_is_is_seen_in_its_files(folders, reward, kind, extra, tmp_path, capsys):
    given = ["--model", str(folders / "lm"), "--reward-model", str(folders / reward)]
    main(["plan", *given, "--json", str(tmp_path / "out.json"), "--batch", "2", "--context", "64"])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["reward"] == kind
    size = costs.sized(zoo.lm("llama"))
    assert report["lm_bytes"] == size.nbytes // 2  # in bf16
    if extra is not None:
        assert report["reward_bytes"] == extra
    (row,) = report["batches"]
    assert row["fits"] and row["guided_ms"] > row["plain_ms"] > 0
    assert row["kv_bytes"] == 2 * report["row_bytes"]
    said = capsys.readouterr().out
    assert f"({kind})" in said and "no run on" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "missing"], "--model 'missing' has no configuration"),
        (["--model", "{lm}", "--reward-model", "none"], "--reward-model 'none' has no config"),
        (["--model", "{lm}", "--reward-model", "{lm}", "--reward-kind", "head"], "has no reward_h"),
    ],
)
def test_what_is_missing_is_said_in_a_line(folders, given, message):
    given = [part.format(lm=folders / "lm") for part in given]
    with pytest.raises(SystemExit) as stop:
        main(["plan", *given])
    assert str(stop.value).startswith("plan: ") and message in str(stop.value)
    assert "\n" not in str(stop.value)
