"""`python -m rgtg_fast demo`: guide the embedded LM with each reward model and compare.

Base, ARGS (guided by the reward model trained on full replies only), PARGS (by the one trained on
every prefix) and GenARM-prefix (by an autoregressive one, trained on every prefix too) answer the
same held-out prompts, sampled and greedy (-G). The rewards have different scales, so each method
takes the β that was best for it on a separate set of prompts.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

import rgtg_fast
from rgtg_fast import presets
from rgtg_fast.demo import task
from rgtg_fast.demo.speed import measure_speed

ASSETS = Path(__file__).parent / "assets"
BETAS = {
    "rm_full": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    "rm_partial": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    "rm_genarm_prefix": (0.125, 0.25, 0.5, 1.0, 2.0, 4.0),  # of log-probabilities
}
K, MAX_NEW_TOKENS, BATCH = 10, 72, 64
TUNING_PROMPTS, SPEED_PROMPTS, TEXTS_SHOWN = 100, 3, 3


@dataclass(frozen=True)
class Method:
    """A way to decode: the reward model's folder in the assets (None: unguided), and whether to
    sample or take the best candidate."""

    reward_model: str | None
    do_sample: bool


METHODS = {
    "base": Method(None, True),
    "ARGS": Method("rm_full", True),
    "PARGS": Method("rm_partial", True),
    "GenARM-prefix": Method("rm_genarm_prefix", True),
    "base-G": Method(None, False),
    "ARGS-G": Method("rm_full", False),
    "PARGS-G": Method("rm_partial", False),
    "GenARM-prefix-G": Method("rm_genarm_prefix", False),
}
COMPARED = (
    ("PARGS", "base"),
    ("PARGS", "ARGS"),
    ("GenARM-prefix", "PARGS"),
    ("PARGS-G", "base-G"),
    ("PARGS-G", "ARGS-G"),
    ("GenARM-prefix-G", "PARGS-G"),
)


@dataclass(frozen=True)
class Assets:
    """The embedded models, ready for CPU inference in fp32, and the held-out prompts by split."""

    lm: Any  # a PreTrainedModel; its `generate` is a mixin that type checkers do not see
    reward_models: dict[str, PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    prompts: dict[str, list[str]]


def load_assets() -> Assets:
    """Load the shipped files, which `bench/quality/make_assets.py` wrote."""
    rows = [json.loads(line) for line in (ASSETS / "prompts.jsonl").read_text().splitlines()]
    prompts: dict[str, list[str]] = {}
    for row in rows:
        prompts.setdefault(row["split"], []).append(row["prompt"])
    classifier, causal = AutoModelForSequenceClassification, AutoModelForCausalLM
    kinds = {"rm_full": classifier, "rm_partial": classifier, "rm_genarm_prefix": causal}
    return Assets(
        lm=causal.from_pretrained(ASSETS / "lm", dtype=torch.float32).eval(),
        reward_models={
            name: kind.from_pretrained(ASSETS / name, dtype=torch.float32).eval()
            for name, kind in kinds.items()
        },
        tokenizer=AutoTokenizer.from_pretrained(ASSETS / "lm"),
        prompts=prompts,
    )


@dataclass(frozen=True)
class Answers:
    """Answers to B prompts: texts, their gold rewards [B], KL from the base policy in nats [B],
    and the new tokens generated in `seconds`."""

    texts: list[str]
    gold: torch.Tensor
    kl: torch.Tensor
    tokens: int
    seconds: float


def answer(assets: Assets, prompts: list[str], method: Method, beta: float, seed: int) -> Answers:
    """One answer per prompt: guided ones through a batch of `BATCH` that is kept full, others all
    in one batch."""
    tokenizer = assets.tokenizer
    settings: dict[str, Any] = {
        "do_sample": method.do_sample,
        "max_new_tokens": MAX_NEW_TOKENS,
        **({"top_k": 0} if method.do_sample else {}),
    }
    started = time.perf_counter()
    if method.reward_model is None:
        torch.manual_seed(seed)
        ids, kl = _unguided(assets, prompts, settings)
    else:
        many = rgtg_fast.generate_many(
            assets.lm,
            prompts,
            tokenizer=tokenizer,
            batch_size=BATCH,
            seed=seed,
            **{**guide_of(assets, method, beta), **settings},
        )
        got = sorted(many, key=lambda one: one.index)
        ids, kl = [one.tokens for one in got], [math.fsum(one.kl) for one in got]
    seconds = time.perf_counter() - started
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    finished = [tokenizer.eos_token_id in row for row in ids]
    gold = [task.gold_reward(*row) for row in zip(prompts, texts, finished, strict=True)]
    return Answers(texts, torch.tensor(gold), torch.tensor(kl), sum(map(len, ids)), seconds)


def guide_of(assets: Assets, method: Method, beta: float) -> dict[str, Any]:
    """What tells `rgtg_fast.generate` how to guide: by the rewards of the k most likely tokens, or
    by those of all, which an autoregressive reward model gives in one forward."""
    assert method.reward_model is not None
    model = assets.reward_models[method.reward_model]
    if method.reward_model == "rm_genarm_prefix":
        return presets.genarm(model, beta)
    return {"reward_model": model, "k": K, "beta": beta}


def _unguided(
    assets: Assets, prompts: list[str], settings: dict[str, Any]
) -> tuple[list[list[int]], list[float]]:
    """Tokens of the answers, EOS included, and their KL."""
    inputs = assets.tokenizer(prompts, return_tensors="pt", padding=True)
    options = {**inputs, **settings, "return_dict_in_generate": True}
    out = assets.lm.generate(**options, output_logits=not settings["do_sample"])
    ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    live = ids != assets.tokenizer.pad_token_id
    kl = torch.zeros(len(prompts))
    if not settings["do_sample"]:  # all of the policy is on the token taken
        logp = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        kl = -logp.where(live, 0.0).sum(1)
    return [row[own].tolist() for row, own in zip(ids, live, strict=True)], kl.tolist()


def mean_se(values: torch.Tensor) -> tuple[float, float]:
    """Mean of `values` [N] and its standard error (0 where N is 1)."""
    spread = values.std().item() if len(values) > 1 else 0.0
    return values.mean().item(), spread / math.sqrt(len(values))


def distinct_2(texts: list[str]) -> float:
    """Share of different word pairs among all word pairs of `texts`."""
    pairs: list[tuple[str, str]] = []
    for text in texts:
        pairs += itertools.pairwise(text.split())
    return len(set(pairs)) / max(1, len(pairs))


def _guide(assets: Assets, count: int, seed: int, console: Console) -> tuple[dict, dict]:
    """Curves over β on the `beta` prompts, and answers to the `test` prompts at each best β."""
    test = assets.prompts["test"][:count]
    tuning = assets.prompts["beta"][: min(count, TUNING_PROMPTS)]
    grids = {n: BETAS[m.reward_model] for n, m in METHODS.items() if m.reward_model is not None}
    curves: dict[str, list[dict]] = {name: [] for name in grids}
    answers = {}
    columns = (TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=sum(map(len, grids.values())) + len(METHODS))
        for name, grid in grids.items():
            for beta in grid:
                progress.update(bar, description=f"choosing β: {name}, β = {beta:g}")
                mean, se = mean_se(answer(assets, tuning, METHODS[name], beta, seed).gold)
                curves[name].append({"beta": beta, "gold": mean, "se": se})
                progress.advance(bar)
        for name, method in METHODS.items():
            progress.update(bar, description=f"{len(test)} held-out prompts: {name}")
            beta = max(curves[name], key=_gold)["beta"] if name in grids else 0.0
            answers[name] = (beta, answer(assets, test, method, beta, seed + 1))
            progress.advance(bar)
    return curves, answers


def _gold(point: dict[str, float]) -> float:
    return point["gold"]


def _summary(answers: dict[str, tuple[float, Answers]]) -> dict[str, dict[str, float]]:
    rows = {}
    for name, (beta, got) in answers.items():
        mean, se = mean_se(got.gold)
        rows[name] = {
            "beta": beta,
            "gold": mean,
            "se": se,
            "kl": got.kl.mean().item(),
            "distinct_2": distinct_2(got.texts),
            "tokens_per_second": got.tokens / got.seconds,
        }
    return rows


def _paired(answers: dict[str, tuple[float, Answers]]) -> dict[str, dict[str, float]]:
    """Mean gold differences on the same prompts, with their standard errors."""
    differences = {}
    for one, other in COMPARED:
        mean, se = mean_se(answers[one][1].gold - answers[other][1].gold)
        differences[f"{one} - {other}"] = {"mean": mean, "se": se}
    return differences


def inspected(
    assets: Assets, prompts: list[str], betas: dict[str, float], seed: int
) -> rgtg_fast.inspection.Inspection:
    """Sampled answers side by side, each token with its candidates; the base is seen through the
    partial-sequence model's rewards."""
    shown = ("base", "ARGS", "PARGS")
    outputs: dict[str, list[Any]] = {name: [] for name in shown}
    for prompt, name in itertools.product(prompts, shown):
        output = rgtg_fast.generate(
            assets.lm,
            **assets.tokenizer(prompt, return_tensors="pt"),
            reward_model=assets.reward_models[METHODS[name].reward_model or "rm_partial"],
            k=K,
            beta=betas[name],
            do_sample=True,
            top_k=0,
            seed=seed,
            max_new_tokens=MAX_NEW_TOKENS,
            return_dict_in_generate=True,
            output_candidates=True,
        )
        outputs[name].append(output)
    return rgtg_fast.inspect(outputs, assets.tokenizer, beta=betas)


