"""Rows to batches: padding on the right, answers marked, pairs kept whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distill import GuidedCollator
from .formats import Row
from .objectives import OBJECTIVES
from .sequencematch import AnswerCollator, backspace_of


@dataclass
class PairCollator:
    """N preference rows to a batch whose first dimension is the pair.

    Returns `input_ids` and `attention_mask` int64 [N, 2, L], chosen before rejected, padded on the
    right; `start` int64 [N], the prompt's length; `answer_mask` int64 [N, 2, T], 1 for each token
    of an answer, the first at column 0, T that of the longest; and, where a row has one, `margin`
    fp32 [N], for rows without the `margin` given here. A launcher that splits batches along the
    first dimension never parts a pair.

    `fill_eos` gives EOS ids behind the shorter answer up to the longer one's length (the published
    padding): attended to, and not in `answer_mask`, for the loss with `extension="eos"`.

    Rows with a `reference` (`training.reference`) give it as [N, 2, T], 0 behind an answer's end,
    and their `scores` fp32 [N, 2], chosen before rejected.

    `separator`, of the loss "seq2seq", gives `separator` int64 [N], that token id, and
    `draft_lengths` int64 [N, 2], the answers' lengths without the id `eos` at their end.
    """

    pad_id: int = 0
    fill_eos: int | None = None
    margin: float | None = None
    separator: int | None = None
    eos: int | None = None

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        sides = [[row[s] for s in ("chosen_ids", "rejected_ids")] for row in rows]
        width = max(
            len(row["prompt_ids"]) + max(map(len, pair))
            for row, pair in zip(rows, sides, strict=True)
        )
        ids = torch.full((len(rows), 2, width), self.pad_id)
        mask = torch.zeros_like(ids)
        answer = torch.zeros(len(rows), 2, max(len(a) for pair in sides for a in pair)).long()
        for n, (row, pair) in enumerate(zip(rows, sides, strict=True)):
            start, longest = len(row["prompt_ids"]), max(map(len, pair))
            for side, tokens in enumerate(pair):
                end = start + len(tokens)
                ids[n, side, :end] = torch.tensor(row["prompt_ids"] + tokens)
                answer[n, side, : len(tokens)] = 1
                mask[n, side, :end] = 1
                if self.fill_eos is not None:
                    ids[n, side, end : start + longest] = self.fill_eos
                    mask[n, side, end : start + longest] = 1
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "answer_mask": answer,
            "start": torch.tensor([len(row["prompt_ids"]) for row in rows]),
        }
        if self.separator is not None:
            batch["separator"] = torch.full((len(rows),), self.separator)
            batch["draft_lengths"] = torch.tensor(
                [[len(a) - (a[-1] == self.eos) for a in pair] for pair in sides]
            )
        if any("margin" in row for row in rows):
            margins = [float(row.get("margin", self.margin or 0.0)) for row in rows]
            batch["margin"] = torch.tensor(margins)
        if "reference" in rows[0]:
            batch["scores"] = torch.tensor(
                [[row["chosen_score"], row["rejected_score"]] for row in rows]
            )
            reference = torch.zeros(answer.shape, dtype=rows[0]["reference"][0].dtype)
            batch["reference"] = reference
            for n, row in enumerate(rows):
                for side, logprobs in enumerate(row["reference"]):
                    reference[n, side, : len(logprobs)] = logprobs
        return batch


@dataclass
class LabelledCollator:
    """N labelled rows to `input_ids` and `attention_mask` int64 [N, L], padded on the right,
    `start` int64 [N], `answer_mask` int64 [N, T] as in `PairCollator`, and `target` fp32 [N]; and,
    where a row has targets of its own for its prefixes, `targets` fp32 [N, T] (the label repeated
    for rows without)."""

    pad_id: int = 0

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        tokens = [row["prompt_ids"] + row["answer_ids"] for row in rows]
        ids = torch.full((len(rows), max(map(len, tokens))), self.pad_id)
        mask = torch.zeros_like(ids)
        width = max(len(row["answer_ids"]) for row in rows)
        answer = torch.zeros(len(rows), width).long()
        for n, (row, sequence) in enumerate(zip(rows, tokens, strict=True)):
            ids[n, : len(sequence)] = torch.tensor(sequence)
            mask[n, : len(sequence)] = 1
            answer[n, : len(row["answer_ids"])] = 1
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "answer_mask": answer,
            "start": torch.tensor([len(row["prompt_ids"]) for row in rows]),
            "target": torch.tensor([row["label"] for row in rows]),
        }
        if any("targets" in row for row in rows):
            targets = batch["target"][:, None].repeat(1, width)
            for n, row in enumerate(rows):
                own = row.get("targets", [])
                targets[n, : len(own)] = torch.tensor(own)
            batch["targets"] = targets
        return batch


def make_collator(args: Any, tokenizer: Any, model: Any) -> Any:
    """The collator for a `PrefixRewardConfig`. Padding is masked, so any id does: 0 is in each
    vocabulary, where a padding token that was added to the tokenizer only is not."""
    if OBJECTIVES[args.loss_type].data == "labelled":
        return LabelledCollator()
    if OBJECTIVES[args.loss_type].data == "guided":
        return GuidedCollator()
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        eos = getattr(getattr(model, "config", None), "eos_token_id", None)
    eos = eos[0] if isinstance(eos, (list, tuple)) else eos
    if OBJECTIVES[args.loss_type].data == "answers":
        backspace = backspace_of(tokenizer, args.backspace)
        if eos is None:
            raise ValueError(
                "loss_type='sequencematch' needs an EOS token; pass a tokenizer that has one"
            )
        return AnswerCollator(backspace, eos)
    if args.extension == "eos" and eos is None:
        raise ValueError("extension='eos' needs an EOS token; pass a tokenizer that has one")
    between = separator_of(args, tokenizer, eos) if OBJECTIVES[args.loss_type].rewrites else None
    return PairCollator(
        fill_eos=eos if args.extension == "eos" else None,
        margin=args.margin,
        separator=between,
        eos=eos,
    )


def separator_of(args: Any, tokenizer: Any, eos: int | None) -> int:
    """The id of the token between draft and rewriting."""
    if args.separator is None:
        if eos is None:
            raise ValueError(
                "loss_type='seq2seq' puts EOS between draft and rewriting, and there is none; pass "
                "separator=, or a tokenizer that has an EOS token"
            )
        return eos
    found = None if tokenizer is None else tokenizer.get_vocab().get(args.separator)
    if found is None:
        known = "no tokenizer was given" if tokenizer is None else "the tokenizer has no such token"
        raise ValueError(
            f"separator={args.separator!r} is to be one token, and {known}; pass one that is in "
            "its vocabulary, or leave it out for EOS"
        )
    return found
