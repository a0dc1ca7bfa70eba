"""CARDS: segments that end where the next token is uncertain, accepted by their rewards."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import ops
from ..decode import options as numbers
from ..decode.refill import Entry
from .batch import Batch
from .checks import real
from .output import SequenceAnswer
from .prompt_rewards import prompt_rewards
from .run import Run


def cards(
    model: Any,
    prompts: Iterable[Any],
    *,
    reward_model: Any,
    reward_target: float,
    entropy_threshold: float = 3.0,
    alpha: float = 0.5,
    beta: float = 0.7,
    min_segment: int = 4,
    max_segment: int = 64,
    max_rejections: int = 20,
    batch_size: int = 16,
    tokenizer: Any = None,
    **options: Any,
) -> Iterator[SequenceAnswer]:
    """Cascade reward sampling: rejection sampling by segments of uncertain ends.

    CARDS (Li et al., arXiv 2406.16306, algorithm 1; its published code for what that leaves open).
    From the text y so far tokens are drawn from π until the entropy of the next one is at least
    `entropy_threshold`: a candidate segment z. It is accepted with probability

        min(1, exp((r(x, y z) - τ) / beta)),    τ = min(r*, r_0 + |y z| (r* - r_0) / max_new_tokens)

    where r* is `reward_target`, r_0 = (1 - alpha) r(x) + alpha r*, and |y z| counts the tokens of
    the answer. Otherwise another one is drawn in its place. After `max_rejections` in a row, the
    best segment of these and of one more is taken. The text ends with EOS, which ends a segment
    too, or at its longest; the last segment is judged like any other.

    Args:
        model, prompts, reward_model, tokenizer, options: as for `best_of`. Try i of a prompt (over
            all of its segments) has row seed `ops.split_seed(seed, i + 1)[i]`.
        reward_target: r*, of whole answers.
        entropy_threshold: in nats, of the model's own logits (before `temperature` and its like).
        alpha: in [0, 1], how much of r* is asked for from the beginning. With 1 the reward of the
            prompt alone is not asked for, which is not known of every prompt of one token.
        beta: temperature > 0 of the acceptance.
        min_segment, max_segment: tokens of a segment, but for one that ends the text.
        max_rejections: of one segment.
        batch_size: prompts at a time; where one's answer is done, the next takes its place.

    Returns:
        An iterator of a `SequenceAnswer` for each prompt, in the order they end; `segments` are the
        lengths of the segments, `rejected` counts those that were not taken.

    Raises:
        ValueError: as `best_of`.
    """
    rule = _Rule(
        real("reward_target", reward_target),
        real("entropy_threshold", entropy_threshold),
        real("alpha", alpha),
        real("beta", beta, 0.0),
        numbers.integer("min_segment", min_segment, 1),
        numbers.integer("max_segment", max_segment, 1),
        numbers.integer("max_rejections", max_rejections, 0),
    )
    if not 0 <= rule.alpha <= 1:
        raise ValueError(f"alpha={alpha!r}; pass a number from 0 to 1")
    if rule.max_segment < rule.min_segment:
        raise ValueError(
            f"max_segment={max_segment} is below min_segment={min_segment}; pass a larger one"
        )
    batch_size = numbers.integer("batch_size", batch_size, 1)
    run = Run(model, reward_model, tokenizer, options)
    return run.in_turn(prompts, lambda: _Cards(run, rule, batch_size).answers(prompts))


@dataclass(frozen=True)
class _Rule:
    """The numbers of the method."""

    target: float
    entropy: float
    alpha: float
    beta: float
    min_segment: int
    max_segment: int
    max_rejections: int

    def threshold(self, start: float, tokens: int, most: int) -> float:
        """τ of a text of so many tokens of `most`, whose schedule begins at `start`."""
        return min(self.target, start + tokens * (self.target - start) / most)


@dataclass
class _Segment:
    """What a row goes back to, and the tries since."""

    entry: Entry
    start: float  # r_0
    chance: random.Random
    done: int = 0  # tokens accepted
    scores: Tensor | None = None  # [V], behind them
    entropy: float = 0.0
    reward: float = 0.0  # of them
    tries: int = 0  # of the prompt
    rejected: int = 0  # of this segment
    rejected_before: int = 0  # of all segments
    best: tuple[float, list[int], list[float]] | None = None
    lengths: list[int] = field(default_factory=list)

    def seed(self) -> int:
        return int(ops.split_seed(self.entry.seed, self.tries + 1)[self.tries])


class _Cards(Batch[_Rule, _Segment]):
    """The rows; the state of each is its segment."""

    def _join(self, entries: list[Entry]) -> None:
        first = len(self.texts.rows)
        self.texts.join(entries)
        rewards = [0.0] * len(entries)
        if self.rule.alpha < 1:
            otherwise = "the schedule begins there; pass alpha=1.0"
            rewards = prompt_rewards(self.texts, first, otherwise)
        for entry, reward in zip(entries, rewards, strict=True):
            start = (1 - self.rule.alpha) * reward + self.rule.alpha * self.rule.target
            self.states.append(_Segment(entry, start, random.Random(entry.seed)))
        for row in range(first, len(self.texts.rows)):
            self._begin(row)

    def _begin(self, row: int) -> None:
        """A segment begins behind the text of a row, which the language model has run."""
        text, segment = self.texts.rows[row], self.states[row]
        segment.done, segment.reward = len(text.tokens), text.reward
        segment.scores = self.texts.scores[row].clone()
        segment.entropy = self.texts.entropy[row]
        segment.rejected, segment.best = 0, None

    def _step(self) -> None:
        """One more token in each row, and the judgement of segments that it ends."""
        texts, rows = self.texts, range(len(self.states))
        going = [row for row in rows if not texts.rows[row].ended]
        texts.draw(going, [self.states[row].seed() for row in going])
        lengths = [len(texts.rows[row].tokens) - self.states[row].done for row in rows]
        texts.advance(
            [
                row
                for row in rows
                if not texts.rows[row].ended
                and self.rule.min_segment <= lengths[row] < self.rule.max_segment
            ]
        )
        whole = [
            row
            for row in rows
            if texts.rows[row].error is None and self._is_whole(row, lengths[row])
        ]
        texts.judge(whole)
        taken = [row for row in whole if texts.rows[row].error is not None or self._takes(row)]
        again = [row for row in whole if row not in taken]
        if again:
            self._take_back(again)
        going = [row for row in taken if not texts.rows[row].ended]
        texts.advance(going)
        for row in going:
            self._begin(row)

    def _is_done(self, row: int) -> bool:
        return self.texts.rows[row].ended

    def _is_whole(self, row: int, length: int) -> bool:
        if self.texts.rows[row].ended or length >= self.rule.max_segment:
            return True
        return length >= self.rule.min_segment and self.texts.entropy[row] >= self.rule.entropy

    def _takes(self, row: int) -> bool:
        """Whether the text of a row goes on from the segment it has now, which may be an earlier
        one that is better."""
        text, segment, rule = self.texts.rows[row], self.states[row], self.rule
        segment.tries += 1
        if segment.best is None or text.reward > segment.best[0]:
            new = text.tokens[segment.done :], text.logprobs[segment.done :]
            segment.best = (text.reward, *new)
        if segment.rejected >= rule.max_rejections:
            self._take_best(row)
        else:
            most = text.entry.steps
            over = text.reward - rule.threshold(segment.start, len(text.tokens), most)
            if not segment.chance.random() < math.exp(min(0.0, over / rule.beta)):
                segment.rejected += 1
                segment.rejected_before += 1
                return False
        segment.lengths.append(len(text.tokens) - segment.done)
        return True

    def _take_best(self, row: int) -> None:
        """Have the best of the segments that were drawn behind the text of a row."""
        text, segment = self.texts.rows[row], self.states[row]
        assert segment.best is not None
        _, tokens, logprobs = segment.best
        if text.tokens[segment.done :] != tokens:
            self._take_back([row])
            self.texts.add(row, tokens, logprobs)
            self.texts.judge([row])

    def _take_back(self, rows: list[int]) -> None:
        """Forget the segments of these rows."""
        segments = [self.states[row] for row in rows]
        self.texts.take_back(rows, [segment.done for segment in segments])
        for row, segment in zip(rows, segments, strict=True):
            assert segment.scores is not None
            self.texts.scores[row] = segment.scores
            self.texts.rows[row].reward = segment.reward
            self.texts.entropy[row] = segment.entropy

    def _describe(self, row: int, answer: SequenceAnswer) -> None:
        segment = self.states[row]
        answer.segments, answer.rejected = segment.lengths, segment.rejected_before
