"""Tokenised preference pairs and labelled texts, checked, counted and never silently dropped."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.utils.data import Dataset

from .formats import Row, common_prefix, load_rows, normalise

OVERLONG = ("truncate", "drop", "error")
EOS_RULES = ("append", "keep")
INVALID = ("error", "drop")


@dataclass
class DataReport:
    """What became of the rows of a source, counted."""

    rows: int = 0
    kept: int = 0
    overlong: int = 0
    truncated_answers: int = 0
    dropped_overlong: int = 0
    dropped_short: int = 0
    dropped_invalid: int = 0
    dropped_leaks: int = 0
    duplicates: int = 0
    invalid: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {k: v for k, v in asdict(self).items() if v and k not in ("rows", "kept")}
        said = "".join(f", {k.replace('_', ' ')} {v}" for k, v in counts.items())
        return f"{self.kept} of {self.rows} rows kept{said}"


class _Rows(Dataset):
    rows: list[Row]
    report: DataReport

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and longest answer."""
        return [
            len(row["prompt_ids"])
            + max(len(row[k]) for k in ("chosen_ids", "rejected_ids", "answer_ids") if k in row)
            for row in self.rows
        ]


class PreferenceDataset(_Rows):
    """Pairs as token ids: `prompt_ids`, `chosen_ids`, `rejected_ids` (lists) and, given, `margin`.

    Rows may be `{prompt, chosen, rejected}` texts, `{chosen, rejected}` that share their beginning,
    conversations (through the tokenizer's chat template), or ready `{prompt_ids, chosen_ids,
    rejected_ids}`, which are taken as they are; without `prompt_ids` the tokens with which both
    begin are the prompt. For `source` see `load_rows`. `sources[n]` is row n's place there.

    EOS stands at the true end of an answer only, never behind a prefix: `eos="append"` puts it
    behind answers that lack it, `eos="keep"` adds none; an answer cut at `max_length` gets none.

    Args:
        max_length: tokens of prompt + answer; None for no limit.
        overlong: what to do with longer rows: "truncate" their answers on the right, "drop" the
            row, or "error". The report counts them in each case.
        invalid: "error" (with counts), or "drop", for rows with an empty prompt or answer, for
            equal pairs, and for pairs that the cut at `max_length` made equal or empty.
        min_answer_tokens: rows whose longer answer is shorter are dropped and counted.

    Raises:
        ValueError: for unknown options, rows of another shape, or bad rows; says how many, and the
            way out.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[Row],
        tokenizer: Any = None,
        *,
        split: str = "train",
        max_length: int | None = 512,
        overlong: str = "truncate",
        invalid: str = "error",
        eos: str = "append",
        min_answer_tokens: int = 1,
        seed: int = 0,
    ) -> None:
        _check_option("overlong", overlong, OVERLONG)
        _check_option("invalid", invalid, INVALID)
        _check_option("eos", eos, EOS_RULES)
        raw, named = load_rows(source, split, seed)
        if named is not None:
            min_answer_tokens = max(min_answer_tokens, named.min_answer_tokens)
        self.report = DataReport(rows=len(raw))
        encoded = encode_pairs(raw, tokenizer, eos)
        rows: list[Row] = []
        self.sources: list[int] = []
        bad: dict[str, int] = {}
        for source_row, row in enumerate(encoded):
            reason = _invalid_reason(row)
            if reason is None and not self._fits(row, min_answer_tokens, max_length, overlong):
                continue
            if reason is None and row.pop("cut", False):
                reason = _invalid_reason(row)
                reason = reason and f"{reason} after the cut at max_length"
            if reason is None:
                rows.append(row)
                self.sources.append(source_row)
            else:
                bad[reason] = bad.get(reason, 0) + 1
        self._settle_bad(bad, invalid, overlong, max_length)
        self.rows = rows
        self.report.kept = len(rows)
        self.report.duplicates = len(rows) - len({pair_key(row) for row in rows})
        if not rows:
            raise ValueError(f"no pair is left to use ({self.report}); check the source")

    def _fits(self, row: Row, least: int, limit: int | None, overlong: str) -> bool:
        """Whether the row stays; cuts its answers where asked."""
        if max(len(row["chosen_ids"]), len(row["rejected_ids"])) < least:
            self.report.dropped_short += 1
            return False
        room = None if limit is None else limit - len(row["prompt_ids"])
        longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        if room is None or longest <= room:
            return True
        self.report.overlong += 1
        if overlong == "drop":
            self.report.dropped_overlong += 1
            return False
        for side in ("chosen_ids", "rejected_ids"):
            if len(row[side]) > room:
                row[side] = row[side][: max(room, 0)]
                self.report.truncated_answers += 1
        row["cut"] = True
        return True

    def _settle_bad(
        self, bad: dict[str, int], invalid: str, overlong: str, max_length: int | None
    ) -> None:
        self.report.invalid = bad
        self.report.dropped_invalid = sum(bad.values())
        if overlong == "error" and self.report.overlong:
            raise ValueError(
                f"{self.report.overlong} of {self.report.rows} rows are longer than "
                f"max_length={max_length}; raise max_length, or pass overlong='truncate' or 'drop'"
            )
        if bad and invalid == "error":
            counts = ", ".join(f"{n} with {reason}" for reason, n in bad.items())
            raise ValueError(
                f"of {self.report.rows} rows there are {counts}; mend them, or pass "
                "invalid='drop' to leave them out"
                + (" (overlong='drop' leaves out those that were cut)" if "cut" in counts else "")
            )


class LabelledDataset(_Rows):
    """Texts with a label in [0, 1] (RAD's data): `prompt_ids`, `answer_ids` and `label`.

    Rows are `{text, label}`, where every token counts, or `{prompt, text, label}` (`completion` is
    as good as `text`), where the prompt's tokens carry no loss; or `{prompt_ids, answer_ids,
    label}`. Options as in `PreferenceDataset`. Rows of token ids may also have `targets`, a number
    of any size for each of their prefixes (see `attention_labels`), and then any `label`.

    Raises:
        ValueError: for missing keys, labels outside [0, 1], targets that do not fit, or empty
            texts, with counts.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[Row],
        tokenizer: Any = None,
        *,
        split: str = "train",
        max_length: int | None = 512,
        overlong: str = "truncate",
        invalid: str = "error",
        eos: str = "keep",
        seed: int = 0,
    ) -> None:
        _check_option("overlong", overlong, OVERLONG)
        _check_option("invalid", invalid, INVALID)
        _check_option("eos", eos, EOS_RULES)
        raw, _ = load_rows(source, split, seed)
        self.report = DataReport(rows=len(raw))
        self.rows = []
        bad: dict[str, int] = {}
        for row in raw:
            entry = _encode_labelled(row, tokenizer, eos)
            reason = _invalid_label(entry)
            length = len(entry["prompt_ids"]) + len(entry["answer_ids"])
            if reason is None and max_length and length > max_length:
                self.report.overlong += 1
                if overlong == "drop":
                    self.report.dropped_overlong += 1
                    continue
                room = max(max_length - len(entry["prompt_ids"]), 0)
                entry["answer_ids"] = entry["answer_ids"][:room]
                if "targets" in entry:
                    entry["targets"] = entry["targets"][:room]
                self.report.truncated_answers += 1
                reason = None if room else "no room for the text in max_length"
            if reason:
                bad[reason] = bad.get(reason, 0) + 1
            else:
                self.rows.append(entry)
        PreferenceDataset._settle_bad(self, bad, invalid, overlong, max_length)  # type: ignore[arg-type]
        self.report.kept = len(self.rows)
        if not self.rows:
            raise ValueError(f"no text is left to use ({self.report}); check the source")


def encode_pairs(raw: list[Row], tokenizer: Any, eos: str) -> list[Row]:
    """Rows of token ids; prompts and answers are tokenised together where the prompt's own ids
    survive that, else apart."""
    done = [row for row in raw if "chosen_ids" in row]
    if len(done) == len(raw):
        return [_ready(row) for row in raw]
    if done:
        raise ValueError(
            f"{len(done)} of {len(raw)} rows hold token ids and the rest text; pass one kind"
        )
    if tokenizer is None:
        raise ValueError("rows of text need a tokenizer; pass tokenizer= (processing_class=)")
    texts = [normalise(row, tokenizer) for row in raw]
    encoded = []
    for row in texts:
        special = not row.get("templated", False)
        prompt = encode_prompt(tokenizer, row["prompt"], special)
        entry: Row = {"prompt_ids": prompt}
        for side in ("chosen", "rejected"):
            entry[f"{side}_ids"] = encode_answer(
                tokenizer, row["prompt"], prompt, row[side], special, eos
            )
        if "margin" in row:
            entry["margin"] = row["margin"]
        encoded.append(entry)
    return encoded


def encode_prompt(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Ids of a prompt with the tokenizer's special tokens, but for an EOS or SEP at its end."""
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if special and ids:
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        extra = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)}
        if ids[-1] in extra and ids[len(ids) - len(bare) :] != bare:
            ids = ids[:-1]
    return list(ids)


def encode_answer(
    tokenizer: Any, prompt: str, prompt_ids: list[int], text: str, special: bool, eos: str
) -> list[int]:
    """Ids of the answer behind the prompt, with EOS at its end as `eos` says; empty for no text."""
    if not text.strip():
        return []
    whole = encode_prompt(tokenizer, prompt + text, special)
    if whole[: len(prompt_ids)] == prompt_ids:
        ids = whole[len(prompt_ids) :]
    else:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if eos == "append" and ids and ids[-1] != tokenizer.eos_token_id:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "eos='append' needs a tokenizer with an EOS token; set tokenizer.eos_token, or "
                "pass eos='keep'"
            )
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def remove_leaks(train: PreferenceDataset, eval: PreferenceDataset, leaks: str = "error") -> None:
    """Looks for pairs (same prompt, same two answers in any order) that are in both sets.

    `leaks="drop"` takes them out of `train` and counts them in its report; "allow" leaves them.

    Raises `ValueError` with their number for `leaks="error"`.
    """
    _check_option("leaks", leaks, ("error", "drop", "allow"))
    held_out = {pair_key(row) for row in eval.rows}
    stays = [pair_key(row) not in held_out for row in train.rows]
    kept = [row for row, stay in zip(train.rows, stays, strict=True) if stay]
    found = len(train.rows) - len(kept)
    if not found or leaks == "allow":
        return
    if leaks == "error":
        raise ValueError(
            f"{found} of {len(train.rows)} training pairs are in the eval set too (same prompt and "
            "answers); take them out, or pass leaks='drop' to leave them out of training"
        )
    if not kept:
        raise ValueError("every training pair is in the eval set too; pass other data")
    train.rows = kept
    train.sources = [n for n, stay in zip(train.sources, stays, strict=True) if stay]
    train.report.dropped_leaks += found
    train.report.kept = len(kept)


def pair_key(row: Row) -> tuple[Any, ...]:
    """What makes two pairs the same: the prompt and the two answers, whichever won."""
    answers = sorted([tuple(row["chosen_ids"]), tuple(row["rejected_ids"])])
    return (tuple(row["prompt_ids"]), *answers)


def _ready(row: Row) -> Row:
    if row.get("rejected_ids") is None:
        raise ValueError("a row of token ids has chosen_ids but no rejected_ids; give both")
    chosen, rejected = ([int(i) for i in row[name]] for name in ("chosen_ids", "rejected_ids"))
    if row.get("prompt_ids") is None:
        same = common_prefix(chosen, rejected)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    else:
        prompt = [int(i) for i in row["prompt_ids"]]
    entry: Row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    if row.get("margin") is not None:
        entry["margin"] = float(row["margin"])
    return entry


def _invalid_reason(row: Row) -> str | None:
    if not row["prompt_ids"]:
        return "an empty prompt"
    if not row["chosen_ids"] or not row["rejected_ids"]:
        return "an empty answer"
    if row["chosen_ids"] == row["rejected_ids"]:
        return "two equal answers"
    return None


def _encode_labelled(row: Row, tokenizer: Any, eos: str) -> Row:
    if "completion" in row:
        row = {**row, "text": row["completion"]}
    if "label" not in row or not ("text" in row or "answer_ids" in row):
        raise ValueError(f"a labelled row has the keys {sorted(row)}; it needs text and label")
    if "answer_ids" in row:
        prompt, answer = list(row.get("prompt_ids") or []), list(row["answer_ids"])
    elif tokenizer is None:
        raise ValueError("rows of text need a tokenizer; pass tokenizer= (processing_class=)")
    elif row.get("prompt"):
        prompt = encode_prompt(tokenizer, row["prompt"])
        answer = encode_answer(tokenizer, row["prompt"], prompt, row["text"], True, eos)
    else:
        prompt, answer = [], encode_answer(tokenizer, "", [], row["text"], True, eos)
    entry: Row = {"prompt_ids": prompt, "answer_ids": answer, "label": float(row["label"])}
    if row.get("targets") is not None:
        entry["targets"] = [float(target) for target in row["targets"]]
    return entry


def _invalid_label(entry: Row) -> str | None:
    targets = entry.get("targets")
    if targets is None and not 0 <= entry["label"] <= 1:
        return "a label outside [0, 1]"
    if not entry["answer_ids"]:
        return "an empty text"
    if targets is not None and len(targets) != len(entry["answer_ids"]):
        return "targets that are not one number per token of answer_ids"
    if targets is not None and not all(map(math.isfinite, [*targets, entry["label"]])):
        return "a target that is not finite"
    return None


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; pass one of {', '.join(map(repr, allowed))}")
