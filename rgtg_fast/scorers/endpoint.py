"""Rewards by a server: texts are posted, scores come back."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from .http import Endpoint, Refused

_PAUSE = 0.1  # seconds before the second try; twice as much before each further one
LARGEST_BODY = 4 << 20  # bytes of a request


class RewardEndpoint:
    """A function `list[str] -> list[float]` that asks a server: `reward_model="http://..."`.

    It posts `{"query": [texts]}` and takes `{"rewards": [floats]}`, `{"scores": [floats]}` or a
    list of floats, as OpenRLHF's remote reward models do; another format is `body` and `scores`.

    Args:
        url: http:// or https://; redirections are not followed.
        batch_size: texts of one request, at most (fewer where they are longer than 4 MB).
        concurrency: requests at a time, at most: the rest of a step's wait for these.
        deadline: seconds that all requests of a step, their retries included, may take together.
        retries: further tries of a request that found no server, HTTP 408, 425, 429, 5xx, or no
            whole reply; after a pause that doubles each time, or that the server asks for
            (`Retry-After`). What it refuses otherwise is not asked again.
        key_env: the environment variable that holds the key, sent as a bearer token.
        body: texts -> what is posted as JSON.
        scores: the JSON that comes back, and the texts -> a list of floats.

    Raises `ValueError` where no scores have come within the deadline, a reply is larger than 8 MB,
    or it has another number of scores than there are texts; nothing of a call goes on after it.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 64,
        concurrency: int = 4,
        deadline: float = 60.0,
        retries: int = 3,
        key_env: str | None = None,
        body: Callable[[list[str]], Any] = lambda texts: {"query": texts},
        scores: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(url, str) or not re.match(r"https?://[^/\s]", url):
            raise ValueError(
                f"reward_model={url!r}; pass the http:// or https:// URL of a server, or a model "
                "(AutoModelForSequenceClassification.from_pretrained(...) of a path)"
            )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}; pass an int >= {least}")
        if isinstance(deadline, bool) or not 0 < deadline < float("inf"):
            raise ValueError(f"deadline={deadline!r}; pass seconds > 0")
        if key_env is not None and key_env not in os.environ:
            raise ValueError(f"key_env={key_env!r} is no environment variable; export it")
        self.url, self.batch_size, self.concurrency = url, batch_size, concurrency
        self.deadline, self.retries, self.key_env = deadline, retries, key_env
        self.body, self.scores = body, scores or _plain_scores

    def __call__(self, texts: list[str]) -> list[float]:
        key = os.environ[self.key_env] if self.key_env else None
        endpoint = Endpoint(self.url, key, self.key_env)
        ends = time.monotonic() + self.deadline
        batches = list(self._batches(texts))
        if len(batches) == 1:  # also for an interrupt: it ends a request of this thread at once
            return self._ask(endpoint, *batches[0], ends)
        pool = ThreadPoolExecutor(min(self.concurrency, len(batches)), "rgtg_fast-reward")
        try:
            asked = [pool.submit(self._ask, endpoint, *batch, ends) for batch in batches]
            wait(asked, return_when=FIRST_EXCEPTION)
            failed = next((f for f in asked if f.done() and f.exception() is not None), None)
            if failed is not None:
                failed.result()
            return [score for future in asked for score in future.result()]
        finally:
            endpoint.close()
            pool.shutdown(cancel_futures=True)

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[str], bytes]]:
        """The texts in runs that are one request each, with the body of each."""
        waiting = [
            list(texts[i : i + self.batch_size]) for i in range(0, len(texts), self.batch_size)
        ]
        while waiting:
            batch = waiting.pop(0)
            body = json.dumps(self.body(batch)).encode()
            if len(body) <= LARGEST_BODY:
                yield batch, body
            elif len(batch) > 1:
                half = len(batch) // 2
                waiting[:0] = [batch[:half], batch[half:]]
            else:
                raise ValueError(
                    f"reward_model {self.url}: a text makes a request of {len(body)} bytes, "
                    f"and {LARGEST_BODY} are the most; pass shorter prompts"
                )

    def _ask(self, endpoint: Endpoint, texts: list[str], body: bytes, ends: float) -> list[float]:
        """The scores of one request's texts; `ends` is the time at which there must be some."""
        said = "its deadline has passed before it was asked"
        for attempt in range(self.retries + 1):
            left = ends - time.monotonic()
            if left <= 0 or endpoint.closed.is_set():
                break
            try:
                return self._scores(endpoint.post(body, left), len(texts))
            except Refused as error:
                said = str(error)
                if not error.again:
                    break
                # Not all at once, which is what the server cannot take.
                pause = _PAUSE * 2.0**attempt * random.uniform(0.5, 1.0)
                pause = max(pause, error.after or 0.0)
                if attempt == self.retries or pause >= ends - time.monotonic():
                    break
                endpoint.closed.wait(pause)
        raise ValueError(
            f"reward_model {self.url} gave no scores within {self.deadline:g} s and "
            f"{self.retries} retries ({said}); check the server, or pass "
            "reward_model=rgtg_fast.RewardEndpoint(url, deadline=..., retries=...)"
        )

    def _scores(self, reply: Any, count: int) -> list[float]:
        try:
            given = self.scores(reply)
            scores = [_number(score) for score in given]
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise Refused(
                f"its reply has no list of scores ({type(error).__name__}: {error}); it must be "
                '{"rewards": [floats]}, or pass scores= for another format',
                again=False,
            ) from None
        if len(scores) != count:
            raise Refused(f"it gave {len(scores)} scores for {count} texts", again=False)
        return scores


def _plain_scores(reply: Any) -> Any:
    """The scores of a reply: a list, or under "rewards" or "scores"."""
    if isinstance(reply, dict):
        return reply["rewards" if "rewards" in reply or "scores" not in reply else "scores"]
    if not isinstance(reply, list):
        raise TypeError(f"a JSON {type(reply).__name__}")
    return reply


def _number(score: Any) -> float:
    while isinstance(score, list) and len(score) == 1:  # [[0.3], [0.1]] is [0.3, 0.1]
        score = score[0]
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise TypeError(f"a score is {type(score).__name__}")
    return float(score)
