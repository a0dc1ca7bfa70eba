"""Tokenised preference pairs and labelled texts, checked, counted and never silently dropped."""

from __future__ import annotations

import copy
import math
import os
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.utils.data import Dataset

from .encode import encode_labelled, encode_pairs
from .formats import UNUSABLE, Loaded, Row, load_rows

OVERLONG = ("truncate", "drop", "error")
EOS_RULES = ("append", "keep")
INVALID = ("error", "drop")
LEAKS = ("error", "drop", "allow")


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
    left_out_by_recipe: int = 0
    held_out: int = 0
    duplicates: int = 0
    prompts_seen_in_training: int = 0
    invalid: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {k: v for k, v in asdict(self).items() if v and k not in ("rows", "kept")}
        said = "".join(f", {k.replace('_', ' ')} {v}" for k, v in counts.items())
        return f"{self.kept} of {self.rows} rows kept{said}"


class TokenRows(Dataset, ABC):
    """What pairs and labelled texts have in common; see `PreferenceDataset`."""

    answers: tuple[str, ...]
    eos_rule: str

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[Row] | Loaded,
        tokenizer: Any = None,
        *,
        split: str = "train",
        max_length: int | None = 512,
        overlong: str = "truncate",
        invalid: str = "error",
        eos: str | None = None,
        min_answer_tokens: int = 1,
        seed: int = 0,
    ) -> None:
        eos = self.eos_rule if eos is None else eos
        one_of("overlong", overlong, OVERLONG)
        one_of("invalid", invalid, INVALID)
        one_of("eos", eos, EOS_RULES)
        loaded = load_rows(source, split, seed)
        left_out = loaded.left_out
        if loaded.named is not None:
            min_answer_tokens = max(min_answer_tokens, loaded.named.min_answer_tokens)
        self.report = DataReport(rows=len(loaded.rows) + left_out, left_out_by_recipe=left_out)
        self.rows: list[Row] = []
        self.sources: list[int] = []
        bad: Counter[str] = Counter()
        places: dict[str, str] = {}
        for number, row in enumerate(self.encode(loaded, tokenizer, eos, max_length)):
            reason = None if row.pop("begins", False) else row.get(UNUSABLE) or self.fault(row)
            if reason is None and not self._fits(row, min_answer_tokens, max_length, overlong):
                continue
            if reason is None and row.pop("cut", False):
                reason = self.fault(row)
                reason = reason and f"{reason} after the cut at max_length"
            if reason is None:
                self.rows.append(row)
                self.sources.append(number)
            else:
                bad[reason] += 1
                places.setdefault(reason, loaded.place(number))
        self._settle(dict(bad), places, invalid, overlong, max_length)

    @staticmethod
    @abstractmethod
    def encode(loaded: Loaded, tokenizer: Any, eos: str, max_length: int | None) -> list[Row]:
        """Rows of token ids; of texts much longer than `max_length` those of the beginning."""

    @staticmethod
    @abstractmethod
    def fault(row: Row) -> str | None:
        """What is wrong with a row of token ids."""

    def group(self, row: Row) -> tuple[Any, ...]:
        """What rows share that must not be parted between training and evaluation."""
        return self.key(row)

    def key(self, row: Row) -> tuple[Any, ...]:
        """What makes two rows the same: the prompt and the answers, whichever won."""
        return (tuple(row["prompt_ids"]), *sorted(tuple(row[name]) for name in self.answers))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and longest answer."""
        return [len(row["prompt_ids"]) + self._longest(row) for row in self.rows]

    def largest_id(self) -> int:
        """The largest token id of all rows."""
        return max(
            max(row[name], default=0) for row in self.rows for name in ("prompt_ids", *self.answers)
        )

    def take_out(self, count: int, seed: int = 0) -> Any:
        """Moves `count` rows, drawn by `seed`, into a dataset of their own, which is returned.

        The pairs of a prompt stay together, so a few more than `count` may go.

        Raises `ValueError` where no row would stay.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, row in enumerate(self.rows):
            groups.setdefault(self.group(row), []).append(number)
        order = list(groups.values())
        random.Random(seed).shuffle(order)
        taken: set[int] = set()
        while order and len(taken) < count:
            taken.update(order.pop())
        if not order:
            raise ValueError(
                f"{count} rows to hold out leave nothing of {len(self)} rows with {len(groups)} "
                "different prompts to train on; hold out fewer, or give another file as eval"
            )
        other = copy.copy(self)
        other.report = DataReport(rows=len(taken))
        other._keep([n in taken for n in range(len(self))])
        self._keep([n not in taken for n in range(len(self))])
        self.report.held_out += len(taken)
        return other

    def _keep(self, stays: list[bool]) -> None:
        self.rows = [row for row, stay in zip(self.rows, stays, strict=True) if stay]
        self.sources = [n for n, stay in zip(self.sources, stays, strict=True) if stay]
        self.report.kept = len(self.rows)

    def _longest(self, row: Row) -> int:
        return max(len(row[name]) for name in self.answers)

    def _fits(self, row: Row, least: int, limit: int | None, overlong: str) -> bool:
        """Whether the row stays; cuts its answers where asked."""
        if self._longest(row) < least:
            self.report.dropped_short += 1
            return False
        if limit is None or len(row["prompt_ids"]) + self._longest(row) <= limit:
            return True
        self.report.overlong += 1
        if overlong == "drop":
            self.report.dropped_overlong += 1
            return False
        room = max(limit - len(row["prompt_ids"]), 0)
        self.report.truncated_answers += sum(len(row[name]) > room for name in self.answers)
        for name in (*self.answers, "own_ids", "targets", "candidate_ids", "candidate_logprobs"):
            if name in row:
                row[name] = row[name][:room]
        row["cut"] = True
        return True

    def _settle(
        self,
        bad: dict[str, int],
        places: dict[str, str],
        invalid: str,
        overlong: str,
        max_length: int | None,
    ) -> None:
        report = self.report
        report.invalid = bad
        report.dropped_invalid = sum(bad.values())
        report.kept = len(self.rows)
        report.duplicates = len(self.rows) - len({self.key(row) for row in self.rows})
        if overlong == "error" and report.overlong:
            raise ValueError(
                f"{report.overlong} of {report.rows} rows are longer than "
                f"max_length={max_length}; raise max_length, or pass overlong='truncate' or 'drop'"
            )
        if bad and invalid == "error":
            counts = ", ".join(
                f"{n} with {reason} (the first: {places[reason]})" for reason, n in bad.items()
            )
            raise ValueError(
                f"of {report.rows} rows there are {counts}; mend them, or pass "
                "invalid='drop' to leave them out"
                + (" (overlong='drop' leaves out those that were cut)" if "cut" in counts else "")
            )
        if not self.rows:
            raise ValueError(f"no row is left to use ({report}); check the source")


