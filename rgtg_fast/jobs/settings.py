"""What a job is: the keys of its YAML file, which are the command's flags too."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..evaluation import models
from ..evaluation.rewards import check_preset, check_reward
from ..evaluation.settings import check_model
from ..generate import generate
from ..training.config_file import check_keys, typed

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_NEW_TOKENS = 128
# Of `generate`: what the job says otherwise, and what is an object that YAML cannot say.
_NOT_SAID = {"model", "inputs", "reward_model", "tokenizer", "seed", "kwargs", "max_length"}
_NOT_SAID |= {"reward_tokenizer", "reward_head", "reward_input_ids", "reward_attention_mask"}
_NOT_SAID |= {"streamer", "assistant_model", "beta_schedule"}


@dataclass(frozen=True)
class Job:
    """A job of `rgtg-fast generate`.

    Args:
        model: the language model, a folder or hub name.
        reward_model: what guides it; see `evaluation.rewards.check_reward`.
        input: JSONL file, `{"id": .., "prompt": text or messages}` a line; "-" is standard input.
        output: JSONL file; "-" is standard output. A shard's has its number in the name.
        tokenizer: of the language model, where its folder has none.
        preset: a name of `rgtg_fast.presets`, or a mapping of `name` and its options.
        batch_size: rows at a time; less where memory does not last.
        seed: split among the rows of the whole file, so that no shard or restart changes a row's.
        dtype: of all models: auto (as they are saved), float32, bfloat16 or float16.
        device: auto (a GPU where there is one, under torchrun the local rank's), cpu, cuda, ..
        reward_device: of the reward models, where it is another.
        device_map: for models larger than a GPU, instead of `device`: as in transformers, "auto" or
            a mapping of modules to devices; of the reward models too, without `reward_device`.
        shard: (i, n): rows i, i + n, i + 2n, ..; given as "i/n". Default: torchrun's rank.
        engine: one of `run.ENGINES`.
        workers: of the engine "ray": actors, each with the models (default: one for each GPU).
        worker_engine: of the engine "ray": what runs in an actor, hf or vllm.
        vllm: of the engine "vllm": engine arguments of `vllm.LLM` (tensor_parallel_size,
            max_model_len, ..), and `kv_gib` of the plug-in.
        report: a folder for the distribution of rewards, KL and lengths.
        inspect: an HTML file that shows the first answers token by token, see `rgtg_fast.inspect`;
            of the engine "hf".
        overwrite: begins anew where the output has lines.
        options: of `rgtg_fast.generate_many` (k, beta, do_sample, top_p, ..); they stand beside the
            other keys.
    """

    model: str
    reward_model: Any
    input: str
    output: str
    tokenizer: str | None = None
    preset: Any = None
    batch_size: int = 16
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    reward_device: str | None = None
    device_map: Any = None
    shard: tuple[int, int] = (0, 1)
    engine: str = "hf"
    workers: int = 0
    worker_engine: str = "hf"
    vllm: dict[str, Any] = field(default_factory=dict)
    report: str | None = None
    inspect: str | None = None
    overwrite: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path | None:
        """The output file, of the shard; None for standard output."""
        path, (i, n) = Path(self.output), self.shard
        if self.output == "-":
            return None
        return path if n == 1 else path.with_name(f"{path.stem}-{i:05d}-of-{n:05d}{path.suffix}")


FIELDS = {f.name: f for f in dataclasses.fields(Job) if f.name != "options"}
_OTHERS = ("reward_model", "preset", "device_map", "shard", "vllm")


def known_options() -> set[str]:
    """The options of a job that are `generate_many`'s."""
    own = set(inspect.signature(generate).parameters)
    return (own | {*GenerationConfig().to_dict(), "stop_strings"}) - _NOT_SAID


def check_settings(values: dict[str, Any], engines: tuple[str, ...]) -> Job:
    """A job from a mapping.

    Raises `ValueError` for unknown keys (naming the nearest known one), missing keys, values of the
    wrong kind or out of range, and models that are not there.
    """
    options = known_options()
    check_keys(values, [*FIELDS, *sorted(options)])
    missing = [n for n in ("model", "reward_model", "input", "output") if not values.get(n)]
    if missing:
        flag = f"--{missing[0].replace('_', '-')}"
        raise ValueError(f"{', '.join(missing)} is missing; pass {flag}, or {missing[0]}: in YAML")
    plain = {
        n: typed(n, v, FIELDS[n]) for n, v in values.items() if n in FIELDS and n not in _OTHERS
    }
    reward = check_reward(values["reward_model"])
    job = Job(
        **plain
        | {
            "reward_model": reward,
            "preset": values.get("preset") and check_preset(values["preset"], reward),
            "shard": _shard(values.get("shard")),
            "device": _device(plain.get("device", "auto")),
            "device_map": _device_map(values.get("device_map"), plain.get("device", "auto")),
            "vllm": _mapping("vllm", values.get("vllm")),
            "options": {"max_new_tokens": MAX_NEW_TOKENS}
            | {n: v for n, v in values.items() if n in options},
        }
    )
    _check(job, engines)
    return job


def _check(job: Job, engines: tuple[str, ...]) -> None:
    on_ray = job.engine == "ray"
    runs = job.worker_engine if on_ray else job.engine
    for name, said, fits, wanted in (
        ("workers", job.workers, on_ray and job.workers > 0, "engine=ray, at least 1"),
        ("worker_engine", job.worker_engine != "hf", on_ray, "engine=ray"),
        ("inspect", job.inspect, job.engine == "hf", "engine=hf"),
        ("vllm", job.vllm, runs == "vllm", "engine=vllm, or worker_engine=vllm"),
    ):
        if said and not fits:
            raise ValueError(f"{name}={getattr(job, name)!r} is of {wanted}; pass that, or drop it")
    if job.batch_size < 1:
        raise ValueError(f"batch_size={job.batch_size}; pass at least 1")
    for name, allowed in (
        ("dtype", DTYPES),
        ("engine", engines),
        ("worker_engine", [each for each in engines if each != "ray"]),
    ):
        if getattr(job, name) not in allowed:
            raise ValueError(f"{name}={getattr(job, name)!r}; pass one of {', '.join(allowed)}")
    models.device_of(job.device)
    models.device_of(job.reward_device or job.device)
    check_model("model", job.model)
    models.check_found("model", job.model)
    if job.output == "-" and job.report is not None:
        raise ValueError("report is of an output file; name one, or drop it")
    inside = job.path is not None and job.input != "-"
    if inside and os.path.realpath(job.path) == os.path.realpath(job.input):  # type: ignore[arg-type]
        raise ValueError(f"output={job.output!r} is the input; name another file")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}={value!r}; write a mapping")
    return value


def _shard(value: Any) -> tuple[int, int]:
    if value is None:
        of_torchrun = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        value = "0/1" if None in of_torchrun else "/".join(map(str, of_torchrun))
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value) if isinstance(value, str) else None
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 0 <= i < n:
        raise ValueError(f"shard={value!r}; write i/n, the first of four is 0/4 and the last 3/4")
    return i, n


def _device_map(value: Any, device: str) -> Any:
    if value is None:
        return None
    if not isinstance(value, (str, dict)) or not value:
        raise ValueError(
            f"device_map={value!r}; write auto, balanced, sequential or a mapping of modules to "
            "devices"
        )
    if device != "auto":
        raise ValueError(f"device={device!r} and device_map={value!r}; leave one of them out")
    return value


def _device(name: str) -> str:
    """Each process that torchrun starts on a machine has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    if name == "auto" and local is not None and models.device_of(name).type == "cuda":
        return f"cuda:{local}"
    return name
