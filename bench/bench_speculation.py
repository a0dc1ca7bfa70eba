"""Speculation: guided decoding against plain, by how much the rewards change the text.

    python bench/bench_speculation.py
    python bench/bench_speculation.py --dtype bfloat16 --kl 0.05 --json out.json
    python bench/bench_speculation.py --entropy 0.8 --top-p 0.95 --batch 1 16
    python bench/bench_speculation.py --temperatures 0.5 1 2 --kl 0 0.05 0.2 1

LM and reward model of one shape with random weights, sampled answers, nothing stops early. How much
a reward changes is set by beta, found for each KL per token (mean over an answer, in nats). Every
contender must give the tokens of `speculate=False`; in bf16 near-ties may differ and are counted.
Anchors: Hugging Face's own generate, and the loop of this package with rewards that are all zero.
`right 70 %` has guesses of the next tokens for nothing, of which that share is the guided text's.
All run in turns, and the shortest time of each counts; the ratio is to plain.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from bench_generate import environment
from generate_models import SHAPES, build_models, sharpen

import rgtg_fast

SEED = 1
SEARCHED = 16  # tokens that beta is found on
CONTENDERS = {
    "plain": "plain HF generate",
    "no reward": "our loop, rewards zero",
    "off": "guided, one by one",
    "auto": "guided, speculate='auto'",
    "2": "guided, speculate=2",
    "4": "guided, speculate=4",
    "8": "guided, speculate=8",
    "right 70 %": "auto, guesses 70 % right",
    "right 85 %": "auto, guesses 85 % right",
}


class Zeros:
    """Rewards that change nothing, for nothing."""

    def prefill(self, input_ids, attention_mask):
        self.rewards = torch.zeros((len(input_ids), 64), device=input_ids.device)

    def score(self, ids):
        return self.rewards[:, : ids.shape[1]]

    def commit(self, slot):
        pass

    def keep_rows(self, rows):
        self.rewards = self.rewards[rows]


class Right:
    """A drafter that knows the guided text, and is right with a given chance at each token."""

    def __init__(self, answers, share):
        generator = torch.Generator().manual_seed(7)
        wrong = torch.rand(answers.shape, generator=generator) >= share
        self.guesses = torch.where(wrong, (answers + 1) % 1000, answers)

    def begin(self, prompts, mask):
        self.rows = torch.arange(len(prompts))

    def draft(self, rows, ahead, counts, n, policy):
        at = (rows.position + counts)[:, None] + torch.arange(n)
        beyond = at >= self.guesses.shape[1]
        guesses = self.guesses[self.rows].gather(1, at.clamp(max=self.guesses.shape[1] - 1))
        return guesses.masked_fill(beyond, -1)

    def keep_rows(self, rows):
        self.rows = self.rows[rows]

    def finish(self):
        pass


class Case:
    """One batch, KL and temperature."""

    def __init__(self, args, models, batch, temperature, kl):
        self.lm, self.rm = models
        self.new, self.k = args.new, args.k
        generator = torch.Generator().manual_seed(batch)
        vocab = self.lm.config.vocab_size
        self.ids = torch.randint(0, vocab, (batch, args.prompt), generator=generator)
        self.options = {"do_sample": True, "temperature": temperature}
        if args.top_p is not None:
            self.options["top_p"] = args.top_p
        self.beta = 0.0
        self.beta = self.beta_for(kl) if kl else 0.0
        self.answer = self.guided(speculate=False, return_dict_in_generate=True)
        self.kl = self.answer.kl.mean().item()

    def guided(self, **options):
        options = {"reward_model": self.rm, "beta": self.beta, **options}
        return rgtg_fast.generate(
            self.lm,
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            k=self.k,
            seed=SEED,
            **{"max_new_tokens": self.new, **self.options, **options},
        )

    def beta_for(self, kl):
        """By bisection. KL of the ratio policy from π over the candidates alone: what no reward
        gives at this k is taken off."""
        low, high = 1e-2, 1e4
        floor = self.mean_kl(0.0)
        for _ in range(10):
            beta = (low * high) ** 0.5
            low, high = (beta, high) if self.mean_kl(beta) - floor < kl else (low, beta)
        return (low * high) ** 0.5

    def mean_kl(self, beta):
        few = {"speculate": False, "return_dict_in_generate": True, "max_new_tokens": SEARCHED}
        out = self.guided(beta=beta, **few)
        return out.kl.nanmean().item()

    def run(self, name):
        if name == "plain":
            return self.lm.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                max_new_tokens=self.new,
                min_new_tokens=self.new,
                **self.options,
            )
        if name == "no reward":
            return self.guided(reward_model=Zeros(), beta=0.0)
        if name == "off":
            return self.guided(speculate=False)
        if name.startswith("right"):
            answers = self.answer.sequences[:, self.ids.shape[1] :]
            return self.guided(assistant_model=Right(answers, int(name.split()[1]) / 100))
        return self.guided(speculate=name if name == "auto" else int(name))

    def differing(self, name, got):
        """Rows whose tokens are not those of one by one."""
        if name in ("plain", "no reward"):
            return 0
        return int((got != self.answer.sequences).any(1).sum())

    def forwards(self, name):
        """Forwards per token of an answer, of the reward model and of the language model."""
        if name in ("plain", "no reward", "off"):
            return None
        options = {"speculate": name if name == "auto" else int(name)} if name[0] != "r" else {}
        if name.startswith("right"):
            answers = self.answer.sequences[:, self.ids.shape[1] :]
            options["assistant_model"] = Right(answers, int(name.split()[1]) / 100)
        did = self.guided(return_dict_in_generate=True, **options).speculation
        if did is None:
            return None
        return [did["reward_forwards"] / self.new, did["lm_forwards"] / self.new, did["acceptance"]]


def measure(case, contenders, repeats, exact):
    """Seconds of each run by contender, rows that differ, forwards per token."""
    runs = {name: [] for name in contenders}
    differing = {}
    for repeat in range(repeats + 1):  # the first warms up
        for name in contenders:
            start = time.perf_counter()
            got = case.run(name)
            seconds = time.perf_counter() - start
            if repeat:
                runs[name].append(seconds)
            differing[name] = max(differing.get(name, 0), case.differing(name, got))
            if exact and differing[name]:
                raise SystemExit(f"{name} gives other tokens than one by one: no timings")
    return runs, differing, {name: case.forwards(name) for name in contenders}


def show(case, batch, temperature, asked, runs, differing, forwards):
    print(
        f"\nB={batch}, T={temperature:g}, KL asked {asked:g}, measured {case.kl:.3f} in all "
        f"(beta {case.beta:.3g})"
    )
    print(
        f"{'':26} {'ms/token':>9} {'ratio':>6} {'RM fw':>6} {'LM fw':>6} {'kept':>5} {'differ':>6}"
    )
    plain = min(runs["plain"])
    for name, seconds in runs.items():
        best = min(seconds)
        rm, lm, kept = forwards[name] or (None, None, None)
        cells = ["" if x is None else f"{x:.2f}" for x in (rm, lm, kept)]
        print(
            f"{CONTENDERS[name]:26} {best / case.new * 1e3:9.2f} {best / plain:6.2f} "
            f"{cells[0]:>6} {cells[1]:>6} {cells[2]:>5} {differing[name]:6d}"
        )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=[s for s in SHAPES if s != "llama-8b"], default="llama")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--batch", type=int, nargs="+", default=[1])
    add("--prompt", type=int, default=128)
    add("--new", type=int, default=64)
    add("--k", type=int, default=10)
    add("--kl", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2], help="nats per token")
    add("--temperatures", type=float, nargs="+", default=[1.0])
    add("--top-p", type=float)
    add("--entropy", type=float, default=0.8, help="nats among the candidates; 0: as drawn")
    add("--repeats", type=int, default=5)
    add("--threads", type=int)
    add("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    add("--quick", action="store_true", help="tiny models, to see that it runs")
    add("--json", type=Path)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.quick:
        args.prompt, args.new, args.repeats, args.k = 8, 8, 1, 4
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    models = build_models(
        args.shape, args.prompt + args.new, dtype, small=512 if args.quick else None
    )
    if args.entropy:
        sharpen(models[0], args.k, args.entropy)
    contenders = list(dict.fromkeys(["plain", *args.contenders]))
    points = []
    for batch in args.batch:
        for temperature in args.temperatures:
            for kl in args.kl:
                case = Case(args, models, batch, temperature, kl)
                found = measure(case, contenders, args.repeats, dtype == torch.float32)
                show(case, batch, temperature, kl, *found)
                point = {"batch": batch, "temperature": temperature, "kl_asked": kl}
                point |= {"kl": case.kl, "beta": case.beta}
                points.append(
                    point | dict(zip(("runs", "differing", "forwards"), found, strict=True))
                )
    if args.json:
        options = {n: str(v) if isinstance(v, Path) else v for n, v in vars(args).items()}
        report = {"environment": environment("cpu"), "options": options, "points": points}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
