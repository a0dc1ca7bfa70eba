"""Milliseconds per token of guided generation against plain and against published decoding.

    python bench/bench_generate.py
    python bench/bench_generate.py --shape llama --dtype bfloat16 --batch 4 --json out.json

LM and reward model have the shape of GPT-2 124M (or of a Llama of that size) and random weights;
decoding is greedy and nothing stops early. All contenders run in one process, interleaved, and the
medians are compared. A figure is a whole call (prompt included) over the new tokens.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
from published import KFoldCache, ReEncode, decode
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import rgtg_fast

BETA = 1.0
# A choice between scores closer than this is a near tie, which rounding may decide either way.
NEAR_TIE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.02}
SLOW = ("reencode", "re-encode one by one")
SLOW_REPEATS = 2
LABELS = {
    "plain": "plain HF generate",
    "auto": "guided, auto",
    "tree": "guided, tree",
    "expand": "guided, expand",
    "reencode": "guided, reencode (k at once)",
    "k-fold cache": "k-fold batch cache (ARGS)",
    "re-encode one by one": "naive re-encode (PARGS)",
}


def build_models(shape, positions, dtype):
    """LM and one-label reward model of one shape, 124M parameters each, random weights."""
    torch.manual_seed(0)
    common = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if shape == "gpt2":
        config = GPT2Config(n_positions=max(1024, positions), **common)
        classes = GPT2LMHeadModel, GPT2ForSequenceClassification
    else:
        config = LlamaConfig(
            vocab_size=50257,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            max_position_embeddings=max(2048, positions),
            tie_word_embeddings=True,
            **common,
        )
        classes = LlamaForCausalLM, LlamaForSequenceClassification
    lm = classes[0](config)
    config.num_labels = 1
    models = [m.to(dtype).eval().requires_grad_(False) for m in (lm, classes[1](config))]
    return models


class Bench:
    """The contenders: each runs once, checks its tokens against the guided ones, gives seconds."""

    def __init__(self, lm, rm, prompt, k, new, slow_new):
        self.lm, self.rm, self.prompt, self.k, self.new = lm, rm, prompt, k, new
        self.slow_new = min(slow_new or new, new)
        self.near_ties = 0
        self.answer = self.margins = None

    def guided(self, prompt, new, method, **options):
        return rgtg_fast.generate(
            self.lm,
            prompt,
            attention_mask=torch.ones_like(prompt),
            reward_model=self.rm,
            k=self.k,
            beta=BETA,
            reward_method=method,
            max_new_tokens=new,
            **options,
        )

    def prepare(self):
        """The answer everybody has to give, and by how much each of its tokens won."""
        out = self.guided(
            self.prompt, self.new, "auto", return_dict_in_generate=True, output_candidates=True
        )
        self.answer = out.sequences[:, self.prompt.shape[1] :]
        best = (out.candidate_logprobs + BETA * out.candidate_rewards).topk(min(2, self.k)).values
        self.margins = best[..., 0] - best[..., -1] if self.k > 1 else best[..., 0] + torch.inf

    def check(self, name, tokens, first):
        """Refuse to go on where a contender says something else, near ties aside."""
        wanted = self.answer[:, first : first + tokens.shape[1]]
        for row in range(len(wanted)):
            differs = (tokens[row] != wanted[row]).nonzero()
            if len(differs) == 0:
                continue
            step = int(differs[0])
            margin = float(self.margins[row, first + step])
            if margin > NEAR_TIE[self.lm.dtype]:
                sys.exit(
                    f"{name} disagrees with guided decoding in row {row} at token {first + step}: "
                    f"{int(tokens[row, step])} against {int(wanted[row, step])}, which won by "
                    f"{margin:.4f}; no timings of different answers are printed"
                )
            self.near_ties += 1

    def seconds(self, name):
        """Run contender `name` once -> seconds a call of `new` tokens takes."""
        if name in SLOW:
            return self.slow_seconds(name)
        start = time.perf_counter()
        if name == "plain":
            self.lm.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                do_sample=False,
                max_new_tokens=self.new,
                min_new_tokens=self.new,
            )
            return time.perf_counter() - start
        if name == "k-fold cache":
            tokens, *_ = decode(self.lm, KFoldCache(self.rm), self.prompt, self.k, BETA, self.new)
        else:
            tokens = self.guided(self.prompt, self.new, name)[:, self.prompt.shape[1] :]
        spent = time.perf_counter() - start
        self.check(name, tokens, 0)
        return spent

    def slow_seconds(self, name):
        """As `seconds`, from `slow_new` tokens in the middle of the answer: at its mean length."""
        first = (self.new - self.slow_new) // 2
        prompt = torch.cat([self.prompt, self.answer[:, :first]], dim=1)
        if name == "reencode":
            start = time.perf_counter()
            tokens = self.guided(prompt, self.slow_new, name)[:, prompt.shape[1] :]
            steps, prefill = time.perf_counter() - start, 0.0
        else:
            tokens, prefill, steps = decode(
                self.lm, ReEncode(self.rm), prompt, self.k, BETA, self.slow_new
            )
        self.check(name, tokens, first)
        return prefill + steps * self.new / self.slow_new


def environment():
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rgtg_fast": rgtg_fast.__version__,
        "commit": git.stdout.strip() or None,
    }


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--k", type=int, default=10, help="candidates per token")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--slow-new",
        type=int,
        default=8,
        help="new tokens of the re-encoding contenders, from the middle of the answer; 0: all",
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--contenders", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--json", type=Path, help="write the raw seconds there")
    return parser.parse_args()


def run(args):
    """Seconds per contender, [repeats] each, and the bench they came from."""
    lm, rm = build_models(args.shape, args.prompt + args.new + 1, getattr(torch, args.dtype))
    ids = torch.randint(0, lm.config.vocab_size, (args.batch, args.prompt))
    bench = Bench(lm, rm, ids, args.k, args.new, args.slow_new)
    bench.prepare()
    seconds = {name: [] for name in args.contenders}
    for repeat in range(args.repeats + 1):
        for name, values in seconds.items():
            # Slow contenders are warm after the first of their many forwards, and steady.
            if name in SLOW and not 1 <= repeat <= SLOW_REPEATS:
                continue
            spent = bench.seconds(name)
            if repeat > 0:
                values.append(spent)
    return seconds, bench


def report(args, seconds, bench):
    print(
        f"{args.shape} 124M LM and reward model, {args.dtype}, k={args.k}, batch {args.batch}, "
        f"prompt {args.prompt}, {args.new} new tokens, {torch.get_num_threads()} threads, "
        f"median of {args.repeats} ({min(args.repeats, SLOW_REPEATS)} for re-encoding)"
    )
    ms = {name: statistics.median(values) * 1000 / args.new for name, values in seconds.items()}
    guided = ms.get("auto")
    plain = ms.get("plain")
    print(f"{'':32}{'ms/token':>10}{'spread':>16}{'/ plain':>10}{'/ guided':>10}")
    for name, value in ms.items():
        low, high = (f(seconds[name]) * 1000 / args.new for f in (min, max))
        ratios = "".join(
            f"{value / base:10.2f}" if base else f"{'':10}" for base in (plain, guided)
        )
        print(f"{LABELS[name]:32}{value:10.1f}{f'{low:.1f}-{high:.1f}':>16}{ratios}")
    if bench.slow_new < args.new and any(name in SLOW for name in ms):
        print(
            f"Re-encoding contenders ran {bench.slow_new} tokens from the middle of the answer "
            f"(mean length {args.prompt + args.new / 2:.0f}), scaled to {args.new}; "
            "--slow-new 0 runs all."
        )
    print(
        f"All contenders agree on the greedy tokens; near ties decided otherwise: {bench.near_ties}"
    )
    return ms


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    # One pair of models is used throughout: what the scorers warn of is known here.
    warnings.filterwarnings("ignore", category=UserWarning)
    transformers.logging.set_verbosity_error()
    seconds, bench = run(args)
    ms = report(args, seconds, bench)
    if args.json:
        options = {k: v for k, v in vars(args).items() if k != "json"}
        record = {
            "bench": "generate",
            "options": options,
            "environment": environment(),
            "seconds": seconds,
            "ms_per_token": ms,
            "near_ties": bench.near_ties,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
