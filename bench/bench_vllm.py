"""CPU seconds of vLLM, plain and guided, over the same prompts: `python bench/bench_vllm.py`.

Needs vLLM: `make test-vllm` makes an environment for it, .venv-vllm. A language model and a reward
model of Llama's shape, 124M each, with random weights in float32, the language model's candidates
sharpened to 0.8 nats; prompts of 64 tokens, 32 new ones, k = 10, the end of an answer ignored. CPU
time of the process on one thread, the least of the runs, which alternate.

The kinds: greedy; sampled with top_p = 0.95, and greedy with 4 tokens allowed, where candidates
that cannot be chosen are not scored. The floor is plain, and the reward model's layers over the
prompts and as many candidates as were scored, each step's in one plain forward.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from generate_models import build_models, sharpen

from rgtg_fast.cli.microbench import circumstances
from rgtg_fast.vllm import RewardGuided

RESULTS = Path(__file__).parent / "results" / "vllm.json"
PROMPT, NEW, K = 64, 32, 10
KINDS = {
    "greedy": {"temperature": 0.0},
    "top_p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "4 tokens allowed": {"temperature": 0.0, "allowed_token_ids": [11, 222, 3333, 44444]},
}


def folders(root):
    """Folders of the language model and the reward model, and the latter."""
    lm, rm = build_models("llama", PROMPT + NEW, torch.float32)
    sharpen(lm, K, 0.8)
    for name, model in (("lm", lm), ("rm", rm)):
        model.save_pretrained(f"{root}/{name}")
    return f"{root}/lm", f"{root}/rm", rm


def engine(lm, rm):
    """An engine, and the plug-in in it."""
    from vllm import LLM

    made, real = [], RewardGuided.__init__

    def noted(self, *args):
        made.append(self)
        real(self, *args)

    RewardGuided.__init__ = noted
    llm = LLM(
        lm,
        dtype="float32",
        max_model_len=PROMPT + NEW,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        logits_processors=["rgtg_fast.vllm:RewardGuided"],
        additional_config={"rgtg": {"reward_model": rm, "k": K, "guide": False}},
    )
    RewardGuided.__init__ = real
    return llm, made[0]


def once(llm, kind, batch, guided):
    """CPU seconds of answers to new prompts: nothing is found read."""
    from vllm import SamplingParams

    own = SamplingParams(
        max_tokens=NEW,
        ignore_eos=True,
        detokenize=False,
        extra_args={"rgtg": guided, "rgtg_seed": 1},
        **KINDS[kind],
    )
    ids = torch.randint(3, 50000, (batch, PROMPT)).tolist()
    begin = time.process_time()
    llm.generate([{"prompt_token_ids": row} for row in ids], own, use_tqdm=False)
    return time.process_time() - begin


@torch.no_grad()
def of_layers(rm, texts, length, repeat):
    """CPU seconds of the reward model over so many texts of so many tokens."""
    ids = torch.randint(3, 50000, (texts, length))
    best = float("inf")
    for _ in range(3 * repeat):
        begin = time.process_time()
        rm.model(ids, use_cache=False)
        best = min(best, time.process_time() - begin)
    return best


def measured(llm, plugin, rm, kind, batch, repeat):
    best, counts = {}, plugin.rows.counts
    for _ in range(repeat):
        for guided in (False, True):
            before = counts.scored
            took = once(llm, kind, batch, guided)
            best[guided] = min(took, best.get(guided, took))
            scored = (counts.scored - before) / NEW
    width = max(round(scored / batch), 1)
    floor = best[False] + of_layers(rm, batch, PROMPT, repeat)
    floor += NEW * of_layers(rm, batch, width, repeat)
    row = {
        "kind": kind,
        "batch": batch,
        "plain_s": best[False],
        "guided_s": best[True],
        "ratio": best[True] / best[False],
        "floor_ratio": floor / best[False],
        "scored_per_token": scored / batch,
    }
    print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--kind", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        lm, name, rm = folders(root)
        llm, plugin = engine(lm, name)
        rows = [
            measured(llm, plugin, rm, kind, batch, args.repeat)
            for batch in args.batch
            for kind in args.kind
        ]
    if args.json:
        record = {**circumstances(), "options": vars(args), "rows": rows}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
