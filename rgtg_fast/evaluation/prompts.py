"""The prompts file: read, rendered, tokenised, before any model is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt as the file has it (text or messages), as text and as token ids."""

    source: Any
    text: str
    ids: list[int]


def load_prompts(path: str, tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    """Prompts of a JSONL file, one object with `prompt` a line.

    A `prompt` is a text, or a list of messages {role, content}, which goes through the tokenizer's
    chat template with its generation prompt. Raises `ValueError` naming the line of one that is
    neither, is empty, or has no tokens.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"prompts: no file at {path!r}; pass a JSONL file")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it so") from None
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit is not None and len(prompts) == limit:
            break
        prompts.append(_prompt(line, tokenizer, f"{path} line {number}"))
    if not prompts:
        raise ValueError(f'{path} has no prompts; write one {{"prompt": ...}} a line')
    return prompts


def _prompt(line: str, tokenizer: Any, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); write one JSON object a line") from None
    return prompt_of(row.get("prompt") if isinstance(row, dict) else None, tokenizer, where)


def prompt_of(source: Any, tokenizer: Any, where: str) -> Prompt:
    """The prompt of a text or messages. Raises `ValueError`, naming `where`, as `load_prompts`."""
    if re.search("[\ud800-\udfff]", json.dumps(source, ensure_ascii=False)):
        raise ValueError(
            f"{where}: the prompt has half of a surrogate pair, which is no character; write the "
            "character itself, or both halves"
        )
    if isinstance(source, str):
        text, ids = source, tokenizer(source)["input_ids"]
    elif is_conversation(source):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{where} is a conversation but the tokenizer has no chat template; pass "
                "tokenizer: with one, or prompts of plain text"
            )
        try:
            text = tokenizer.apply_chat_template(source, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"{where}: the chat template refuses it ({error})") from None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        raise ValueError(
            f"{where} has no prompt that is a text or a list of {{role, content}} messages"
        )
    if not ids:
        raise ValueError(f"{where}: the prompt is empty; there is nothing to answer")
    return Prompt(source, text, list(ids))


def is_conversation(value: Any) -> bool:
    """Whether a prompt is a list of messages {role, content}."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    )


def check_lengths(prompts: list[Prompt], config: Any, max_new_tokens: int) -> None:
    """Raises `ValueError` for a prompt that leaves no room for the answer in the model."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    n = len(prompts[longest].ids)
    if n + max_new_tokens > limit:
        ways = f"max_new_tokens<={limit - n} or shorter prompts" if n < limit else "shorter prompts"
        raise ValueError(
            f"prompt {longest + 1} has {n} tokens and max_new_tokens={max_new_tokens} makes "
            f"{n + max_new_tokens}, but the model has {limit} positions; pass {ways}"
        )
