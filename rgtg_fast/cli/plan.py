"""`rgtg-fast plan`: what a pair of models needs and costs on a GPU, without loading weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from ..scorers.registry import HEAD_FILE
from .arguments import positive, whole
from .costs import (
    DEVICES,
    GB,
    KERNEL_SECONDS,
    KERNELS,
    REACHED,
    RESERVED,
    Device,
    Pair,
    Sized,
    sized,
)

HELP = "memory, rows that fit and ms per token of a pair of models on a GPU"
STOPPED = "Give the same command again"
EXAMPLE = "rgtg-fast plan --model lm --reward-model rm --gpu h200 --batch 1 8 32 --context 4096"
WAYS = ("classifier", "autoregressive", "head", "adapter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of the language model (its config)")
    add("--reward-model", help="folder or hub name of the reward; without it, plain generation")
    add("--reward-kind", choices=WAYS, help="what it is; by default what its files say")
    add("--k", type=whole(1, 64), default=10, help="candidates a step")
    add("--batch", type=whole(1), nargs="+", default=[1, 8, 32], help="rows at once")
    add("--context", type=whole(2), default=2048, help="tokens of prompt and answer")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    add("--gpu", choices=DEVICES, default="h200")
    add("--memory-gb", type=positive, help="instead of the GPU's")
    add("--bandwidth-gb-s", type=positive, help="instead of the GPU's")
    add("--tflops", type=positive, help="dense, of the type; instead of the GPU's 16-bit figure")
    add("--json", type=Path, help="write the figures here too")


def run(args: argparse.Namespace) -> None:
    device = device_of(args)
    pair, what = pair_of(args)
    report = figures(pair, args, device)
    report = {"reward": what, **report}
    show(report, args)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def device_of(args: argparse.Namespace) -> Device:
    """The device of the arguments; fp32 products run at half of the 16-bit figure (TF32)."""
    known = DEVICES[args.gpu]
    flops = known.flops / (2 if args.dtype == "float32" else 1)
    return Device(
        memory=known.memory if args.memory_gb is None else args.memory_gb * GB,
        bandwidth=known.bandwidth if args.bandwidth_gb_s is None else args.bandwidth_gb_s * GB,
        flops=flops if args.tflops is None else args.tflops * 1e12,
    )


def pair_of(args: argparse.Namespace) -> tuple[Pair, str | None]:
    """The pair of the arguments and what its reward is: one of `WAYS`, or None."""
    size = torch.finfo(getattr(torch, args.dtype)).bits // 8

    def sized_in_dtype(name: str, task: str, argument: str) -> Sized:
        return sized(empty_model(name, task, argument)).wider(size // 2)

    lm = sized_in_dtype(args.model, "CausalLM", "--model")
    name = args.reward_model
    if name is None:
        return Pair(lm, None, 1), None
    kind = args.reward_kind or kind_of(name)
    if kind == "head":
        return Pair(lm, None, args.k, extra=weights_in(name, (HEAD_FILE,), size)), kind
    if kind == "adapter":
        files = ("adapter_model.safetensors", "adapter_model.bin")
        return Pair(lm, None, args.k, extra=weights_in(name, files, size), caches=2), kind
    task = "CausalLM" if kind == "autoregressive" else "SequenceClassification"
    rm = sized_in_dtype(name, task, "--reward-model")
    return Pair(lm, rm, 1 if kind == "autoregressive" else args.k), kind


def kind_of(name: str) -> str:
    """What a reward's files say that it is."""
    if (Path(name) / "adapter_config.json").is_file():
        return "adapter"
    if (Path(name) / HEAD_FILE).is_file():
        return "head"
    config = configuration(name, "--reward-model")
    causal = any("CausalLM" in found for found in config.architectures or ())
    return "autoregressive" if causal else "classifier"


def configuration(name: str, argument: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{argument} {name!r} has no configuration ({why}); pass the folder of a model"
        ) from None


def empty_model(name: str, task: str, argument: str) -> Any:
    """A model without weights, on the meta device; in bf16, as experts run there in no other."""
    config = configuration(name, argument)
    if task == "SequenceClassification":
        config.num_labels = 1
    config.pad_token_id = None  # some models look for it among the ids, which meta tensors hide
    make = getattr(transformers, f"AutoModelFor{task}").from_config
    with torch.device("meta"):
        return make(config, dtype=torch.bfloat16).eval()


def weights_in(name: str, files: tuple[str, ...], size: int) -> int:
    """Bytes of what a head or an adapter adds, its numbers in `size` bytes each."""
    for file in files:
        path = Path(name) / file
        if path.suffix == ".safetensors" and path.is_file():
            from safetensors import safe_open

            with safe_open(str(path), "pt") as tensors:
                shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
            return size * sum(torch.Size(shape).numel() for shape in shapes)
        if path.is_file():
            return path.stat().st_size
    raise ValueError(f"--reward-model {name!r} has no {files[0]}; pass the folder that holds it")


def figures(pair: Pair, args: argparse.Namespace, device: Device) -> dict[str, Any]:
    """All that is shown, in bytes and milliseconds."""
    guided, most = args.reward_model is not None, pair.rows_that_fit(args.context, device)
    rows = []
    for batch in args.batch:
        plain = pair.plain_seconds(batch, args.context, device)
        step = pair.guided_seconds(batch, args.context, device) if guided else plain
        rows.append(
            {
                "batch": batch,
                "fits": batch <= most,
                "kv_bytes": batch * pair.row_bytes(args.context),
                "plain_ms": 1e3 * plain,
                "guided_ms": 1e3 * step,
                "over_plain": step / plain,
                "tokens_per_s": batch / step,
            }
        )
    return {
        "lm_bytes": pair.lm.nbytes,
        "reward_bytes": pair.weight_bytes() - pair.lm.nbytes,
        "row_bytes": pair.row_bytes(args.context),
        "rows_that_fit": most,
        "device": device._asdict(),
        "batches": rows,
    }


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    """The report as tables."""
    out = Console(highlight=False)
    memory = report["device"]["memory"]
    out.print(
        f"language model {report['lm_bytes'] / GB:.2f} GB, reward "
        f"({report['reward'] or 'none'}) {report['reward_bytes'] / GB:.2f} GB, keys and values of "
        f"a row of {args.context} tokens {report['row_bytes'] / GB:.3f} GB\n"
        f"rows that fit in {memory / GB:.0f} GB: {report['rows_that_fit']}"
    )
    table = Table("rows", "fits", "KV GB", "plain ms", "guided ms", "guided / plain", "tokens/s")
    for row in report["batches"]:
        table.add_row(
            str(row["batch"]),
            "yes" if row["fits"] else "no",
            f"{row['kv_bytes'] / GB:.2f}",
            f"{row['plain_ms']:.2f}",
            f"{row['guided_ms']:.2f}",
            f"{row['over_plain']:.2f}",
            f"{row['tokens_per_s']:.0f}",
        )
    out.print(table)
    out.print(
        "ms a token by the bytes that a step reads and the operations it makes; no run on a GPU "
        f"stands behind it. Assumed: {REACHED:.0%} of the bandwidth, {KERNELS} small kernels a "
        f"layer of {1e6 * KERNEL_SECONDS:.1f} µs in a graph, contexts full, every expert read, no "
        f"speculation, {RESERVED / GB:.1f} GB for CUDA. On a CPU: bench/README.md."
    )
