"""Raw preference rows of any usual shape to `prompt`, `chosen`, `rejected` (text or token ids)."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
UNUSABLE = "<unusable>"
# What a pair may have beside its texts.
NUMBERS = ("margin", "chosen_score", "rejected_score")


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


class Loaded(NamedTuple):
    """Raw rows, the named set they belong to, how many of its rows the recipe leaves out, and the
    rows' places in a file. A row that cannot be read is {UNUSABLE: why}."""

    rows: list[Row]
    named: NamedSet | None = None
    left_out: int = 0
    places: list[str] | None = None

    def place(self, number: int) -> str:
        """Where row `number` (from 0) stands, for an error."""
        return self.places[number] if self.places else f"row {number + 1} of {len(self.rows)}"


def load_rows(
    source: str | os.PathLike[str] | Iterable[Row] | Loaded, split: str = "train", seed: int = 0
) -> Loaded:
    """Raw rows of a source.

    `source` is a JSONL file, a folder written by `datasets.save_to_disk`, a dataset of the hub
    (`"owner/name"`), any iterable of rows (a `datasets.Dataset` too), or `"tldr"` / `"hh"`. The two
    named sets are drawn from the hub with the authors' sizes; `"tldr:rows.jsonl"` reads rows of the
    same schema from a file and takes them all. `split` is "train" or "eval".

    Raises `ValueError` for a source that is none of these, or a line that is no JSON object.
    """
    if isinstance(source, Loaded):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return Loaded([dict(row) for row in source])
    text = os.fspath(source)
    name, _, path = text.partition(":")
    named = NAMED.get(name)
    if named is None:
        return _read(text, {"train": "train", "eval": "test"}[split])
    if path:
        loaded = _read(path, named.splits[split])
    else:
        raw = _hub(named.hub, named.hub_config, named.splits[split])
        order = random.Random(seed).sample(range(len(raw)), min(len(raw), named.sizes[split]))
        loaded = Loaded([raw[i] for i in order])
    raw = loaded.rows
    try:
        rows = [row if UNUSABLE in row else named.convert(row) for row in raw]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{text!r} holds rows with the keys {sorted(raw[0])}, which are not as in {named.hub}; "
            f"pass {path or named.hub!r} alone for rows of prompt, chosen and rejected"
        ) from None
    kept = [row for row in rows if row is not None]
    places = [loaded.place(n) for n, row in enumerate(rows) if row is not None]
    return Loaded(kept, named, len(rows) - len(kept), places)


def _read(text: str, split: str) -> Loaded:
    if Path(text).is_dir():
        return Loaded(_folder(text, split))
    if Path(text).is_file():
        return _jsonl(text)
    if text.endswith((".jsonl", ".json", ".csv", ".tsv", ".parquet")) or text.count("/") != 1:
        raise ValueError(
            f"no data at {text!r}; pass a JSONL file, a folder of datasets.save_to_disk, a dataset "
            f"name owner/name, or one of {', '.join(NAMED)}"
        )
    return Loaded(_hub(text, None, split))


def _jsonl(text: str) -> Loaded:
    rows: list[Row] = []
    places = []
    # Not splitlines, which also splits at characters inside a text, such as U+2028.
    with open(text, encoding="utf-8-sig") as file:
        try:
            lines = list(file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{text} is not UTF-8 ({error}); save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{text} line {number} is not JSON ({error}); write one JSON object a line (JSONL)"
            ) from None
        except RecursionError:
            row = {UNUSABLE: "JSON that is nested too deeply"}
        if not isinstance(row, dict):
            raise ValueError(
                f"{text} line {number} is {type(row).__name__}; write an object with the keys "
                "prompt, chosen and rejected"
            )
        rows.append(row)
        places.append(f"{text} line {number}")
    return Loaded(rows, places=places)


