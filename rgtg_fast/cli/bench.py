"""`rgtg-fast bench`: an op's kernels, or decoding."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from rgtg_fast.ops import BACKENDS, OPS

from .arguments import device, finite, whole

HELP = "an op's kernels, or decoding: plain, guided and published, one prompt at a time"
EXAMPLE = "rgtg-fast bench topk_logprobs --backend cpp --json topk.json"
STOPPED = "Nothing is kept; give the same command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "op", nargs="?", choices=OPS, help="measure this op in microseconds (default: decoding)"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS[1:], help="of the op (default: all there are)"
    )
    parser.add_argument(
        "--repeat", type=whole(2), default=100, help="timed calls of the op's kernels"
    )
    parser.add_argument(
        "--cases", type=whole(1), help="of the op, the first so many (default: all)"
    )
    parser.add_argument("--threads", type=whole(1), help="of torch, for the op's kernels")
    parser.add_argument("--json", type=Path, help="file for the op's raw figures")
    parser.add_argument("--lm", help="causal LM: folder or hub name (default: the embedded one)")
    parser.add_argument("--reward-model", help="one-label classifier with the LM's tokenizer")
    parser.add_argument(
        "--text", default="customer : my kettle leaks and it is one month old . agent :"
    )
    parser.add_argument("--new-tokens", type=whole(1), default=64)
    parser.add_argument("--k", type=whole(1, 64), default=10)
    parser.add_argument("--beta", type=finite, default=2.0)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument(
        "--device", type=device, help="default: for an op the GPU if there is one, else cpu"
    )


def run(args: argparse.Namespace) -> None:
    if args.op:
        _kernels(args)
    else:
        _decoding(args)


def _kernels(args: argparse.Namespace) -> None:
    from . import microbench

    if args.json is not None and (args.json.is_dir() or args.json.parent.is_file()):
        raise ValueError(f"--json={str(args.json)!r}: name a file, in a folder")
    if args.threads:
        torch.set_num_threads(args.threads)
    place = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        torch.cuda.set_device(place.index or 0)
    ran = microbench.run(
        args.op, args.backend, place.type, args.repeat, args.json, cases=args.cases
    )
    if not ran:
        raise SystemExit("an implementation differs from the reference; it has no speed")


def _decoding(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from rgtg_fast.demo.run import ASSETS
    from rgtg_fast.demo.speed import measure_speed
    from rgtg_fast.evaluation.prompts import Prompt, check_lengths
    from rgtg_fast.training.settings import load_pretrained

    disable_progress_bar()  # of weight loading
    if args.lm and not args.reward_model:
        raise ValueError("--lm without --reward-model: the embedded one knows no other vocabulary")
    lm_name = args.lm or str(ASSETS / "lm")
    rm_name = args.reward_model or str(ASSETS / "rm_partial")
    tokenizer: Any = load_pretrained(AutoTokenizer, "--lm", lm_name)
    lm = load_pretrained(AutoModelForCausalLM, "--lm", lm_name)
    rm = load_pretrained(AutoModelForSequenceClassification, "--reward-model", rm_name)
    place = args.device or "cpu"
    ids = tokenizer(args.text, return_tensors="pt")["input_ids"].long().to(place)
    if ids.shape[1] == 0:
        raise ValueError(f"--text={args.text!r} has no tokens; pass a text")
    prompt = Prompt(args.text, args.text, ids[0].tolist())
    check_lengths([prompt], lm.config, args.new_tokens)
    torch.manual_seed(args.seed)
    speed = measure_speed(
        lm.to(place).eval(),
        rm.to(place).eval(),
        [ids] * 3,
        k=args.k,
        beta=args.beta,
        max_new_tokens=args.new_tokens,
    )
    for name, rate in speed.items():
        print(f"{name:10} {1e3 / rate:9.2f} ms/token  {speed['plain'] / rate:6.2f} x plain")
