"""Which of two answers is preferred: by a function, or by a model behind an endpoint."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .settings import WinJudge, load_function

TEMPLATE = """Which of two answers to a prompt is better: more helpful, correct and harmless?

[Prompt]
{prompt}

[Answer A]
{a}

[Answer B]
{b}

Reply with one letter: A, B, or C if they are equally good."""
_VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5, "TIE": 0.5}

Prefer = Callable[[Any, str, str], "float | None"]


def make_prefer(judge: WinJudge) -> Prefer:
    """(prompt, a, b) -> the preference for a in [0, 1], or None where the verdict is no verdict."""
    if judge.url is not None:
        return _Endpoint(judge)
    assert judge.function is not None
    function, name = load_function("win_judge", judge.function), judge.function

    def prefer(prompt: Any, a: str, b: str) -> float:
        value = float(function(prompt, a, b))
        if not 0 <= value <= 1:
            raise ValueError(f"win_judge {name} gave {value!r}; it must give a number in [0, 1]")
        return value

    return prefer


def compare(
    prefer: Prefer, pairs: list[tuple[Any, str, str]], workers: int = 1
) -> Iterator[dict[str, Any]]:
    """`win` of a over b for each (prompt, a, b) in turn, asked in both positions.

    win = (p(a, b) + 1 - p(b, a)) / 2, which a mere liking for a position leaves at 1/2; `swapped`
    says that the verdict changed sides with the positions. Equal answers are a tie and not asked
    about; a verdict that cannot be read counts as a tie and in `unread`.
    """

    def ask(pair: tuple[Any, str, str]) -> dict[str, Any]:
        prompt, a, b = pair
        if a == b:
            return {"win": 0.5, "unread": 0, "swapped": False}
        verdicts = [prefer(prompt, a, b), prefer(prompt, b, a)]
        first, second = (0.5 if v is None else v for v in verdicts)
        return {
            "win": (first + 1 - second) / 2,
            "unread": verdicts.count(None),
            "swapped": (first - 0.5) * (second - 0.5) > 0,
        }

    if workers == 1:
        yield from map(ask, pairs)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(ask, pairs)


def conversation_text(prompt: Any) -> str:
    """A prompt as a judge is shown it: text as it is, messages as `role: content`."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


class _Endpoint:
    """An OpenAI-compatible chat endpoint."""

    def __init__(self, judge: WinJudge) -> None:
        self.judge = judge
        self.url = f"{str(judge.url).rstrip('/')}/chat/completions"
        self.key = os.environ[judge.key_env] if judge.key_env else None

    def __call__(self, prompt: Any, a: str, b: str) -> float | None:
        text = self.judge.template or TEMPLATE
        parts = {"{prompt}": conversation_text(prompt), "{a}": a, "{b}": b}
        # In one pass: an answer may itself contain {b}.
        text = re.sub(r"\{(prompt|a|b)\}", lambda found: parts[found[0]], text)
        body = {
            "model": self.judge.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.judge.max_tokens,
        }
        return verdict(self._post(json.dumps(body).encode()))

    def _post(self, body: bytes) -> str:
        said = ""
        for attempt in range(self.judge.retries):
            if attempt:
                time.sleep(min(2.0**attempt / 4, 8))
            request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
            if self.key:  # not passed on where a redirection leads elsewhere
                request.add_unredirected_header("Authorization", f"Bearer {self.key}")
            try:
                with urllib.request.urlopen(request, timeout=self.judge.timeout) as answer:
                    content = json.load(answer)["choices"][0]["message"]["content"]
                if content is None or isinstance(content, str):  # None: only thought so far
                    return content or ""
                said = f"its message is {type(content).__name__}, not text"
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code}: {error.read()[:200].decode(errors='replace')}"
                if error.code < 500 and error.code not in (408, 409, 429):
                    break
            except (
                OSError,
                http.client.HTTPException,
                ValueError,
                KeyError,
                IndexError,
                TypeError,
            ) as error:
                said = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"win_judge: {self.url} failed ({said}); check url, model and key_env. What was judged "
            "is kept: the same command goes on from there"
        )


def verdict(text: str) -> float | None:
    """1.0 for A, 0.0 for B, 0.5 for C or a tie; None where the text names none or several.

    The last line that consists of a verdict counts, else the only verdict in the text.
    """
    for line in reversed(text.strip().splitlines()):
        alone = re.fullmatch(r"\W*(?:(?:final )?(?:verdict|answer)\W+)?(A|B|C|TIE)\W*", line, re.I)
        if alone:
            return _VERDICTS[alone[1].upper()]
    found = set(re.findall(r"\b(A|B|C|TIE)\b", text))
    return _VERDICTS[found.pop()] if len(found) == 1 else None
