"""Speculation: guided decoding against plain, by how much the rewards change the text.

    python bench/bench_speculation.py
    python bench/bench_speculation.py --dtype bfloat16 --kl 0.05 --json out.json
    python bench/bench_speculation.py --entropy 0.8 --top-p 0.95 --batch 1 16
    python bench/bench_speculation.py --temperatures 0.5 1 2 --kl 0 0.05 0.2 1

    python bench/bench_speculation.py --reward head
    python bench/bench_speculation.py --embedded 100

LM and reward model of one shape with random weights, sampled answers, nothing stops early. How much
a reward changes is set by beta, found for each KL per token (mean over an answer, in nats). Every
contender must give the tokens of `speculate=False`; in bf16 near-ties may differ and are counted.
Anchors: Hugging Face's own generate, and the loop of this package with rewards that are all zero.
`no guesses`: without the index of suffixes; texts of random weights repeat themselves. `right 70 %`
has guesses of the next tokens for nothing, of which that share is the guided text's. All run in
turns, with a new seed in each, as what a contender has learnt of a text must not serve it twice;
the ratio is the median of a turn's ratios to plain. `--embedded`: forwards per token of the models
of the demo, on so many prompts.
"""

import argparse
import json
import statistics
import time
import weakref
from pathlib import Path

import torch
from bench_generate import environment
from generate_models import SHAPES, build_models, sharpen

import rgtg_fast
from rgtg_fast.decode import ahead
from rgtg_fast.demo.run import load_assets

CONTENDERS = {
    "plain": "plain HF generate",
    "no reward": "our loop, rewards zero",
    "off": "guided, one by one",
    "auto": "guided, speculate='auto'",
    "no guesses": "auto, no guesses",
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


class Silent:
    """A drafter without a guess."""

    def begin(self, prompts, mask):
        self.none = torch.full((len(prompts), 1), -1)

    def draft(self, rows, ahead, counts, n, policy):
        return self.none

    def keep_rows(self, rows):
        self.none = self.none[rows]

    def finish(self):
        pass


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
        self.answers, self.kls = {}, []

    def answer(self, seed):
        """The tokens of one by one."""
        if seed not in self.answers:
            out = self.guided(seed, speculate=False, return_dict_in_generate=True)
            self.answers[seed] = out.sequences
            self.kls.append(out.kl.mean().item())
        return self.answers[seed]

    def guided(self, seed, **options):
        options = {"reward_model": self.rm, "beta": self.beta, **options}
        return rgtg_fast.generate(
            self.lm,
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            k=self.k,
            seed=seed,
            **{"max_new_tokens": self.new, **self.options, **options},
        )

    def beta_for(self, kl):
        """By bisection. KL of the ratio policy from π over the candidates alone: what no reward
        gives at this k is taken off."""
        low, high = 0.1, 1e3
        floor = self.mean_kl(0.0)
        for _ in range(9):
            beta = (low * high) ** 0.5
            low, high = (beta, high) if self.mean_kl(beta) - floor < kl else (low, beta)
        return (low * high) ** 0.5

    def mean_kl(self, beta):
        few = {"speculate": False, "return_dict_in_generate": True}
        out = self.guided(0, beta=beta, **few)
        return out.kl.nanmean().item()

    def run(self, name, seed):
        """The output of one contender."""
        if name == "plain":
            torch.manual_seed(seed)
            return self.lm.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                max_new_tokens=self.new,
                min_new_tokens=self.new,
                return_dict_in_generate=True,
                **self.options,
            )
        options = {"return_dict_in_generate": True}
        if name == "no reward":
            return self.guided(seed, reward_model=Zeros(), beta=0.0, **options)
        if name == "no guesses":
            options["assistant_model"] = Silent()
        elif name.startswith("right"):
            answers = self.answer(seed)[:, self.ids.shape[1] :]
            options["assistant_model"] = Right(answers, int(name.split()[1]) / 100)
        elif name != "auto":
            options["speculate"] = False if name == "off" else int(name)
        return self.guided(seed, **options)


def measure(case, contenders, repeats, exact):
    """Seconds of each run by contender, rows that differ, and forwards per token of the reward
    model and of the language model, and the share of drafts kept."""
    runs, forwards = {name: [] for name in contenders}, {}
    differing = dict.fromkeys(contenders, 0)
    learnt = {name: weakref.WeakKeyDictionary() for name in contenders}
    for seed in range(1, repeats + 2):  # the first warms up
        wanted = case.answer(seed)
        for name in contenders:
            ahead._learnt = learnt[name]  # what one has learnt of a text must not serve another
            start = time.perf_counter()
            out = case.run(name, seed)
            seconds = time.perf_counter() - start
            if name not in ("plain", "no reward"):
                differing[name] += int((out.sequences != wanted).any(1).sum())
            if exact and differing[name]:
                raise SystemExit(f"{name} gives other tokens than one by one: no timings")
            did = getattr(out, "speculation", None)
            if seed == 1:
                continue
            runs[name].append(seconds)
            if did:
                kept = did["acceptance"]
                each = [did["reward_forwards"] / case.new, did["lm_forwards"] / case.new]
                forwards.setdefault(name, []).append([*each, 1.0 if kept is None else kept])
    means = {
        n: [sum(column) / len(f) for column in zip(*f, strict=True)] for n, f in forwards.items()
    }
    return runs, differing, means


