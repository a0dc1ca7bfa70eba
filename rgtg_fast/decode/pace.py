"""How far a round of speculation goes ahead: what saves time, by expectation.

A round takes m positions of the language model's own continuation, scores all their candidates in
one forward of the reward model, and keeps the tokens up to the first that the rewards change. The
language model gets ahead by a position with each forward, or by more where some of the next tokens
are guessed and turn out right. What forwards take is timed, and how often drafts and guesses are
right is counted, round by round. Neither changes which tokens are chosen: a bad estimate costs time
only.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable

from torch import Tensor

TIMES = 7  # the last ones count, by their median
MEMORY = 0.95  # what an average keeps of itself at each observation
# A draft is the safer, the larger the rewards could be without another candidate overtaking it: in
# standard deviations of what is not foreseen of a step's rewards (fitted.py), either way. Two of
# them differ with a deviation sqrt(2) times as large, so these are gaps of 1/2, 1, 2 and 4 of it.
LEVELS = (0.5 / math.sqrt(2), 1.0 / math.sqrt(2), 2.0 / math.sqrt(2), 4.0 / math.sqrt(2))
# How often a draft of each level is kept, at first: hopeful, as what is not tried is not learnt.
PRIOR = (0.75, 0.85, 0.93, 0.98, 1.0)
PRIOR_WEIGHT = 4.0  # drafts that the first assumption counts for
FIRST_SPREAD = 0.5  # of rewards, before any was seen
NODES = 4  # numbers of candidates that are not told apart in the reward model's times
RETRY = 64  # decisions after which what did not pay is tried again
MARGIN = 0.98  # what looks no better than this is not worth the risk


class Seconds:
    """Of something that is done with m tokens at once, by m."""

    def __init__(self) -> None:
        self.seen: dict[int, deque[float]] = {}

    def add(self, tokens: int, seconds: float) -> None:
        self.seen.setdefault(tokens, deque(maxlen=TIMES)).append(seconds)

    def __call__(self, tokens: int) -> float | None:
        """Expected seconds: on the line through the lengths seen around it, or the last two. With
        one length seen, that one's time: longer ones look cheap, and so are tried."""
        # The first of a length makes what a library keeps for that shape.
        # (Lists, as another thread may add to them.)
        seen = [(m, list(times)) for m, times in list(self.seen.items())]
        known = {m: statistics.median(times[1:] or times) for m, times in seen}
        if tokens in known or len(known) <= 1:
            return known.get(tokens, next(iter(known.values()), None))
        order = sorted(known)
        above = next((i for i, m in enumerate(order) if m > tokens), len(order) - 1)
        high = order[max(above, 1)]
        low = order[max(above, 1) - 1]
        slope = max(0.0, (known[high] - known[low]) / (high - low))
        return known[low] + slope * (tokens - low)


class Costs:
    """Seconds of a forward of the language model over m tokens (the last one, and m - 1 guesses),
    of a guess, and of all the rest of a round with m * NODES candidates to score."""

    def __init__(self) -> None:
        self.draft, self.guess, self.reward = Seconds(), Seconds(), Seconds()

    def ahead(self, guesses: int, right: float) -> float | None:
        """Of a position that the language model gets ahead by, with so many guesses in a forward,
        each `right` with that probability."""
        seconds = self.draft(guesses + 1)
        if seconds is None:
            return None
        positions = sum(right**i for i in range(guesses + 1))
        return (seconds + guesses * (self.guess(1) or 0.0)) / positions

    def best(self, most: int, right: float) -> tuple[int, float | None]:
        """How many guesses, at most `most`, make a position cheapest, and its seconds."""
        count, least = 0, self.ahead(0, right)
        if least is None:
            return 0, None
        limit = MARGIN * least
        for guesses in range(1, most + 1):
            seconds = self.ahead(guesses, right)
            if seconds is not None and seconds < limit:
                count, limit = guesses, seconds
        return count, limit if count else least

    def one_more_pays(
        self, drafted: int, nodes: int, then: int, yields: float, more: float, each: float | None
    ) -> bool:
        """Whether to draft a position after `drafted`, which yield `yields` tokens by expectation
        and have `nodes` candidates; with it, at `each` seconds, they are `then` candidates and
        `more` tokens more. Never before anything was timed."""
        now, later = self.reward(nodes // NODES), self.reward(then // NODES)
        if now is None or later is None or each is None:
            return False
        now, later = now + drafted * each, later + (drafted + 1) * each
        return later * yields < MARGIN * now * (yields + more)


Rate = list[float]  # how often something was right and was seen, the last times counting most


def observed(rate: Rate, right: float, seen: float) -> None:
    """`right` of `seen` were."""
    keep = MEMORY**seen
    rate[:] = rate[0] * keep + right, rate[1] * keep + seen


class Survival:
    """How likely drafts are to be kept, by their level of safety."""

    def __init__(self) -> None:
        self.square: float | None = None  # variance of what is not foreseen of a step's rewards
        self.levels: list[Rate] = [[PRIOR_WEIGHT * p, PRIOR_WEIGHT] for p in PRIOR]

    def levels_of(self, alone: Callable[[float], Tensor]) -> list[int]:
        """The level of each row's draft: how many of LEVELS it is safe at. `alone(r)` says, bool
        [B], where no other candidate can win with rewards between -r and r."""
        spread = FIRST_SPREAD if self.square is None else math.sqrt(self.square)
        safe = alone(LEVELS[0] * spread)
        total = safe.long()
        for level in LEVELS[1:]:
            if not safe.any():
                break
            safe = safe & alone(level * spread)
            total += safe
        return total.tolist()

    def of(self, level: int) -> float:
        """The probability that a draft of this level is kept."""
        right, seen = self.levels[level]
        return right / seen

    def observe(self, level: int, kept: bool) -> None:
        """A draft of that level was kept or not."""
        observed(self.levels[level], kept, 1)

    def observe_errors(self, errors: Tensor) -> None:
        """By how much, fp32 [n, k], rewards of candidates were not what was foreseen."""
        if errors.shape[1] > 1 and len(errors):
            new = float(errors.square().sum(1).mean()) / (errors.shape[1] - 1)
            old = new if self.square is None else self.square
            keep = MEMORY ** len(errors)
            self.square = keep * old + (1 - keep) * new


class Retry:
    """Says yes where something pays, and once in `RETRY` times in a row where it does not."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, pays: bool) -> bool:
        self.times = 0 if pays or self.times >= RETRY else self.times + 1
        return self.times == 0
