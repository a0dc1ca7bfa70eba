"""Which of two answers is preferred: by a function, or by a model behind an endpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..scorers.http import Endpoint, Refused
from .settings import WinJudge, load_function

TEMPLATE = """Which of two answers to a prompt is better: more helpful, correct and harmless?

[Prompt]
{prompt}

[Answer A]
{a}

[Answer B]
{b}

Reply with one letter: A, B, or C if they are equally good."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds; each pause is twice the one before
_VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5, "TIE": 0.5}

Prefer = Callable[[Any, str, str], "float | None"]


def make_prefer(judge: WinJudge) -> Prefer:
    """(prompt, a, b) -> the preference for a in [0, 1], or None where the verdict is no verdict."""
    if judge.url is not None:
        return ChatJudge(judge)
    assert judge.function is not None
    function, name = load_function("win_judge", judge.function), judge.function

    def prefer(prompt: Any, a: str, b: str) -> float:
        value = function(prompt, a, b)
        try:
            if 0 <= (number := float(value)) <= 1:
                return number
        except (TypeError, ValueError):
            pass
        raise ValueError(f"win_judge {name} gave {value!r}; it must give a number in [0, 1]")

    return prefer


def compare(
    prefer: Prefer, pairs: list[tuple[Any, str, str]], workers: int = 1
) -> Iterator[dict[str, Any]]:
    """`win` of a over b for each (prompt, a, b) in turn, asked in both positions.

    win = (p(a, b) + 1 - p(b, a)) / 2: a judge that only prefers a position gives 1/2. `swapped`
    says that the verdict went with the position and not with the answer. Equal answers are a tie
    and not asked about; a verdict that cannot be read counts as a tie and in `unread`.
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
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(ask, pairs)
    finally:  # not `with`, which after an error would wait for all pending replies
        pool.shutdown(wait=False, cancel_futures=True)


def conversation_text(prompt: Any) -> str:
    """A prompt as a judge is shown it: text as it is, messages as `role: content`."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


class ChatJudge:
    """A model behind an OpenAI-compatible chat endpoint."""

    def __init__(self, judge: WinJudge) -> None:
        self.judge = judge
        key = os.environ[judge.key_env] if judge.key_env else None
        url = f"{str(judge.url).rstrip('/')}/chat/completions"
        self.endpoint = Endpoint(url, key, judge.key_env)

    def __call__(self, prompt: Any, a: str, b: str) -> float | None:
        text = self.judge.template or TEMPLATE
        parts = {"{prompt}": conversation_text(prompt), "{a}": a, "{b}": b}
        # All in one pass: an answer may contain "{b}" itself.
        text = re.sub(r"\{(prompt|a|b)\}", lambda found: parts[found[0]], text)
        return verdict(self._ask(text))

    def close(self) -> None:
        """Break off the questions of other threads."""
        self.endpoint.close()

    def _ask(self, text: str) -> str:
        body = {
            "model": self.judge.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.judge.max_tokens,
        }
        said = ""
        for attempt in range(self.judge.retries):
            pause = min(FIRST_PAUSE * 2.0 ** (attempt - 1), LONGEST_PAUSE)
            if attempt and self.endpoint.closed.wait(pause):
                break
            try:
                return _content(self.endpoint.post(json.dumps(body).encode(), self.judge.timeout))
            except Refused as error:
                said = str(error)
                if not error.again:
                    break
        raise ValueError(
            f"win_judge: {self.endpoint.url} failed ({said}); check url, model and key_env. What "
            "was judged is kept: the same command goes on from there"
        )


def _content(reply: Any) -> str:
    try:
        content = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        raise Refused("its reply has no choices[0].message.content") from None
    if content is None or isinstance(content, str):  # None: max_tokens went into reasoning
        return content or ""
    raise Refused(f"its message is {type(content).__name__}, not text")


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