def _show_texts(console: Console, prompts: list[str], answers: dict) -> None:
    for i, prompt in enumerate(prompts[:TEXTS_SHOWN]):
        case = task.read_case(prompt)
        said = task.pretty(prompt.removesuffix(" agent :"))
        console.print(f"\n[bold]{said}[/]  [dim](right fix: {case.fix})[/]", soft_wrap=True)
        for name in (n for n in METHODS if n != "base-G"):
            got = answers[name][1]
            line = f"  [cyan]{name:15}[/] {got.gold[i]:+.2f}  {task.pretty(got.texts[i])}"
            console.print(line, highlight=False, soft_wrap=True)


def _show_summary(console: Console, rows: dict, paired: dict, count: int) -> None:
    table = Table(title=f"{count} held-out prompts, k={K}, each method at its own best β")
    for heading in ("method", "β", "gold reward", "KL (nats)", "distinct-2", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['beta']:g}" if row["beta"] else "-",
            f"{row['gold']:+.2f} ± {row['se']:.2f}",
            f"{row['kl']:.2f}" if row["kl"] else "-",
            f"{row['distinct_2']:.3f}",
            f"{row['tokens_per_second']:.0f}",
        )
    console.print()
    console.print(table)
    for name, row in paired.items():
        in_se = f"{row['mean'] / row['se']:.1f} standard errors" if row["se"] else "no spread"
        console.print(f"{name}: {row['mean']:+.2f} paired, {in_se}", highlight=False)