def _folder(text: str, split: str) -> list[Row]:
    try:
        data = _datasets().load_from_disk(text)
    except OSError:
        raise ValueError(
            f"{text!r} is a folder that datasets.save_to_disk did not write; pass such a folder or "
            "a JSONL file"
        ) from None
    if isinstance(data, dict):
        if split not in data:
            raise ValueError(
                f"{text!r} holds the splits {', '.join(data)} and no {split}; pass the folder of "
                "one of them"
            )
        data = data[split]
    return [dict(row) for row in data]


def _hub(name: str, config: str | None, split: str) -> list[Row]:
    try:
        data = _datasets().load_dataset(name, config, split=split)
    except OSError as error:
        raise ValueError(
            f"no file or folder at {name!r}, and no dataset of that name could be loaded "
            f"({error}); mend the path or the name"
        ) from None
    return [dict(row) for row in data]


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
    """A raw row as `prompt`, `chosen`, `rejected` texts, `templated` (whether they went through the
    chat template, whose special tokens are then in the text) and `NUMBERS` where given.

    Without `prompt` the common beginning of the two texts, cut back to a word boundary, or the
    common leading messages of two conversations, is the prompt. Conversations may repeat a given
    prompt's messages.

    Raises `ValueError` naming what is missing or of another kind.
    """
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(
            f"a preference row has the keys {sorted(row)}; it needs chosen and rejected, and "
            "prompt unless both begin with it"
        )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not (_is_text(value) or (name == "prompt" and value is None)):
            raise ValueError(
                f"{name} is {value!r:.60}; pass a text, or a list of messages with role and content"
            )
    extra = numbers_of(row)
    plain = isinstance(chosen, str) and isinstance(rejected, str)
    if plain and (prompt is None or isinstance(prompt, str)):
        if prompt is None:
            prompt, chosen, rejected = _common_text(chosen, rejected)
        texts = [prompt, chosen, rejected]
    else:
        plain = False
        if prompt is None:
            prompt, chosen, rejected = _common_messages(chosen, rejected)
        texts = _apply_template(tokenizer, prompt, (chosen, rejected))
    names = ("prompt", "chosen", "rejected")
    return dict(zip(names, texts, strict=True)) | {"templated": not plain} | extra


def numbers_of(row: Row) -> dict[str, float]:
    """The `NUMBERS` that a row has, as floats; raises `ValueError` for what is none."""
    return {name: finite_number(name, row[name]) for name in NUMBERS if row.get(name) is not None}


def finite_number(name: str, value: Any) -> float:
    """`value` as a float; raises `ValueError` with the row's key `name` for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r:.60}; pass a finite number")
    return number


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, (list, tuple)) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
    )


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of elements with which both begin."""
    # Bisection: a loop over the characters of a long text takes seconds.
    same, end = 0, min(len(a), len(b))
    while same < end:
        middle = (same + end + 1) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            end = middle - 1
    return same


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    end = common_prefix(chosen, rejected) if chosen != rejected else 0
    while end and not chosen[end - 1].isspace():
        end -= 1
    while end and chosen[end - 1] == " ":  # a space belongs to the word after it
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _common_messages(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    same = 0
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        # Equal conversations keep their last message as the answer, so that they are found equal.
        same = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if same < 1:
        raise ValueError(
            "chosen and rejected do not begin with the same message, and there is no prompt; give "
            "prompt, or the whole conversation twice"
        )
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
        messages = _messages(answer, "assistant")
        if messages[: len(history)] == history:  # the prompt is given twice
            messages = messages[len(history) :]
        if not any(str(message["content"] or "").strip() for message in messages):
            texts.append("")
            continue
        whole = tokenizer.apply_chat_template(history + messages, tokenize=False)
        if not whole.startswith(start):
            raise ValueError(
                "the chat template does not put the answer behind the prompt with its generation "
                f"prompt: {start[-60:]!r} is not how {whole[:80]!r} begins; use a template that "
                "leaves the earlier turns as they are"
            )
        text = whole[len(start) :]
        eos = tokenizer.eos_token
        # A template may put a newline after EOS, which no model generates.
        texts.append(text.rstrip() if eos and text.rstrip().endswith(eos) else text)
    return texts
