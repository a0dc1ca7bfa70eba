"""Raw preference rows of any usual shape to `prompt`, `chosen`, `rejected` (text or token ids)."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class NamedSet:
    """A public preference set with the preprocessing that the paper's authors give it."""

    hub: str
    hub_config: str | None
    splits: dict[str, str]
    sizes: dict[str, int]
    convert: Callable[[Row], Row | None]
    min_answer_tokens: int
    first: int


def tldr_row(row: Row) -> Row | None:
    """A row of openai/summarize_from_feedback `comparisons`; None where there is no post."""
    post = row["info"]["post"]
    if post is None:
        return None
    choice = int(row["choice"])
    texts = [f" {summary['text'].lstrip()}" for summary in row["summaries"]]
    return {
        "prompt": f'Content: "{post}"\nSummary:',
        "chosen": texts[choice],
        "rejected": texts[1 - choice],
    }


def hh_row(row: Row) -> Row | None:
    """A row of Anthropic/hh-rlhf, split at the last `Assistant:`; the history is the rejected's."""
    marker = "\n\nAssistant:"
    parts = {}
    for side in ("chosen", "rejected"):
        history, found, answer = row[side].rpartition(marker)
        if not found:
            return None
        parts[side] = (history + found, answer)
    return {
        "prompt": parts["rejected"][0],
        "chosen": parts["chosen"][1],
        "rejected": parts["rejected"][1],
    }


NAMED = {
    # The authors close the quote around the post only, and put another after every prefix of the
    # summary: an artefact of one row per prefix, left out here. Pairs whose longer summary has 20
    # tokens or fewer are skipped, and training starts at prefixes of two tokens.
    "tldr": NamedSet(
        "openai/summarize_from_feedback",
        "comparisons",
        {"train": "train", "eval": "validation"},
        {"train": 8192, "eval": 128},
        tldr_row,
        min_answer_tokens=21,
        first=2,
    ),
    "hh": NamedSet(
        "Anthropic/hh-rlhf",
        None,
        {"train": "train", "eval": "test"},
        {"train": 2048, "eval": 32},
        hh_row,
        min_answer_tokens=1,
        first=1,
    ),
}


def load_rows(
    source: str | os.PathLike[str] | Iterable[Row], split: str = "train", seed: int = 0
) -> tuple[list[Row], NamedSet | None]:
    """Raw rows of a source, and the named set it belongs to, if any.

    `source` is a JSONL file, a folder written by `datasets.save_to_disk`, a dataset of the hub
    (`"owner/name"`), any iterable of rows (a `datasets.Dataset` too), or `"tldr"` / `"hh"`. The two
    named sets are drawn from the hub with the authors' sizes; `"tldr:rows.jsonl"` reads rows of the
    same schema from a file and takes them all. `split` is "train" or "eval".

    Raises `ValueError` for a source that is none of these, or a line that is no JSON object.
    """
    if not isinstance(source, (str, os.PathLike)):
        return [dict(row) for row in source], None
    text = os.fspath(source)
    name, _, path = text.partition(":")
    named = NAMED.get(name)
    if named is None:
        return _read(text, {"train": "train", "eval": "test"}[split]), None
    if path:
        raw = _read(path, named.splits[split])
    else:
        raw = _hub(named.hub, named.hub_config, named.splits[split])
        order = random.Random(seed).sample(range(len(raw)), min(len(raw), named.sizes[split]))
        raw = [raw[i] for i in order]
    rows = [named.convert(row) for row in raw]
    return [row for row in rows if row is not None], named


def _read(text: str, split: str) -> list[Row]:
    path = Path(text)
    if path.is_dir():
        return [dict(row) for row in _datasets().load_from_disk(text)]
    if path.is_file():
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{text} line {number} is not JSON ({error}); write one JSON object a line"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{text} line {number} is {type(row).__name__}; write an object with the keys "
                    "prompt, chosen and rejected"
                )
            rows.append(row)
        return rows
    if text.endswith((".jsonl", ".json")) or text.count("/") != 1:
        raise ValueError(
            f"no data at {text!r}; pass a JSONL file, a folder of datasets.save_to_disk, a dataset "
            f"name owner/name, or one of {', '.join(NAMED)}"
        )
    return _hub(text, None, split)


def _hub(name: str, config: str | None, split: str) -> list[Row]:
    return [dict(row) for row in _datasets().load_dataset(name, config, split=split)]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "this source needs the package datasets; pip install 'rgtg_fast[train]', or pass a "
            "JSONL file"
        ) from None
    return datasets


def normalise(row: Row, tokenizer: Any) -> Row:
    """A raw row as `prompt`, `chosen`, `rejected` texts, plus `templated` (it went through the chat
    template, whose special tokens are then in the text) and `margin` where there is one.

    Without `prompt` the common beginning of the two texts, cut back to a word boundary, or the
    common leading messages of two conversations, is the prompt.

    Raises `ValueError` naming the keys of a row that has no chosen and rejected.
    """
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(
            f"a preference row has the keys {sorted(row)}; it needs chosen and rejected, and "
            "prompt unless both begin with it"
        )
    extra = {"margin": float(row["margin"])} if row.get("margin") is not None else {}
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = _common_text(chosen, rejected)
        if isinstance(prompt, str):
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}
    if prompt is None:
        prompt, chosen, rejected = _common_messages(chosen, rejected)
    texts = _apply_template(tokenizer, prompt, (chosen, rejected))
    return {
        "prompt": texts[0],
        "chosen": texts[1],
        "rejected": texts[2],
        "templated": True,
        **extra,
    }


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of elements with which both begin."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    end = common_prefix(chosen, rejected)
    while end and not chosen[end - 1].isspace():
        end -= 1
    while end and chosen[end - 1] == " ":  # a space belongs to the word after it
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _common_messages(chosen: Sequence[Row], rejected: Sequence[Row]) -> tuple[Any, Any, Any]:
    same = common_prefix(chosen, rejected)
    return list(chosen[:same]), list(chosen[same:]), list(rejected[same:])


def _messages(value: Any, role: str) -> list[Row]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def _apply_template(tokenizer: Any, prompt: Any, answers: Sequence[Any]) -> list[str]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the rows are conversations (lists of messages) but the tokenizer has no chat "
            "template; set tokenizer.chat_template, or pass rows of plain text"
        )
    history = _messages(prompt, "user")
    start = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    texts = [start]
    for answer in answers:
        messages = history + _messages(answer, "assistant")
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        if not whole.startswith(start):
            raise ValueError(
                "the chat template does not put the answer behind the prompt with its generation "
                f"prompt: {start[-60:]!r} is not how {whole[:80]!r} begins; use a template that "
                "leaves the earlier turns as they are"
            )
        text = whole[len(start) :]
        eos = tokenizer.eos_token
        # Templates end a turn with EOS and a newline that no model generates.
        texts.append(text.rstrip() if eos and text.rstrip().endswith(eos) else text)
    return texts