def _show_speed(
    console: Console, speed: dict[str, float], rows: dict[str, dict], count: int
) -> None:
    published, many = speed["published"], f"rgtg_fast, {min(BATCH, count)} prompts at a time"
    lines = {
        "published way, one prompt (k full re-encodes per token)": published,
        "rgtg_fast, one prompt": speed["guided"],
        many: rows["PARGS"]["tokens_per_second"],
        f"{many}, GenARM-prefix": rows["GenARM-prefix"]["tokens_per_second"],
        "for scale: plain generation without rewards, one prompt": speed["plain"],
    }
    console.print("\n[bold]Speed, measured just now[/]")
    for what, rate in lines.items():
        figures = f"{rate:7.0f} tokens/s {rate / published:7.1f}x"
        console.print(f"  {what:56}{figures}", highlight=False, soft_wrap=True)


COLOURS = {"rm_full": "C1", "rm_partial": "C0", "rm_genarm_prefix": "C3"}


def plot(curves: dict, rows: dict, path: Path) -> None:
    """Write gold reward against β for each reward model, ±2 SE bands, as a PNG to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.4, 4), layout="constrained")
    for name, points in curves.items():
        betas = [p["beta"] for p in points]
        gold = torch.tensor([p["gold"] for p in points])
        band = 2 * torch.tensor([p["se"] for p in points])
        model = METHODS[name].reward_model or ""
        color, style = COLOURS[model], "-" if METHODS[name].do_sample else ":"
        axes.plot(betas, gold, style, marker="o", color=color, label=f"{name} ({model})")
        axes.fill_between(betas, gold - band, gold + band, alpha=0.15, color=color)
    axes.axhline(rows["base"]["gold"], color="gray", linestyle="--", label="base LM")
    axes.set_xscale("log", base=2)
    ticks = sorted({beta for grid in BETAS.values() for beta in grid})
    axes.set_xticks(ticks, [f"{b:g}" for b in ticks])
    axes.set_xlabel("β, the weight of the reward")
    axes.set_ylabel("mean gold reward (± 2 SE)")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def run_demo(
    prompts: int = 200, out: Path = Path("demo_output"), seed: int = 0, draw: bool = True
) -> dict:
    """Run the demo on the first `prompts` held-out prompts (at most 200).

    Prints texts, the table and the speed; writes `results.json`, `texts.jsonl`, `texts.html` (some
    texts token by token) and, with `draw`, `gold_over_beta.png` to `out`. Returns what results.json
    holds.
    """
    if not 1 <= prompts <= task.SPLIT_SIZES["test"]:
        most = task.SPLIT_SIZES["test"]
        raise ValueError(f"prompts={prompts} asked for, but there are 1 to {most} to choose from")
    started = time.perf_counter()
    disable_progress_bar()  # transformers' bars for weight loading would break up the demo's own
    console = Console()
    assets = load_assets()
    test = assets.prompts["test"][:prompts]
    curves, answers = _guide(assets, prompts, seed, console)
    rows, paired = _summary(answers), _paired(answers)
    _show_texts(console, test, answers)
    _show_summary(console, rows, paired, prompts)
    few = [assets.tokenizer(p, return_tensors="pt")["input_ids"] for p in test[:SPEED_PROMPTS]]
    speed = measure_speed(
        assets.lm,
        assets.reward_models["rm_partial"],
        few,
        k=K,
        beta=answers["PARGS"][0],
        max_new_tokens=MAX_NEW_TOKENS,
    )
    _show_speed(console, speed, rows, prompts)

    out.mkdir(parents=True, exist_ok=True)
    results = {
        "prompts": prompts,
        "seed": seed,
        "k": K,
        "methods": rows,
        "paired": paired,
        "gold_over_beta": curves,
        "tokens_per_second_one_prompt": speed,
        "seconds": round(time.perf_counter() - started, 1),
    }
    page = inspected(
        assets, test[:TEXTS_SHOWN], {n: beta for n, (beta, _) in answers.items()}, seed
    )
    page.to_html(out / "texts.html")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    with (out / "texts.jsonl").open("w") as file:
        for i, prompt in enumerate(test):
            texts = {name: got.texts[i] for name, (_, got) in answers.items()}
            file.write(json.dumps({"prompt": prompt, **texts}) + "\n")
    if draw:
        plot(curves, rows, out / "gold_over_beta.png")
    console.print(f"\nWrote {out}/ in {time.perf_counter() - started:.0f} s.", highlight=False)
    return results
