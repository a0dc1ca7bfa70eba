"""A `rgtg-fast serve` of one's own, and many clients of it at a time, of all kinds."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
import psutil

STARTS, ENDS, ANSWERS = 1200.0, 60.0, 600.0  # seconds to wait for each, at most


@dataclass
class Server:
    """A server that runs; its figures are of all its processes."""

    url: str
    log: Path
    mark: str

    def processes(self) -> list[psutil.Process]:
        """Those that live, whoever their parent is by now."""
        found = []
        for each in psutil.process_iter():
            with suppress(psutil.Error):
                if each.environ().get("RGTG_SERVER") == self.mark:
                    found.append(each)
        return found

    def cpu_seconds(self) -> float:
        times = [each.cpu_times() for each in self.processes()]
        return sum(each.user + each.system for each in times)

    def rss_mib(self) -> float:
        return sum(each.memory_info().rss for each in self.processes()) / 2**20

    def healthy(self) -> bool:
        with suppress(OSError):
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        return False

    def at_work(self) -> int:
        """How many requests run or wait."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=ANSWERS) as reply:
            lines = reply.read().decode().splitlines()
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        found = [float(line.split()[-1]) for line in lines if line.startswith(names)]
        assert len(found) == 2, "the engine names its metrics otherwise"
        return int(sum(found))


@contextmanager
def serving(lm: str, reward: list[str], of_vllm: list[str], log: Path) -> Iterator[Server]:
    """`rgtg-fast serve` on a free port, until the end; `RuntimeError` with its log where it does
    not start. No process of it is left behind."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
    command = [sys.executable, "-m", "rgtg_fast", "serve", lm, *reward, "--vllm"]
    command += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "guided"]
    server = Server(f"http://127.0.0.1:{port}", log, uuid.uuid4().hex)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "RGTG_SERVER": server.mark}
    # GiB. Without it vLLM takes most of the memory, and does not start where others have some.
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with log.open("w") as out:
        process = subprocess.Popen(command + of_vllm, stdout=out, stderr=out, env=environment)
    try:
        end = time.monotonic() + STARTS
        while not server.healthy():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server does not start: {log.read_text()[-20000:]}")
            time.sleep(0.5)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDS)
        left = server.processes()
        for each in left:
            with suppress(psutil.Error):
                each.kill()
        psutil.wait_procs(left, ENDS)
        process.wait(ENDS)


@dataclass(frozen=True)
class Ask:
    """What a client asks for. `leaves_after`: it hangs up after so many parts of a stream."""

    prompt: tuple[int, ...]
    steps: int
    seed: int | None
    sampled: bool
    options: tuple[tuple[str, Any], ...]  # of `vllm_xargs`
    stream: bool = False
    leaves_after: int | None = None

    @property
    def guided(self) -> bool:
        return ("rgtg", 0) not in self.options

    @property
    def repeatable(self) -> bool:
        """Whether the answer is the same each time."""
        return not self.sampled or (self.guided and self.seed is not None)

    def body(self, ignore_eos: bool) -> dict[str, Any]:
        extra = {"vllm_xargs": dict(self.options), "return_token_ids": True}
        return {
            "model": "guided",
            "prompt": list(self.prompt),
            "max_tokens": self.steps,
            "temperature": float(self.sampled),
            "seed": self.seed,
            "stream": self.stream,
            "extra_body": extra | {"ignore_eos": ignore_eos},
        }


def drawn(draw: random.Random, vocabulary: int, guided: float, longest: int = 48) -> Ask:
    """A request, with the given probability a guided one."""
    options: dict[str, Any] = {"rgtg": 0}
    if draw.random() < guided:
        options = {"rgtg_beta": draw.choice([0.0, 0.5, 1.0, 4.0]), "rgtg_k": draw.randint(1, 12)}
    sampled = draw.random() < 0.7
    return Ask(
        prompt=tuple(draw.randrange(3, vocabulary) for _ in range(draw.randint(1, 64))),
        steps=draw.randint(4, longest),
        seed=draw.randrange(2**40) if sampled and draw.random() < 0.7 else None,
        sampled=sampled,
        options=tuple(options.items()),
    )


@dataclass
class Load:
    """What clients asked for and got."""

    vocabulary: int
    guided: float  # the share of it
    ignore_eos: bool = True
    longest: int = 48  # new tokens, at most
    # Requests that come again and again, half of all; what each got first, or is to get.
    pool: list[Ask] = field(default_factory=list)
    known: dict[Ask, list[int]] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    tokens: int = 0
    hung_up: int = 0
    wrong: list[tuple[Ask, list[int]]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    async def run(self, url: str, clients: int, seconds: float, seed: int) -> float:
        """So many clients, each with one request after the other; the seconds it took."""
        begin = time.monotonic()
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=ANSWERS
        ) as api:
            own = [random.Random(f"{seed} {i}") for i in range(clients)]
            await asyncio.gather(*(self._client(api, draw, begin + seconds) for draw in own))
        return time.monotonic() - begin

    async def _client(self, api: Any, draw: random.Random, end: float) -> None:
        while time.monotonic() < end:
            if self.pool and draw.random() < 0.5:
                ask = draw.choice(self.pool)
            else:
                ask = drawn(draw, self.vocabulary, self.guided, self.longest)
            stream = draw.random() < 0.4
            leaves = draw.randint(1, 4) if stream and draw.random() < 0.25 else None
            begin = time.monotonic()
            try:
                got = await self._asked(api, replace(ask, stream=stream, leaves_after=leaves))
            except openai.OpenAIError as error:
                self.errors.append(repr(error))
                continue
            self.tokens += len(got)
            if leaves is not None and len(got) < ask.steps:
                self.hung_up += 1
                got, want = got, self.known.get(ask, got)[: len(got)]
            else:
                self.latencies.append(time.monotonic() - begin)
                want = self.known.setdefault(ask, got) if ask in self.pool else got
            if ask.repeatable and got != want:
                self.wrong.append((ask, got))

    async def _asked(self, api: Any, ask: Ask) -> list[int]:
        made = await api.completions.create(**ask.body(self.ignore_eos))
        if not ask.stream:
            return list(made.choices[0].token_ids)
        tokens: list[int] = []
        parts = 0
        async with made:
            async for part in made:
                tokens += [token for choice in part.choices for token in choice.token_ids]
                parts += 1
                if parts == ask.leaves_after:
                    break
        return tokens
