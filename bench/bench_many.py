"""`generate_many` against padded batches in order: time, memory of the caches, the same tokens.

    python bench/bench_many.py
    python bench/bench_many.py --prompts 200 --layers 2 --width 64
    python bench/bench_many.py --device cuda --dtype bfloat16 --layers 16 --width 2048 --json

Prompts of 8 to 512 random tokens, sampled answers of 1 to 128: random weights, and a share of the
vocabulary ends an answer. Padded: `generate` on batches of as many prompts, in their order, which
ended rows leave at halves. Both runs alternate; the shortest of each counts (on a CPU in seconds of
the process, so give it one thread). `cache` is what the
reward model's keys and values take, over those of the tokens there are, at each step: the mean, and
the largest over the largest. One by one: the same prompts each in a call by itself, of which every
answer must have the same tokens but where the choice was a near-tie.
"""

import argparse
import functools
import random
import statistics
import time

import torch
from _common import report, require
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import rgtg_fast
from rgtg_fast import ops
from rgtg_fast.decode.refill import Refill

VOCAB, PAD = 2048, 0
NEAR_EDGE = 1e-5  # logits closer than this may change places by rounding
NEAR = 1e-3  # a choice that this changes of a score could be another where sums are rounded so


def now(device):
    """Seconds; on a CPU of the process, which a busy machine does not stretch."""
    if device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def models(options):
    torch.manual_seed(0)
    heads = max(2, options.width // 64)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        initializer_range=0.08,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        num_labels=1,
    )
    classes = LlamaForCausalLM, LlamaForSequenceClassification
    kind = getattr(torch, options.dtype)
    return [c(config).to(options.device, kind).eval().requires_grad_(False) for c in classes]


def prompts_of(options):
    chance = random.Random(0)
    lengths = [chance.randint(8, options.longest) for _ in range(options.prompts)]
    return [[chance.randrange(1, VOCAB) for _ in range(length)] for length in lengths]


def padded(lm, prompts, options, settings):
    answers = []
    seeds = ops.split_seed(0, len(prompts))
    for first in range(0, len(prompts), options.batch):
        rows = prompts[first : first + options.batch]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = rgtg_fast.generate(
            lm,
            ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            seed=seeds[first : first + len(rows)],
            **settings,
        )
        answers += [cut(row, settings) for row in out[:, width:].tolist()]
    return answers


def cut(tokens, settings):
    ends = [i + 1 for i, token in enumerate(tokens) if token in settings["eos_token_id"]]
    return tokens[: min(ends, default=len(tokens))]


def many(lm, prompts, options, settings):
    answers = [None] * len(prompts)
    for answer in rgtg_fast.generate_many(
        lm, prompts, batch_size=options.batch, seed=0, **settings
    ):
        answers[answer.index] = answer.tokens
    return answers


def memory(run):
    """The reward model's cache over its live tokens while `run` runs: the mean, and peaks."""
    shares, sizes, needs = [], [], []
    advance = Refill.advance

    @functools.wraps(advance)
    def watched(self):
        (cache,) = self.call.scorer.caches
        tokens = sum(next(iter(cache.lengths.values())).tolist())
        of_one = sum(s.shape[0] * s.shape[1] * s.shape[3] * s.element_size() for s in cache.stores)
        sizes.append(cache.nbytes())
        needs.append(tokens * of_one)
        shares.append(sizes[-1] / needs[-1])
        return advance(self)

    Refill.advance = watched
    try:
        run()
    finally:
        Refill.advance = advance
    return statistics.mean(shares), max(sizes) / max(needs)


def differences(lm, prompts, answers, settings, count):
    """How many of the first answers are not those of their prompts alone; none may be without a
    near-tie."""
    ties = 0
    for i in range(min(count, len(prompts))):
        alone = functools.partial(
            rgtg_fast.generate,
            lm,
            torch.tensor([prompts[i]], device=lm.device),
            return_dict_in_generate=True,
            output_candidates=True,
            **settings,
        )
        out = alone(seed=ops.split_seed(0, i + 1)[i:])
        want = out.sequences[0, len(prompts[i]) :].tolist()
        if answers[i] != want:
            at = next(t for t, pair in enumerate(zip(answers[i], want)) if pair[0] != pair[1])  # noqa: B905
            tie = near_tie(out, at, i, answers[i][at]) or edge(lm, out, len(prompts[i]) + at)
            require(tie, f"prompt {i}, token {at}")
            ties += 1
    return ties


def near_tie(out, at, i, token):
    """Whether `token` would be chosen at a step if its score were larger by `NEAR`."""
    ids = out.candidate_ids[:, at]
    logprobs = out.candidate_logprobs[:, at] + NEAR * (ids == token)
    seed = ops.split_seed(0, i + 1)[i:].to(ids.device)
    rewards = out.candidate_rewards[:, at]
    slot, _ = ops.ratio_sample(logprobs, rewards, ids, 1.0, 1.0, seed, at, True)
    return int(ids[0, slot[0]]) == token


def edge(lm, out, length):
    """Whether the last candidate behind the first `length` tokens is hardly likelier than the next
    token, which then may stand in its place."""
    k = out.candidate_ids.shape[-1]
    logits = lm(out.sequences[:, :length]).logits[0, -1].float()
    *_, last, after = logits.topk(k + 1).values.tolist()
    return last - after < NEAR_EDGE


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--longest", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer at most")
    parser.add_argument(
        "--ends", type=float, default=0.02, help="share of the vocabulary that ends"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--alone", type=int, default=2000, help="answers compared one by one")
    parser.add_argument("--json", action="store_true", help="write bench/results/many.json")
    options = parser.parse_args(argv)
    lm, rm = models(options)
    prompts = prompts_of(options)
    ends = random.Random(1).sample(range(1, VOCAB), int(options.ends * VOCAB))
    settings = {"reward_model": rm, "k": 10, "beta": 1.0, "do_sample": True, "top_k": 0}
    settings |= {"max_new_tokens": options.new, "eos_token_id": ends, "pad_token_id": PAD}
    runs = {"padded": padded, "many": many}
    for run in runs.values():
        run(lm, prompts[: options.batch], options, settings)  # probes, kernels
    seconds = {name: [] for name in runs}
    answers = {}
    for _ in range(options.repeat):
        for name, run in runs.items():
            start = now(options.device)
            answers[name] = run(lm, prompts, options, settings)
            seconds[name].append(now(options.device) - start)
    mean, peak = memory(lambda: many(lm, prompts, options, settings))
    ties = differences(lm, prompts, answers["many"], settings, options.alone)
    tokens = sum(map(len, answers["many"]))
    least = {name: min(values) for name, values in seconds.items()}
    row = {
        "prompts": len(prompts),
        "tokens": tokens,
        "padded_s": least["padded"],
        "many_s": least["many"],
        "ratio": least["many"] / least["padded"],
        "cache_mean": mean,
        "cache_peak": peak,
        "compared": min(options.alone, len(prompts)),
        "near_ties": ties,
    }
    report("many", [row], options)


if __name__ == "__main__":
    main()
