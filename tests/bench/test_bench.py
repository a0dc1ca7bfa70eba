import copy
import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch

import rgtg_fast
from rgtg_fast import ops
from rgtg_fast.cli import main, microbench


def test_an_op_is_measured_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "deep" / "raw.json"
    main(["bench", "ratio_sample", "--repeat", "3", "--device", "cpu", "--json", str(out)])
    record = json.loads(out.read_text())
    assert {row["implementation"] for row in record["rows"]} == {"cpp", "torch"}
    assert all(row["p10"] <= row["us"] <= row["p90"] for row in record["rows"])
    assert record["versions"]["torch"] == torch.__version__
    assert record["processor"] and record["threads"] == torch.get_num_threads()
    assert "% of copy" in capsys.readouterr().out


def test_no_speed_for_a_wrong_result(monkeypatch, capsys):
    right = ops.ratio_sample

    def wrong(*arguments, backend):
        slot, logq = right(*arguments, backend=backend)
        return (slot + 1, logq) if backend == "cpp" else (slot, logq)

    monkeypatch.setattr(ops, "ratio_sample", wrong)
    with pytest.raises(SystemExit, match="differs from the reference"):
        main(["bench", "ratio_sample", "--repeat", "3", "--device", "cpu"])
    cpp = [line for line in capsys.readouterr().out.splitlines() if " cpp " in line]
    assert cpp and all("no speed" in line for line in cpp)


def test_a_missing_backend_is_an_error(monkeypatch):
    monkeypatch.setattr(microbench, "unavailable_reason", lambda op, backend: f"no {backend} here")
    with pytest.raises(SystemExit, match="cannot run reward_head: no cpp here"):
        main(["bench", "reward_head", "--backend", "cpp", "--device", "cpu"])


def test_every_op_has_cases():
    for op in ops.OPS:
        for case in microbench.cases_of(op, "cpu"):
            assert case.least_bytes > 0
        arguments = next(iter(microbench.cases_of(op, "cpu"))).make()
        want = (case.ours or getattr(ops, op))(*arguments, backend="reference")
        assert microbench.agrees((case.ours or getattr(ops, op))(*arguments), want)


