"""Train the models that `python -m rgtg_fast demo` runs on, from nothing but the task's grammar.

    python bench/quality/make_assets.py            # about 12 minutes of one core

Writes a tokenizer, a causal LM, three reward models and the held-out prompts into
`rgtg_fast/demo/assets`, and `metrics.json` with what was measured on the way. The reward models
start from the LM and are trained by `rgtg_fast.training` on the same preference pairs in the same
order with the same optimiser for the same number of steps. The first two have the same architecture
and differ in one option, the positions at which the Bradley-Terry loss is taken:

- `rm_full`     loss_type="full": -log σ(r(x, y_w) - r(x, y_l)), at the last token of the replies;
- `rm_partial`  loss_type="prefix": the mean over prefix lengths i of
  -log σ(r(x, y_w[1:i]) - r(x, y_l[1:i])), where the shorter reply keeps the reward of its EOS
  (arXiv 2406.07780);
- `rm_genarm_prefix`  at the same positions, but the reward is β Σ log π_r over the tokens, of a
  causal LM (stored as fp16).

The two replies of a pair come from the grammar, as the LM's corpus does, and are labelled by a
Bradley-Terry draw from their gold rewards, so the labels are as noisy as people's. Same seed,
machine, thread count and versions: same files. Elsewhere `--out folder` writes beside the shipped
files and says which metrics are outside the shipped 95 % intervals.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import small_models
import torch
from transformers.utils.logging import disable_progress_bar

from rgtg_fast.demo import task
from rgtg_fast.training.metrics import prefix_report

ASSETS = Path(__file__).resolve().parents[2] / "rgtg_fast" / "demo" / "assets"
MAX_NEW = 72  # tokens; the longest reply of the grammar has 69 and EOS
SIZES = {"corpus": 24_000, "pairs": 20_000, "eval_prompts": 1000}
REWARD_MODELS = {"rm_full": "full", "rm_partial": "prefix", "rm_genarm_prefix": "genarm_prefix"}


def words_of_the_task() -> list[str]:
    """Texts that hold every word of the grammar."""
    sentences = [s for group in task.SENTENCES.values() for s in group]
    return [task.words(text) for text in [*task.all_prompts(), *sentences]]


def pairs_for(tokenizer: Any, prompts: list[str], rng: random.Random, noisy: bool) -> list[dict]:
    """At most one pair for each of `prompts`."""
    make = small_models.make_pairs
    return list(make(tokenizer, prompts, task.sample_reply, task.gold_reward, rng, noisy=noisy))


@torch.no_grad()
def measure_lm(lm: Any, tokenizer: Any, prompts: list[str], rng: random.Random) -> dict[str, float]:
    """Loss on fresh grammar replies (nats per token, mean over texts) and the gold rewards of the
    LM's own replies at temperature 1, with the half-widths of their 95 % intervals."""
    losses = []
    for prompt in prompts:
        start = tokenizer(prompt)["input_ids"]
        reply = [*tokenizer(task.sample_reply(prompt, rng))["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(start) + reply])
        losses.append(lm(torch.tensor([start + reply]), labels=labels).loss.item())
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = lm.generate(**batch, do_sample=True, top_k=0, max_new_tokens=MAX_NEW)
    ids = out[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    finished = (ids == tokenizer.eos_token_id).any(1).tolist()
    gold = [task.gold_reward(*row) for row in zip(prompts, texts, finished, strict=True)]
    measured = {"finished": sum(finished) / len(finished)}
    for name, values in (("eval_loss", torch.tensor(losses)), ("gold", torch.tensor(gold))):
        measured[name] = values.mean().item()
        measured[f"{name}_ci95"] = 1.96 * values.std().item() / len(values) ** 0.5
    return {**measured, "gold_std": torch.tensor(gold).std().item()}


def outside(new: dict[str, Any], shipped: dict[str, Any], name: str = "") -> list[str]:
    """The metrics that are not within the 95 % intervals of `shipped`, as lines to print."""
    lines = []
    for key, value in shipped.items():
        if isinstance(value, dict):
            lines += outside(new[key], value, f"{name}{key}.")
        spread = shipped.get("ci95" if key == "accuracy" else f"{key}_ci95")
        if spread is not None and not abs(new[key] - value) <= spread:
            lines.append(f"{name}{key}: {new[key]:.4f}, shipped {value:.4f} ± {spread:.4f}")
    return lines


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lm-epochs", type=int, default=2)
    parser.add_argument("--rm-epochs", type=int, default=1)
    args = parser.parse_args()
    started = time.perf_counter()
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    splits = task.split_prompts(args.seed)
    tokenizer = small_models.word_tokenizer(words_of_the_task())
    lm = small_models.small_lm(tokenizer, width=96, inner=160, layers=3, longest=256)
    corpus = splits["train"][: SIZES["corpus"]]
    small_models.train_lm(lm, tokenizer, corpus, task.sample_reply, args.lm_epochs, rng)
    metrics: dict[str, Any] = {
        "seed": args.seed,
        "sizes": SIZES,
        "lm": measure_lm(lm, tokenizer, splits["eval"][:400], rng),
    }
    print(metrics["lm"], flush=True)

    pairs = pairs_for(tokenizer, splits["train"][-SIZES["pairs"] :], rng, noisy=True)
    held_out = pairs_for(tokenizer, splits["eval"][: SIZES["eval_prompts"]], rng, noisy=False)
    shutil.rmtree(args.out, ignore_errors=True)
    for name, loss_type in REWARD_MODELS.items():
        causal = loss_type == "genarm_prefix"
        rm: Any = copy.deepcopy(lm) if causal else small_models.reward_model_on(lm)
        trainer = small_models.reward_trainer(
            rm,
            tokenizer,
            pairs,
            eval_dataset=held_out,
            loss_type=loss_type,
            learning_rate=1e-3,
            num_train_epochs=args.rm_epochs,
            per_device_train_batch_size=16,
            seed=args.seed,
        )
        trainer.train()
        predicted = trainer.predict(trainer.eval_dataset)
        metrics[name] = prefix_report(predicted.predictions, predicted.label_ids)
        print(metrics[name]["full"], metrics[name]["mean"], flush=True)
        (rm.half() if causal else rm).eval().save_pretrained(args.out / name)
    lm.save_pretrained(args.out / "lm")
    for name in ("lm", *REWARD_MODELS):
        tokenizer.save_pretrained(args.out / name)
    with (args.out / "prompts.jsonl").open("w") as file:
        for split in ("test", "beta"):
            for prompt in splits[split]:
                file.write(json.dumps({"split": split, "prompt": prompt}) + "\n")
    metrics["minutes"] = (time.perf_counter() - started) / 60
    (args.out / "metrics.json").write_text(json.dumps(rounded(metrics), indent=2) + "\n")
    print(f"wrote {args.out} in {metrics['minutes']:.1f} minutes")
    if args.out != ASSETS:
        shipped = json.loads((ASSETS / "metrics.json").read_text())
        lines = outside(metrics, shipped)
        print("\n".join([f"{len(lines)} metrics outside the shipped intervals", *lines]))


if __name__ == "__main__":
    main()
