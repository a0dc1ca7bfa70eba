"""What several rewards, steering and another tokenizer cost, in whole calls.

    python bench/bench_rewards.py
    python bench/bench_rewards.py --prompt 256 --new 32 --only tokens
    python bench/bench_rewards.py --small 300 --repeats 2

A language model and two reward models of one shape, with random weights, take turns. "sum" is
`WeightedRewards([a, b])`, beside the two alone: what a reward costs is its time less plain guided
decoding's without any (a table of rewards). "tokens" is a reward model behind another tokenizer,
beside re-encoding every text. One token at a time (`speculate=False`); the least of all times is
shown, in milliseconds a token.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from generate_models import ARGUMENTS, build_models

import rgtg_fast
from rgtg_fast.cli.microbench import circumstances


class Table:
    """A scorer that costs nothing: a reward for each token, whatever is before it."""

    def __init__(self, rewards):
        self.rewards = rewards

    def prefill(self, input_ids, attention_mask):
        pass

    def score(self, ids):
        return self.rewards[ids]

    def commit(self, slot):
        pass


class Letters:
    """A tokenizer whose tokens are a letter each."""

    pad_token_id = 0

    def __init__(self, size):
        self.size = size

    def get_vocab(self):
        return {chr(0x1000 + i): i for i in range(self.size)}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(0x1000 + int(i)) for i in ids)


class Runs(Letters):
    """Other tokens: two letters that rise are one, so that a text's last token may change."""

    def get_vocab(self):
        return {"other": 0}

    def __call__(self, texts, truncation, padding=False, padding_side="", return_tensors=None):
        rows = [self.encode(text) for text in texts]
        if not padding:
            return {"input_ids": rows}
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(width) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask}

    def encode(self, text):
        tokens, at = [], 0
        while at < len(text):
            end = at + 1 + (text[at : at + 1] < text[at + 1 : at + 2])
            tokens.append(1 + sum(map(ord, text[at:end])) % (self.size - 1))
            at = end
        return tokens


def contenders(lm, a, b, ids, args):
    options = {"attention_mask": torch.ones_like(ids), "do_sample": True, "seed": 0, "top_k": 0}
    options |= {"max_new_tokens": args.new, "min_new_tokens": args.new, "k": args.k}
    size = lm.config.vocab_size

    def guided(reward_model, **more):
        more = {"speculate": False, "reward_model": reward_model, **options, **more}
        return lambda: rgtg_fast.generate(lm, ids, **more)

    texts = {"tokenizer": Letters(size), "reward_tokenizer": Runs(size)}
    found = {"none": guided(Table(torch.randn(size)))}
    found |= {"a": guided(a)}
    if args.only in (None, "sum"):
        found |= {"b": guided(b), "sum": guided(rgtg_fast.WeightedRewards([a, b], [0.7, 0.3]))}
        found |= {"a, kl_budget": guided(a, kl_budget=0.5, beta=8.0)}
        found |= {"a, min_entropy": guided(a, min_entropy=args.min_entropy)}
    if args.only in (None, "tokens"):
        found |= {"a, other tokens": guided(a, **texts)}
        found |= {"a, re-encoded": guided(a, reward_method="reencode", **texts)}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    for name, options in ARGUMENTS.items():
        add(name, **options)
    add("--new", type=int, default=32)
    add("--repeats", type=int, default=5)
    add("--min-entropy", type=float, default=2.295, help="nats; ten equal candidates have 2.303")
    add("--only", choices=["sum", "tokens"])
    add("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype, size = getattr(torch, args.dtype), args.prompt + args.new
    made = [build_models(args.shape, size, dtype, args.device, args.small) for _ in range(2)]
    lm, a, b = made[0][0], made[0][1], made[1][1]
    ids = torch.randint(3, lm.config.vocab_size, (1, args.prompt), device=args.device)
    calls = contenders(lm, a, b, ids, args)
    taken = {name: [] for name in calls}
    for turn in range(args.repeats + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if turn:
                taken[name].append((time.perf_counter() - begun) / args.new * 1e3)
    least = {name: min(times) for name, times in taken.items()}
    for name, ms in least.items():
        print(f"{name:>18}  {ms:8.2f} ms a token")
    ratios, none = {}, least["none"]
    if "sum" in least:
        parts = least["a"] + least["b"] - none
        ratios["sum to its parts"] = least["sum"] / parts
    if "a, re-encoded" in least:
        fast, slow = least["a, other tokens"], least["a, re-encoded"]
        ratios["re-encoding to other tokens, calls"] = slow / fast
        ratios["re-encoding to other tokens, rewards"] = (slow - none) / (fast - none)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    if args.json:
        record = {**circumstances(), "options": vars(args) | {"json": None}}
        args.json.write_text(json.dumps(record | {"ms": taken, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
