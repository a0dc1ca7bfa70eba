"""From scored or hand-labelled answers to rows of `rgtg_fast.training`."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.prompts import Prompt
from ..evaluation.store import write_whole

Answer = dict[str, Any]
LABELS = ("a", "b", "tie")


def ids_of(answer: Answer) -> list[int]:
    """The answer's tokens; EOS at its end where it came to one, and not where it was cut."""
    return answer["ids"] + ([] if answer["end"] is None else [answer["end"]])


def groups(answers: Sequence[Answer], samples: int) -> Iterator[tuple[int, list[int]]]:
    """The number of each run of `samples` answers to one prompt, and the numbers of those of its
    answers that no earlier one equals."""
    for first in range(0, len(answers), samples):
        own: dict[tuple[int, ...], int] = {}
        for number in range(first, first + samples):
            own.setdefault(tuple(ids_of(answers[number])), number)
        yield first // samples, list(own.values())


def scored_pairs(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    scores: Sequence[float],
    samples: int,
    which: str,
    draw: bool,
    seed: int,
) -> list[dict[str, Any]]:
    """Pairs out of `samples` answers to each of the prompts: all two whose scores differ, or the
    best and the worst, each with its scores. `draw`: the winner by Bradley-Terry from the scores,
    ties too."""
    rng = random.Random(seed)
    rows = []
    for group, numbers in groups(answers, samples):
        if which == "all":
            chosen = list(itertools.combinations(numbers, 2))
        else:
            ordered = sorted(numbers, key=lambda n: scores[n])
            chosen = [(ordered[-1], ordered[0])] if len(ordered) > 1 else []
        for one, other in chosen:
            if draw:
                # Of tanh, which does not overflow.
                wins = 0.5 + 0.5 * math.tanh((scores[one] - scores[other]) / 2)
                better = rng.random() < wins
            elif scores[one] == scores[other]:
                continue
            else:
                better = scores[one] > scores[other]
            won, lost = (one, other) if better else (other, one)
            said = {"chosen_score": scores[won], "rejected_score": scores[lost]}
            rows.append(_pair(prompts[group], answers[won], answers[lost]) | said)
    return rows


def labelled_rows(
    prompts: Sequence[Prompt], answers: Sequence[Answer], scores: Sequence[float], samples: int
) -> list[dict[str, Any]]:
    """Rows of scalar labels, for losses that take these: the scores themselves."""
    return [
        {
            "prompt_ids": prompts[group].ids,
            "answer_ids": ids_of(answers[n]),
            "label": scores[n],
        }
        for group, numbers in groups(answers, samples)
        for n in numbers
    ]


def _pair(prompt: Prompt, won: Answer, lost: Answer) -> dict[str, Any]:
    return {"prompt_ids": prompt.ids, "chosen_ids": ids_of(won), "rejected_ids": ids_of(lost)}


def right_share(answers: Sequence[Answer], scores: Sequence[float], samples: int) -> float | None:
    """Share of the pairs of answers to one prompt whose scores differ that the guide's own rewards
    (`proxy`) order as the scores do, ties counting half; None where there is no such pair."""
    right, count = 0.0, 0
    for _, numbers in groups(answers, samples):
        for one, other in itertools.combinations(numbers, 2):
            rewards = answers[one]["proxy"], answers[other]["proxy"]
            if scores[one] == scores[other] or None in rewards:
                continue
            gap = (rewards[0] - rewards[1]) * (1 if scores[one] > scores[other] else -1)
            right += 0.5 if gap == 0 else float(gap > 0)
            count += 1
    return right / count if count else None


def to_label(
    prompts: Sequence[Prompt], answers: Sequence[Answer], samples: int
) -> dict[str, tuple[int, int, int]]:
    """Id of each pair to label by hand -> its prompt and its two answers, by number."""
    found = {}
    for group, numbers in groups(answers, samples):
        for one, other in zip(numbers[::2], numbers[1::2], strict=False):
            found[f"{group}-{one % samples}-{other % samples}"] = group, one, other
    return found


def hand_pairs(
    path: Path, prompts: Sequence[Prompt], answers: Sequence[Answer], samples: int
) -> list[dict[str, Any]] | None:
    """The pairs as `path` has them labelled; None where labels are missing yet. The file is written
    where it is not there.

    Raises `ValueError`, naming the line, for a label that is none of `LABELS`, and lines that are
    not those that were written.
    """
    wanted = to_label(prompts, answers, samples)
    shown = {
        one: {
            "id": one,
            "prompt": prompts[group].source,
            "a": answers[a]["text"],
            "b": answers[b]["text"],
        }
        for one, (group, a, b) in wanted.items()
    }
    if wanted and not path.exists():
        lines = [json.dumps(row | {"better": None}, ensure_ascii=False) for row in shown.values()]
        write_whole(path, "".join(f"{line}\n" for line in lines).encode())
        return None
    labels = _labels(path, shown) if wanted else {}
    if len(labels) < len(wanted) or None in labels.values():
        return None
    return [
        _pair(
            prompts[group], *((answers[a], answers[b]) if side == "a" else (answers[b], answers[a]))
        )
        for one, (group, a, b) in wanted.items()
        if (side := labels[one]) != "tie"
    ]


def _labels(path: Path, shown: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    labels: dict[str, str | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}); mend it") from None
        one = row.get("id") if isinstance(row, dict) else None
        if not isinstance(one, str) or one not in shown or one in labels:
            raise ValueError(f"{where} is none of the pairs to label, or a second one; take it out")
        changed = [name for name, value in shown[one].items() if row.get(name) != value]
        if changed:
            raise ValueError(f"{where}: {changed[0]} is not what was written there; put it back")
        if row.get("better") not in (None, *LABELS):
            raise ValueError(f"{where}: better={row['better']!r}; write one of {', '.join(LABELS)}")
        labels[one] = row.get("better")
    return labels