class PreferenceDataset(TokenRows):
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
        invalid: "error" (with counts and places), or "drop", for rows with an empty prompt or
            answer, for equal pairs, for pairs that the cut at `max_length` made equal or empty, and
            for rows that are no text (lone surrogates, JSON nested too deeply).
        min_answer_tokens: rows whose longer answer is shorter are dropped and counted.

    Raises:
        ValueError: for unknown options, rows of another shape, or bad rows; says how many, and the
            way out.
    """

    answers = ("chosen_ids", "rejected_ids")
    eos_rule = "append"
    encode = staticmethod(encode_pairs)

    @staticmethod
    def fault(row: Row) -> str | None:
        if not row["chosen_ids"] or not row["rejected_ids"]:
            return "an empty answer"
        if row["chosen_ids"] == row["rejected_ids"]:
            return "two equal answers"
        return None if row["prompt_ids"] else "an empty prompt"

    def group(self, row: Row) -> tuple[Any, ...]:
        return tuple(row["prompt_ids"])


class LabelledDataset(TokenRows):
    """Texts with a label in [0, 1] (of RAD, soft_q): `prompt_ids`, `answer_ids` and `label`.

    Rows are `{text, label}`, where every token counts, or `{prompt, text, label}` (`completion` is
    as good as `text`), where the prompt's tokens carry no loss; or `{prompt_ids, answer_ids,
    label}`. Options as in `PreferenceDataset`, but `eos="keep"` is the default. Rows of token ids
    may also have `targets`, a number of any size for each of their prefixes, and then any `label`
    (see `attention_labels` and `rollout_targets`).

    Raises:
        ValueError: for missing keys, labels outside [0, 1], targets that do not fit, or empty
            texts, with counts.
    """

    answers = ("answer_ids",)
    eos_rule = "keep"
    encode = staticmethod(encode_labelled)

    @staticmethod
    def fault(row: Row) -> str | None:
        targets = row.get("targets")
        if targets is None and not 0 <= row["label"] <= 1:
            return "a label outside [0, 1]"
        if not row["answer_ids"]:
            return "an empty text"
        if targets is not None and len(targets) != len(row["answer_ids"]):
            return "targets that are not one number per token of answer_ids"
        if targets is not None and not all(map(math.isfinite, [*targets, row["label"]])):
            return "a target that is not finite"
        return None


def remove_leaks(train: TokenRows, eval: TokenRows, leaks: str = "error") -> None:
    """Looks for rows (same prompt, same answers in any order) that are in both sets.

    `leaks="drop"` takes them out of `train` and counts them in its report; "allow" leaves them.
    Pairs of `eval` that only share their prompt with training are counted in its report.

    Raises `ValueError` with their number for `leaks="error"`.
    """
    one_of("leaks", leaks, LEAKS)
    held_out = {eval.key(row) for row in eval.rows}
    stays = [train.key(row) not in held_out for row in train.rows]
    found = stays.count(False)
    if found and leaks == "error":
        raise ValueError(
            f"{found} of {len(train)} training rows are in the eval set too (same prompt and "
            "answers); take them out, or pass leaks='drop' to leave them out of training"
        )
    if found and leaks == "drop":
        if not any(stays):
            raise ValueError("every training row is in the eval set too; pass other data")
        train._keep(stays)
        train.report.dropped_leaks += found
    trained = {train.group(row) for row in train.rows}
    if isinstance(eval, PreferenceDataset):
        seen = sum(eval.group(row) in trained for row in eval.rows)
        eval.report.prompts_seen_in_training = seen


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises `ValueError` for a value that is not `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; pass one of {', '.join(map(repr, allowed))}")
