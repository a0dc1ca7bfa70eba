"""Command line: `python -m rgtg_fast demo | info | bench | train | eval | select-pairs`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from rgtg_fast.ops import BACKENDS, OPS


def _demo(args: argparse.Namespace) -> None:
    import torch

    from rgtg_fast.demo.run import run

    # The models are so small that threads cost more in waiting than they bring in work, several
    # times over on a busy machine.
    torch.set_num_threads(1)
    run(prompts=args.prompts, out=args.out, seed=args.seed, draw=not args.no_plot)


def _info(args: argparse.Namespace) -> None:
    import rgtg_fast

    rgtg_fast.show_config()


def _bench(args: argparse.Namespace) -> None:
    import torch

    if args.op:
        from . import microbench

        if args.threads:
            torch.set_num_threads(args.threads)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not microbench.run(args.op, args.backend, device, args.repeat, args.json):
            raise SystemExit("an implementation differs from the reference; it has no speed")
        return

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from rgtg_fast.demo.run import ASSETS
    from rgtg_fast.demo.speed import measure_speed

    lm_name = args.lm or str(ASSETS / "lm")
    rm_name = args.reward_model or str(ASSETS / "rm_partial")
    args.device = args.device or "cpu"
    lm = AutoModelForCausalLM.from_pretrained(lm_name).to(args.device).eval()
    rm = AutoModelForSequenceClassification.from_pretrained(rm_name).to(args.device).eval()
    ids = AutoTokenizer.from_pretrained(lm_name)(args.text, return_tensors="pt")["input_ids"]
    torch.manual_seed(args.seed)
    speed = measure_speed(
        lm, rm, [ids.to(args.device)] * 3, k=args.k, beta=args.beta, max_new_tokens=args.new_tokens
    )
    for name, rate in speed.items():
        print(f"{name:10} {1e3 / rate:9.2f} ms/token  {speed['plain'] / rate:6.2f} x plain")


def _by_config(args: argparse.Namespace) -> None:
    try:
        getattr(import_module(args.module), args.function)(args.config, args.overrides)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{args.command}: {error}") from None
    except KeyboardInterrupt as stop:
        print(f"\n{args.command}: {stop or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="python -m rgtg_fast", description="Reward-guided text generation, fast."
    )
    commands = top.add_subparsers(
        required=True, metavar="demo | info | bench | train | eval | select-pairs"
    )

    demo = commands.add_parser("demo", help="guide the embedded models and compare")
    demo.add_argument("--prompts", type=int, default=200, help="held-out prompts, 1 to 200")
    demo.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the files")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="versions and which backends work here")
    info.set_defaults(run=_info)

    bench = commands.add_parser(
        "bench",
        help="an op's kernels, or decoding: plain, guided and published, one prompt at a time",
    )
    bench.add_argument(
        "op", nargs="?", choices=OPS, help="measure this op in microseconds (default: decoding)"
    )
    bench.add_argument("--backend", choices=BACKENDS[1:], help="of the op (default: all there are)")
    bench.add_argument("--repeat", type=int, default=100, help="timed calls of the op's kernels")
    bench.add_argument("--threads", type=int, help="of torch, for the op's kernels")
    bench.add_argument("--json", type=Path, help="file for the op's raw figures")
    bench.add_argument("--lm", help="causal LM: folder or hub name (default: the embedded one)")
    bench.add_argument("--reward-model", help="one-label classifier with the LM's tokenizer")
    bench.add_argument(
        "--text", default="customer : my kettle leaks and it is one month old . agent :"
    )
    bench.add_argument("--new-tokens", type=int, default=64)
    bench.add_argument("--k", type=int, default=10)
    bench.add_argument("--beta", type=float, default=2.0)
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--device", help="default: for an op the GPU if there is one, else cpu")
    bench.set_defaults(run=_bench)

    for command, module, function, does, keys in (
        (
            "train",
            "training.run",
            "train",
            "train a reward model for partial sequences",
            "model, train, eval or hold_out, output_dir, loss_type, tokenizer, dtype, lora, "
            "frozen, l2, resume, overwrite, and every field of "
            "rgtg_fast.training.PrefixRewardConfig, which has those of "
            "transformers.TrainingArguments; an example is in help(rgtg_fast.training)",
        ),
        (
            "eval",
            "evaluation",
            "run",
            "compare ways to decode over a file of prompts",
            "see help(rgtg_fast.evaluation)",
        ),
        (
            "select-pairs",
            "training.experimental.select_pairs",
            "select_pairs",
            "of many unlabelled pairs, those most worth a label",
            "see help(rgtg_fast.training.experimental.select_pairs)",
        ),
    ):
        by_config = commands.add_parser(
            command, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog=f"Keys: {keys}."
        )
        by_config.add_argument("--config", type=Path, required=True, help="YAML file")
        by_config.add_argument(
            "overrides", nargs="*", metavar="key=value", help="instead of the file's"
        )
        by_config.set_defaults(
            run=_by_config, module=f"rgtg_fast.{module}", function=function, command=command
        )
    return top


def main(argv: list[str] | None = None) -> None:
    """Run one command; `argv` defaults to the process's own arguments."""
    args = parser().parse_args(argv)
    args.run(args)
