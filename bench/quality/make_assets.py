"""Train the models that `python -m rgtg_fast demo` runs on, from nothing but the task's grammar.

    python bench/quality/make_assets.py            # about 6 minutes of one core

Writes a tokenizer, a causal LM, two reward models and the held-out prompts into
`rgtg_fast/demo/assets`, and `metrics.json` with what was measured on the way. Both reward models
start from the LM, have the same architecture and see the same preference pairs in the same order
with the same optimiser for the same number of steps. They differ in one line, the positions at
which the Bradley-Terry loss is taken:

- `rm_full`     -log σ(r(x, y_w) - r(x, y_l)), at the last token of the two replies;
- `rm_partial`  the mean over prefix lengths i of -log σ(r(x, y_w[1:i]) - r(x, y_l[1:i])), where the
  shorter reply keeps the reward of its EOS (arXiv 2406.07780). A causal model gives the rewards of
  all prefixes in one forward.

The two replies of a pair come from the grammar, as the LM's corpus does, and are labelled by a
Bradley-Terry draw from their gold rewards, so the labels are as noisy as people's. Same seed,
machine, thread count and versions: same files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rgtg_fast.demo import task

ASSETS = Path(__file__).resolve().parents[2] / "rgtg_fast" / "demo" / "assets"
MAX_NEW = 72  # tokens; the longest reply of the grammar has 69 and EOS
SIZES = {"corpus": 24_000, "pairs": 20_000, "eval_pairs": 1000}
PREFIX_LENGTHS = (4, 8, 16, 24, 32, 40)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the grammar's words, with distinct pad, eos and unknown tokens."""
    texts = task.all_prompts() + [s for group in task.SENTENCES.values() for s in group]
    vocab = sorted({w for text in texts for w in task.words(text).split()})
    ids = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *vocab])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_lm(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


def make_reward_model(lm: LlamaForCausalLM) -> LlamaForSequenceClassification:
    """A one-label classifier on a copy of the LM's body, its head starting at zero."""
    config = LlamaConfig.from_dict(lm.config.to_dict())
    config.num_labels = 1
    rm = LlamaForSequenceClassification(config)
    rm.model.load_state_dict(lm.model.state_dict())
    torch.nn.init.zeros_(rm.score.weight)
    return rm


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Ragged rows to [N, L], filled on the right with `value`."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batches(lengths: list[int], size: int, epochs: int, rng: random.Random) -> Iterator[list[int]]:
    """Index batches of rows of like length (little padding), in a random order, each epoch anew."""
    for _ in range(epochs):
        order = list(range(len(lengths)))
        rng.shuffle(order)
        pools = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
        order = [i for pool in pools for i in sorted(pool, key=lengths.__getitem__)]
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        rng.shuffle(chunks)
        yield from chunks


def train(
    name: str,
    model: torch.nn.Module,
    plan: list[list[int]],
    loss_of: Callable[[list[int]], torch.Tensor],
    lr: float,
) -> None:
    """AdamW with linear warm-up and cosine decay over the batches of `plan`."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, len(plan) // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, len(plan) - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    started, recent = time.perf_counter(), 0.0
    for step, rows in enumerate(plan, 1):
        optimiser.zero_grad()
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent += loss.item()
        if step % 100 == 0 or step == len(plan):
            mean = recent / (step % 100 or 100)
            clock = time.perf_counter() - started
            print(f"{name}: step {step}/{len(plan)}  loss {mean:.4f}  {clock:.0f} s", flush=True)
            recent = 0.0
    model.eval()


def lm_loss(lm: LlamaForCausalLM, rows: list[list[int]], prompt_lengths: list[int]) -> torch.Tensor:
    """Mean negative log-likelihood of the reply tokens, EOS included."""
    ids = pad(rows, lm.config.pad_token_id)
    logits = lm(input_ids=ids[:, :-1], use_cache=False).logits
    at = torch.arange(1, ids.shape[1])
    is_reply = (ids[:, 1:] != lm.config.pad_token_id) & (
        at >= torch.tensor(prompt_lengths)[:, None]
    )
    return F.cross_entropy(logits[is_reply], ids[:, 1:][is_reply])


def train_lm(lm, tokenizer, prompts: list[str], epochs: int, rng: random.Random) -> None:
    replies = [task.sample_reply(p, rng) for p in prompts]
    starts = tokenizer(prompts)["input_ids"]
    ends = tokenizer(replies)["input_ids"]
    rows = [a + b + [tokenizer.eos_token_id] for a, b in zip(starts, ends, strict=True)]
    plan = list(batches([len(r) for r in rows], 64, epochs, rng))

    def loss_of(chosen: list[int]) -> torch.Tensor:
        return lm_loss(lm, [rows[i] for i in chosen], [len(starts[i]) for i in chosen])

    train("lm", lm, plan, loss_of, lr=4e-3)


def make_pairs(tokenizer, prompts: list[str], rng: random.Random) -> list[dict]:
    """Two grammar replies per prompt, as ids with EOS, labelled by a Bradley-Terry draw."""
    pairs = []
    for prompt, start in zip(prompts, tokenizer(prompts)["input_ids"], strict=True):
        texts = [task.sample_reply(prompt, rng) for _ in range(2)]
        gold = [task.gold_reward(prompt, text) for text in texts]
        ids = [start + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        won = int(rng.random() >= 1 / (1 + math.exp(gold[1] - gold[0])))
        pairs.append(
            {
                "chosen": ids[won],
                "rejected": ids[1 - won],
                "start": len(start),
                "gold": (gold[won], gold[1 - won]),
            }
        )
    return pairs


def prefix_rewards(rm, pairs: list[dict]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards of every prefix of both replies of N pairs, in one forward.

    Returns chosen and rejected [N, T], column i for the prefix of i + 1 reply tokens, held at the
    last token's value after the reply's end, and T per pair [N]: the longer reply's length.
    """
    pad_id = rm.config.pad_token_id
    ids = pad([p[side] for side in ("chosen", "rejected") for p in pairs], pad_id)
    hidden = rm.model(input_ids=ids, use_cache=False).last_hidden_state
    rewards = rm.score(hidden)[..., 0]
    start = torch.tensor([p["start"] for p in pairs])
    last = (ids != pad_id).sum(1) - 1
    longest = torch.maximum(*last.chunk(2)) + 1 - start
    at = start.repeat(2)[:, None] + torch.arange(int(longest.max()))
    held = rewards.gather(1, torch.minimum(at, last[:, None]))
    chosen, rejected = held.chunk(2)
    return chosen, rejected, longest


def pair_loss(rm, pairs: list[dict], every_prefix: bool) -> torch.Tensor:
    chosen, rejected, longest = prefix_rewards(rm, pairs)
    losses = -F.logsigmoid(chosen - rejected)
    at = torch.arange(losses.shape[1])
    counted = at < longest[:, None] if every_prefix else at == longest[:, None] - 1
    return losses[counted].mean()


def accuracy(right: torch.Tensor) -> dict[str, float]:
    """Share of True with the half-width of its 95 % interval (normal approximation)."""
    n, share = right.numel(), right.double().mean().item()
    return {
        "accuracy": round(share, 4),
        "ci95": round(1.96 * math.sqrt(share * (1 - share) / n), 4),
    }


@torch.no_grad()
def measure_rm(rm, pairs: list[dict]) -> dict:
    """How often the reward orders a pair as the gold rewards of the whole texts do: whole texts,
    and prefixes of a given number of reply tokens (pairs that still agree there are left out)."""
    pairs = [p for p in pairs if p["gold"][0] != p["gold"][1]]
    chosen, rejected, longest = prefix_rewards(rm, pairs)
    order = torch.tensor([math.copysign(1, p["gold"][0] - p["gold"][1]) for p in pairs])
    right = (chosen - rejected).sign() == order[:, None]
    result = {"full": accuracy(right[torch.arange(len(pairs)), longest - 1]), "prefix": {}}
    for n in PREFIX_LENGTHS:
        tokens = [(p["chosen"][: p["start"] + n], p["rejected"][: p["start"] + n]) for p in pairs]
        differ = torch.tensor([a != b for a, b in tokens])
        result["prefix"][str(n)] = accuracy(right[differ, n - 1])
    return result


@torch.no_grad()
def measure_lm(lm, tokenizer, prompts: list[str], rng: random.Random) -> dict[str, float]:
    """Loss on fresh grammar replies (nats per token, mean over texts) and the gold rewards of the
    LM's own replies at temperature 1, with the half-widths of their 95 % intervals."""
    losses = []
    for prompt in prompts:
        start = tokenizer(prompt)["input_ids"]
        reply = tokenizer(task.sample_reply(prompt, rng))["input_ids"]
        losses.append(lm_loss(lm, [start + reply + [tokenizer.eos_token_id]], [len(start)]).item())
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = lm.generate(**batch, do_sample=True, top_k=0, max_new_tokens=MAX_NEW)
    ids = out[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    finished = (ids == tokenizer.eos_token_id).any(1).tolist()
    gold = [task.gold_reward(*row) for row in zip(prompts, texts, finished, strict=True)]
    measured = {"finished": sum(finished) / len(finished)}
    for name, values in (("eval_loss", torch.tensor(losses)), ("gold", torch.tensor(gold))):
        measured[name] = round(values.mean().item(), 4)
        measured[f"{name}_ci95"] = round(1.96 * values.std().item() / math.sqrt(len(values)), 4)
    return {**measured, "gold_std": round(torch.tensor(gold).std().item(), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lm-epochs", type=int, default=2)
    parser.add_argument("--rm-epochs", type=int, default=1)
    args = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    splits = task.split_prompts(args.seed)
    tokenizer = make_tokenizer()
    lm = make_lm(tokenizer)
    train_lm(lm, tokenizer, splits["train"][: SIZES["corpus"]], args.lm_epochs, rng)
    metrics = {
        "seed": args.seed,
        "sizes": SIZES,
        "lm": measure_lm(lm, tokenizer, splits["eval"][:400], rng),
    }
    print(metrics["lm"])

    pairs = make_pairs(tokenizer, splits["train"][-SIZES["pairs"] :], rng)
    held_out = make_pairs(tokenizer, splits["eval"][: SIZES["eval_pairs"]], rng)
    plan = list(batches([len(p["chosen"] + p["rejected"]) for p in pairs], 16, args.rm_epochs, rng))
    reward_models = {"rm_full": False, "rm_partial": True}
    shutil.rmtree(args.out, ignore_errors=True)
    for name, every_prefix in reward_models.items():
        rm = make_reward_model(lm)
        train(
            name,
            rm,
            plan,
            lambda rows, rm=rm, every=every_prefix: pair_loss(rm, [pairs[i] for i in rows], every),
            lr=1e-3,
        )
        metrics[name] = measure_rm(rm, held_out)
        print(metrics[name], flush=True)
        rm.save_pretrained(args.out / name)
    lm.save_pretrained(args.out / "lm")
    for name in ("lm", *reward_models):
        tokenizer.save_pretrained(args.out / name)
    with (args.out / "prompts.jsonl").open("w") as file:
        for split in ("test", "beta"):
            for prompt in splits[split]:
                file.write(json.dumps({"split": split, "prompt": prompt}) + "\n")
    metrics["minutes"] = round((time.perf_counter() - started) / 60, 2)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"wrote {args.out} in {metrics['minutes']} minutes")


if __name__ == "__main__":
    main()