def show(case, batch, temperature, asked, runs, differing, forwards):
    kl = statistics.mean(case.kls)
    print(
        f"\nB={batch}, T={temperature:g}, KL asked {asked:g}, measured {kl:.3f} in all "
        f"(beta {case.beta:.3g})"
    )
    print(
        f"{'':26} {'ms/token':>9} {'ratio':>6} {'RM fw':>6} {'LM fw':>6} {'kept':>5} {'differ':>6}"
    )
    for name, seconds in runs.items():
        ratio = statistics.median(s / p for s, p in zip(seconds, runs["plain"], strict=True))
        cells = ["" if x is None else f"{x:.2f}" for x in forwards.get(name, [None] * 3)]
        print(
            f"{CONTENDERS[name]:26} {statistics.median(seconds) / case.new * 1e3:9.2f} "
            f"{ratio:6.2f} {cells[0]:>6} {cells[1]:>6} {cells[2]:>5} {differing[name]:6d}"
        )


def embedded(count):
    """Forwards per token of the demo's models, with the texts before as guesses; a point each."""
    assets = load_assets()
    points = []
    print(f"{'beta':>5} {'':8} {'KL':>6} {'RM fw':>6} {'LM fw':>6} {'kept':>5} {'differ':>6}")
    for beta in (2.0, 4.0, 8.0):
        for do_sample in (True, False):
            for speculate in ("auto", 8):
                drafter = rgtg_fast.SuffixDrafter()
                did, kl, differing = [], [], 0
                for seed, prompt in enumerate(assets.prompts["test"][:count]):
                    options = {
                        **assets.tokenizer(prompt, return_tensors="pt"),
                        "reward_model": assets.reward_models["rm_partial"],
                        "beta": beta,
                        "do_sample": do_sample,
                        "seed": seed,
                        "max_new_tokens": 60,
                        "return_dict_in_generate": True,
                    }
                    want = rgtg_fast.generate(assets.lm, **options, speculate=False)
                    own = {"speculate": speculate, "assistant_model": drafter}
                    got = rgtg_fast.generate(assets.lm, **options, **own)
                    differing += not torch.equal(got.sequences, want.sequences)
                    did.append(got.speculation)
                    kl.append(want.kl.nanmean().item())
                tokens = sum(d["tokens"] for d in did)
                rm, lm = (
                    sum(d[n] for d in did) / tokens for n in ("reward_forwards", "lm_forwards")
                )
                kept = statistics.mean(d["acceptance"] or 0.0 for d in did)
                names = "beta", "do_sample", "speculate", "kl", "rm", "lm", "kept", "differing"
                values = beta, do_sample, speculate, statistics.mean(kl), rm, lm, kept, differing
                points.append(dict(zip(names, values, strict=True)))
                how = f"{'sampled' if do_sample else 'greedy'} {speculate}"
                print(
                    f"{beta:5g} {how:13} {values[3]:6.3f} {rm:6.2f} {lm:6.2f} {kept:5.2f} "
                    f"{differing:6d}"
                )
    return points


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
    add("--reward", choices=["separate", "head"], default="separate")
    add("--embedded", type=int, help="prompts of the demo")
    add("--quick", action="store_true", help="tiny models, to see that it runs")
    add("--json", type=Path)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.quick:
        args.prompt, args.new, args.repeats, args.k = 8, 8, 1, 4
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.embedded:
        return write(args, embedded(args.embedded))
    dtype = getattr(torch, args.dtype)
    models = build_models(
        args.shape, args.prompt + args.new, dtype, small=512 if args.quick else None
    )
    if args.entropy:
        sharpen(models[0], args.k, args.entropy)
    if args.reward == "head":
        width = models[0].config.hidden_size
        weight = torch.randn(width, generator=torch.Generator().manual_seed(3)) / width**0.5
        models = models[0], rgtg_fast.RewardHead(models[0], weight.to(dtype))
    contenders = list(dict.fromkeys(["plain", *args.contenders]))
    points = []
    for batch in args.batch:
        for temperature in args.temperatures:
            for kl in args.kl:
                case = Case(args, models, batch, temperature, kl)
                found = measure(case, contenders, args.repeats, dtype == torch.float32)
                show(case, batch, temperature, kl, *found)
                point = {"batch": batch, "temperature": temperature, "kl_asked": kl}
                point |= {"kl": statistics.mean(case.kls), "beta": case.beta}
                points.append(
                    point | dict(zip(("runs", "differing", "forwards"), found, strict=True))
                )
    write(args, points)


def write(args, points):
    if args.json:
        options = {n: v for n, v in vars(args).items() if n != "json"}
        report = {"environment": environment("cpu"), "options": options, "points": points}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