@pytest.fixture
def bench(monkeypatch):
    """The scripts of bench/ as modules, by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


CONTENDERS = (
    *("plain", "static", "auto", "tree", "expand", "reencode", "pruned", "head", "adapter"),
    *("k-fold cache", "rad", "re-encode one by one", "rounds", "rounds of 4"),
)


@pytest.mark.parametrize("shape", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_every_contender_gives_the_guided_tokens_and_a_row(bench, shape, tmp_path, capsys):
    script, contenders = bench("bench_generate"), bench("generate_contenders")
    assert set(contenders.LABELS) == set(CONTENDERS)
    script.main(["--quick", "--shape", shape, "--json", str(tmp_path / "raw.json")])
    printed = capsys.readouterr().out
    (cell,) = json.loads((tmp_path / "raw.json").read_text())["cells"]
    rows = {row["name"]: row for row in cell["rows"]}
    for name in CONTENDERS:
        reason = contenders.why_not(name, "cpu")
        assert (name in rows) == (reason is None)
        assert reason is None or f"{contenders.LABELS[name]}: skipped, {reason}" in printed
    assert ("pruned" in rows) == ("pruned" in cell["candidates_scored"])
    for row in rows.values():
        assert row["decode_ms"] > 0
        assert row["tokens_per_s"] == pytest.approx(1000 / row["ms_per_token"])
        assert row["over_plain"] == row["ms_per_token"] / rows["plain"]["ms_per_token"]
        assert row["over_guided"] == row["ms_per_token"] / rows["auto"]["ms_per_token"]
        assert row["over_floor"] == row["decode_ms"] / row["floor_ms"]
        assert row["peak_mb"] > row["growth_mb"] >= 0


def test_drawn_tokens_are_checked_too_and_few_candidates_scored(bench, tmp_path, capsys):
    out = tmp_path / "raw.json"
    wanted = ["--contenders", "plain", "auto", "head", "rad", "--new", "12", "--json", str(out)]
    bench("bench_generate").main(["--quick", "--top-p", "0.9", "--entropy", "0.5", *wanted])
    (cell,) = json.loads(out.read_text())["cells"]
    assert [row["name"] for row in cell["rows"]] == ["plain", "auto", "head"]
    assert 1 <= cell["candidates_scored"]["auto"] < 4
    assert "RAD): skipped, it is run greedily" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_output_layer_is_scaled_to_an_entropy(bench, shape):
    models = bench("generate_models")
    lm, _ = models.build_models(shape, 100, torch.float32, small=64)
    inputs = lm.get_input_embeddings().weight.clone()
    models.sharpen(lm, 4, 0.3)
    ids = torch.randint(0, 64, (1, 64), generator=torch.Generator().manual_seed(3))
    p = lm(ids).logits.topk(4).values.softmax(-1)
    assert torch.special.entr(p).sum(-1).mean().item() == pytest.approx(0.3, abs=1e-3)
    assert torch.equal(lm.get_input_embeddings().weight, inputs)


def test_a_contender_with_other_tokens_gets_no_time_and_the_others_do(
    bench, monkeypatch, tmp_path, capsys
):
    script, published = bench("bench_generate"), bench("published")
    right = published.RewardAugmentedProcessor.__init__
    monkeypatch.setattr(
        published.RewardAugmentedProcessor,
        "__init__",
        lambda self, rm, k, beta: right(self, rm, k, -beta),
    )
    out = tmp_path / "raw.json"
    wanted = ["--contenders", "rad", "plain", "auto", "--new", "12"]
    with pytest.raises(SystemExit, match="rad disagrees with guided decoding in row 0"):
        script.main(["--quick", *wanted, "--json", str(out)])
    (cell,) = json.loads(out.read_text())["cells"]
    assert [row["name"] for row in cell["rows"]] == ["plain", "auto"]
    assert list(cell["failed"]) == ["rad"]
    assert "LogitsProcessor (RAD)        no time, it failed: rad disag" in capsys.readouterr().out


def test_a_contender_that_cannot_run_leaves_the_others_their_times(bench, monkeypatch, tmp_path):
    script, contenders = bench("bench_generate"), bench("generate_contenders")
    right, out = contenders.Bench.plain, tmp_path / "raw.json"

    def plain(self, new, **options):
        if "logits_processor" in options:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, new, **options)

    monkeypatch.setattr(contenders.Bench, "plain", plain)
    with pytest.raises(SystemExit, match="no time for some contenders: CUDA out of memory"):
        script.main(["--quick", "--contenders", "rad", "plain", "--json", str(out)])
    (cell,) = json.loads(out.read_text())["cells"]
    assert [row["name"] for row in cell["rows"]] == ["plain"]


def test_a_benchmark_needs_no_git(bench, monkeypatch):
    script = bench("bench_generate")

    def run(*command, **options):
        raise FileNotFoundError(2, "No such file or directory: 'git'")

    monkeypatch.setattr(microbench.subprocess, "run", run)
    found = script.environment("cpu")
    assert found["commit"] is None and found["gpu"] is None and found["cpu"]
    assert microbench.circumstances()["commit"] is None


def test_no_plot_without_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(microbench, "find_spec", lambda name: None)
    out = tmp_path / "raw.json"
    asked = ["--repeat", "2", "--cases", "1", "--device", "cpu"]
    main(["bench", "ratio_keep", *asked, "--json", str(out)])
    assert len({row["case"] for row in json.loads(out.read_text())["rows"]}) == 1
    assert not out.with_suffix(".png").exists()


def test_a_reward_on_the_base_is_held_to_its_own_separate_model(bench, monkeypatch, capsys):
    script, models = bench("bench_generate"), bench("generate_models")

    def head(lm, weight):
        return models.classifier_on(lm.base_model, lm, sign * weight[None])

    monkeypatch.setattr(rgtg_fast, "RewardHead", head, raising=False)
    sign = 1
    script.main(["--quick", "--contenders", "head", "--new", "12"])
    assert "guided, head on base" in capsys.readouterr().out
    sign = -1
    with pytest.raises(SystemExit, match="head disagrees with guided decoding"):
        script.main(["--quick", "--contenders", "head", "--new", "12"])


def test_the_adapter_checkpoint_is_that_of_the_separate_model(bench, tmp_path):
    peft = pytest.importorskip("peft")
    models = bench("generate_models")
    lm, _ = models.build_models("llama", 32, torch.float32, small=64)
    separate = models.peft_reward_model(lm, tmp_path)
    head = torch.zeros(1, 64)
    loaded = peft.PeftModel.from_pretrained(
        models.classifier_on(copy.deepcopy(lm.base_model), lm, head), tmp_path
    )
    plain = models.classifier_on(lm.base_model, lm, models.reward_head_of(lm))
    ids = torch.arange(6)[None]
    rewards = [m(input_ids=ids).logits for m in (separate, loaded.eval(), plain)]
    assert torch.equal(rewards[0], rewards[1])
    assert (rewards[0] - rewards[2]).abs() > 1e-3  # the low-rank part is not zero
    assert not any("lora" in name for name, _ in lm.named_parameters())


def test_rad_leaves_only_the_candidates(bench):
    published, models = bench("published"), bench("generate_models")
    _, rm = models.build_models("gpt2", 32, torch.float32, small=64)
    ids = torch.randint(0, 64, (2, 5))
    logits = torch.randn(2, 64)
    out = published.RewardAugmentedProcessor(rm, 3, 2.0)(ids, logits)
    best = logits.topk(3).indices
    assert out.isfinite().sum(-1).tolist() == [3, 3]
    for row in range(2):
        for token in best[row]:
            text = torch.cat([ids[row], token[None]])[None]
            reward = rm.score(rm.base_model(input_ids=text).last_hidden_state[0, -1])
            wanted = logits[row, token] + 2.0 * reward[0]
            torch.testing.assert_close(out[row, token], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("shape", "tied"), [("gpt2", True), ("llama", True), ("llama-8b", False)])
def test_the_floor_counts_what_a_step_reads(bench, shape, tied):
    floors, models = bench("floors"), bench("generate_models")
    config = models.model_config(shape, 1)
    with torch.device("meta"):
        lm, rm = (c(config).bfloat16() for c in models.CLASSES[shape])
    vocab, hidden = config.vocab_size, config.hidden_size
    unread = config.n_positions * hidden if shape == "gpt2" else 0
    assert floors.weight_bytes(lm) == 2 * (
        lm.num_parameters() - unread - (0 if tied else vocab * hidden)
    )
    assert floors.weight_bytes(rm) == 2 * (rm.num_parameters() - unread - vocab * hidden)
    assert floors.weight_bytes(lm, rm) == floors.weight_bytes(lm) + floors.weight_bytes(rm)
    assert floors.floor_ms(4e9, 20.0) == 200.0


def test_the_8b_shape_has_eight_billion_weights(bench):
    models = bench("generate_models")
    with torch.device("meta"):
        lm = models.CLASSES["llama-8b"][0](models.model_config("llama-8b", 1))
    assert lm.num_parameters() == 8_030_261_248


def test_decode_cost_leaves_the_first_token_out(bench):
    script, contenders = bench("bench_generate"), bench("generate_contenders")
    models = contenders.Models(
        *bench("generate_models").build_models("gpt2", 1, torch.float32, small=64)
    )
    rate = {"copy_gb_s": 10.0, "read_gb_s": 20.0}
    memory = {"plain": {"growth_mb": 1.0, "peak_mb": 2.0}}
    runs = {"plain": [{"call": 2.0 + extra, "first": 1.1} for extra in (0.0, 5.0, 0.0)]}
    (row,) = script.rows_of(models, runs, memory, [rate], 4, 10)
    assert row["ms_per_token"] == pytest.approx(200)
    assert row["tokens_per_s"] == pytest.approx(20)
    assert row["decode_ms"] == pytest.approx(100)
    assert row["floor_ms"] == pytest.approx(row["step_bytes"] / 1e10 * 1e3)


def test_what_would_take_too_long_is_left_out_and_said(bench, tmp_path, capsys):
    out = tmp_path / "raw.json"
    bench("bench_generate").main(
        ["--quick", "--budget", "0", "--contenders", "plain", "rad", "--json", str(out)]
    )
    (cell,) = json.loads(out.read_text())["cells"]
    assert [row["name"] for row in cell["rows"]] == ["plain"]
    assert "(--budget 0)" in cell["skipped"]["rad"]
    assert "LogitsProcessor (RAD)        skipped: one run" in capsys.readouterr().out


def test_a_grid_is_the_product_and_the_cost_grid_two_lines(bench):
    script = bench("bench_generate")
    assert script.grid(script.parse_args([])) == [(1, 10, 128)]
    asked = ["--batch", "1", "4", "--k", "5", "10", "--prompt", "64", "256"]
    assert len(script.grid(script.parse_args(asked))) == 8
    cost = script.grid(script.parse_args(["--grid", "cost"]))
    assert [p for _, k, p in cost if k == 10] == [64, 128, 256, 512, 1024]
    assert sorted(k for _, k, p in cost if p == 256) == [5, 10, 20, 40]


def test_the_plot_takes_one_curve_per_contender_and_axis(bench, tmp_path, capsys):
    raw, image = tmp_path / "raw.json", tmp_path / "deep" / "cost.png"
    bench("bench_generate").main(
        ["--quick", "--grid", "cost", "--contenders", "plain", "auto", "--json", str(raw)]
    )
    drawn = bench("plot_generate")
    cells = json.loads(raw.read_text())["cells"]
    found, fixed = drawn.curves(cells, "prompt")
    assert fixed == {"batch": 1, "k": 4}
    assert [x for x, _ in found["auto"]] == [8, 16]
    found, fixed = drawn.curves(cells, "k")
    assert fixed == {"batch": 1, "prompt": 8}
    assert [x for x, _ in found["plain"]] == [2, 4]
    drawn.plot(cells, image)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_memory_mode_counts_the_reward_models_cache(bench, tmp_path, capsys):
    out = tmp_path / "raw.json"
    methods = ["tree", "expand", "k-fold cache"]
    options = ["--k", "2", "8", "--prompt", "40", "--json", str(out), "--contenders", *methods]
    bench("bench_generate").main(["--quick", "--memory", *options])
    rows = {(r["method"], r["k"]): r for r in json.loads(out.read_text())["memory"]}
    slot = 2 * 2 * 64 * 4 / 2**20  # keys and values of a token in 2 layers 64 wide, fp32
    assert 46 * slot <= rows["tree", 2]["mb"] <= 64 * slot
    assert rows["tree", 8]["mb"] - rows["tree", 2]["mb"] <= 8 * slot
    assert rows["k-fold cache", 8]["mb"] == pytest.approx(8 * 46 * slot)
    assert rows["expand", 8]["ratio"] == rows["k-fold cache", 8]["ratio"] == 4


def test_time_in_nested_forwards_is_counted_once(bench, monkeypatch):
    probes, clock = bench("generate_probes"), itertools.count()
    monkeypatch.setattr(probes, "now", lambda device: next(clock))  # a second passes at each look
    inner = torch.nn.Linear(2, 2)
    outer = torch.nn.Sequential(inner)
    with probes.ForwardTime(outer, inner) as inside:
        outer(torch.zeros(1, 2))
    # Both look when they begin and the outer when it ends; counted twice it were three seconds.
    assert inside.seconds == 2 and next(clock) == 3
    assert "forward" not in vars(outer)


def test_overhead_is_the_step_without_the_forwards(bench, tmp_path, capsys):
    out = tmp_path / "raw.json"
    bench("bench_generate").main(["--overhead", "--quick", "--prompt", "8", "--json", str(out)])
    rows = json.loads(out.read_text())["overhead"]
    assert [row["name"] for row in rows] == ["plain", "guided"]
    for row in rows:
        runs = row["seconds_total_and_inside"]
        assert list(runs) == ["1", "6"]
        assert all(0 < inside < total for values in runs.values() for total, inside in values)
        own = {n: sorted(total - inside for total, inside in runs[n]) for n in runs}
        least = 1000 * (own["6"][0] - own["1"][0]) / 5
        median = 1000 * (sum(own["6"]) - sum(own["1"])) / 2 / 5  # of the two rounds of --quick
        assert row["overhead_least_ms"] == pytest.approx(least)
        assert row["overhead_ms"] == pytest.approx(median)


def test_models_of_8b_are_not_made_on_a_cpu(bench, capsys):
    with pytest.raises(SystemExit):
        bench("bench_generate").parse_args(["--shape", "llama-8b"])
    assert "pass --device cuda" in capsys.readouterr().err
