"""The engine "ray": a job's rows over the machines of a Ray cluster, each actor with its models.

Rows go out in parts of some batches; an actor that is lost (its process killed, its machine gone)
is begun again by Ray and its part answered anew. Seeds are those of the whole file, so no answer
depends on who gives it.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..evaluation import models
from . import JobFailed, hf, vllm_offline
from .rows import Row
from .settings import Job

logger = logging.getLogger(__name__)
_PARTS = 4  # of each actor's share: what is lost with an actor, and waits at the end, is small
_BATCHES = 8  # of a part at least, so that rows come and go in full batches
_INSIDE: dict[str, Callable[[Job], Any]] = {"hf": hf.Engine, "vllm": vllm_offline.Engine}
_TRIES = 3  # begins of an actor, and times that a part is given out; then it is not the machines


class Answerer:
    """An actor: the models of a job, loaded with its first part."""

    engine: Any = None  # a hf.Engine or vllm_offline.Engine

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        found: list[str] = []
        try:
            if self.engine is None:
                values = json.loads(part["job"])
                job = Job(**values | {"shard": tuple(values["shard"])})
                self.engine = _INSIDE[job.worker_engine](job)
            rows = [Row(**json.loads(text)) for text in part["row"]]
            found += map(json.dumps, self.engine.answers(rows))
        except (JobFailed, ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
            # Given, not raised: Ray would make pages of it, and lose the answers before it.
            return {"answer": found, "failed": str(error) or type(error).__name__}
        return {"answer": found, "failed": ""}


def answers(job: Job, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """As `hf.answers`, from `job.workers` actors: by default one for each GPU of the cluster, or
    one where it has none. The cluster is that of the environment variable RAY_ADDRESS, else one
    that is begun here for the time of the job.

    Raises `JobFailed` for what an actor cannot do, and where actors are lost again and again;
    `ImportError` where Ray is not installed.
    """
    ray = _ray()
    if job.worker_engine == "vllm":
        vllm_offline.check(job)
    hf.check_conversations(job, rows)
    own = not ray.is_initialized()
    if own:
        ray.init(logging_level=logging.WARNING, log_to_driver=False, include_dashboard=False)
    try:
        yield from _answered(ray, job, rows)
    finally:
        if own:
            ray.shutdown()


def _answered(ray: Any, job: Job, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    on_gpu = bool(gpus) and models.device_of(job.device).type != "cpu"
    workers = job.workers or (gpus if on_gpu else 1)
    size = max(1, min(_BATCHES * job.batch_size, math.ceil(len(rows) / (workers * _PARTS))))
    logger.info("%d actors, %d rows a part", workers, size)
    data: Any = importlib.import_module("ray.data")
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    # With each part, as what Ray holds of a constructor's arguments may be gone with its machine.
    of_job = json.dumps(asdict(job))
    texts = [{"job": of_job, "row": [json.dumps(vars(row)) for row in part]} for part in parts]
    found = data.from_items(texts, override_num_blocks=len(parts)).map(
        Answerer,
        compute=data.ActorPoolStrategy(size=workers),
        num_gpus=1 if on_gpu else None,
        num_cpus=None if on_gpu else 1,
        max_restarts=_TRIES,
        max_task_retries=_TRIES,
    )
    try:
        for row in found.iter_rows():
            yield from map(json.loads, row["answer"])
            if row["failed"]:
                raise JobFailed(" ".join(row["failed"].split()))
    except ray.exceptions.RayActorError as error:
        raise JobFailed(
            f"actors were lost {_TRIES} times ({str(error).splitlines()[0]}); look at the memory "
            "of their machines, or pass a smaller batch_size"
        ) from error


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(
            f"engine 'ray' needs Ray ({error}): pip install 'rgtg_fast[ray]'"
        ) from None
