"""How far to draft: as far as the time of a token becomes less, by expectation.

A round of speculation takes m tokens of the language model's own continuation, scores all their
candidates in one forward of the reward model, and keeps the tokens up to the first that the rewards
change. The continuation comes from m forwards of the language model (`drafts`), or is guessed, and
verified in one (`guesses`). What that costs is timed, and how many tokens it yields is counted,
round by round. Neither changes which tokens are chosen: a bad estimate costs time only.
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
# standard deviations of the rewards among a step's candidates, either way. Two rewards differ with
# a deviation sqrt(2) times as large, so these are gaps of 1/2, 1, 2 and 4 of it.
LEVELS = (0.5 / math.sqrt(2), 1.0 / math.sqrt(2), 2.0 / math.sqrt(2), 4.0 / math.sqrt(2))
PRIOR = (0.5, 0.75, 0.9, 0.98, 1.0)  # how often a draft of each level is kept, at first
PRIOR_WEIGHT = 4.0  # drafts that the first assumption counts for
FIRST_SPREAD = 0.5  # of rewards, before any was seen
RETRY = 32  # rounds after which guesses that did not pay are tried again
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
        known = {m: statistics.median(times) for m, times in self.seen.items()}
        if tokens in known or len(known) <= 1:
            return known.get(tokens, next(iter(known.values()), None))
        order = sorted(known)
        above = next((i for i, m in enumerate(order) if m > tokens), len(order) - 1)
        high = order[max(above, 1)]
        low = order[max(above, 1) - 1]
        slope = max(0.0, (known[high] - known[low]) / (high - low))
        return known[low] + slope * (tokens - low)


class Costs:
    """Seconds of a drafted token, of a guessed one, of verifying m tokens, and of the reward
    model's forward over m tokens' candidates."""

    def __init__(self) -> None:
        self.draft, self.guess, self.verify, self.reward = (Seconds() for _ in range(4))

    def drafts(self, tokens: int) -> float | None:
        """Of a round whose tokens the language model drafts."""
        draft, reward = self.draft(1), self.reward(tokens)
        return None if draft is None or reward is None else tokens * draft + reward

    def guesses(self, tokens: int) -> float | None:
        """Of a round with `tokens` - 1 guesses."""
        draft, reward = self.draft(1), self.reward(tokens)
        if draft is None or reward is None:
            return None
        verify = self.verify(tokens)
        guess = (self.guess(1) or 0.0) * (tokens - 1)
        # Never verified yet: as if it were one token, so that it is tried.
        return (draft if verify is None else verify) + guess + reward

    def one_more_pays(self, drafted: int, yields: float, more: float) -> bool:
        """Whether to draft a token after `drafted`, which yield `yields` tokens by expectation;
        with it, `more` are added. Never before anything was timed."""
        now, then = self.drafts(drafted), self.drafts(drafted + 1)
        if now is None or then is None:
            return False
        return then * yields < MARGIN * now * (yields + more)


Rate = list[float]  # how often something was right and was seen, the last times counting most


def observed(rate: Rate, right: float, seen: float) -> None:
    """`right` of `seen` were."""
    keep = MEMORY**seen
    rate[:] = rate[0] * keep + right, rate[1] * keep + seen


class Survival:
    """How likely drafts are to be kept, by their level of safety; and guesses to be drafts."""

    def __init__(self) -> None:
        self.square: float | None = None  # the rewards' variance among a step's candidates
        self.levels: list[Rate] = [[PRIOR_WEIGHT * p, PRIOR_WEIGHT] for p in PRIOR]
        self.drafts: Rate = [PRIOR_WEIGHT * 0.9, PRIOR_WEIGHT]
        self.guesses: Rate = [PRIOR_WEIGHT * 0.7, PRIOR_WEIGHT]
        self.rounds = 0  # without a guess

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

    def observe(self, level: int | None, kept: bool) -> None:
        """A draft of that level, where it is known, was kept or not."""
        observed(self.drafts, kept, 1)
        if level is not None:
            observed(self.levels[level], kept, 1)

    def observe_rewards(self, rewards: Tensor) -> None:
        """Rewards fp32 [n, k] of candidates; those that are not finite are left out."""
        finite = rewards.isfinite()
        count = finite.sum(-1)
        zeroed = rewards.where(finite, 0.0)
        mean = zeroed.sum(-1) / count.clamp(min=1)
        square = (zeroed - mean[:, None]).square().where(finite, 0.0).sum(-1)
        total, rows = float(square.sum()), int(count.sum())
        if rows > len(rewards):
            new = total / rows
            old = new if self.square is None else self.square
            self.square = MEMORY * old + (1 - MEMORY) * new

    def worth_guessing(self, most: int, costs: Costs) -> int:
        """How many tokens to guess, at most `most`; 0 where drafting is as good."""
        kept = self.drafts[0] / self.drafts[1]
        right = kept * self.guesses[0] / self.guesses[1]
        best, count = math.inf, 0
        for tokens in range(1, most + 2):
            for share, seconds, guesses in (
                (kept, costs.drafts(tokens), 0),
                (right, costs.guesses(tokens), tokens - 1),
            ):
                if seconds is None:
                    return 0
                each = seconds / sum(share**i for i in range(tokens))
                if each < best * (MARGIN if guesses else 1.0):
                    best, count = each, guesses
        self.rounds = 0 if count else self.rounds + 1
        if self.rounds < RETRY or most < 1:
            return count
        self.rounds = 0
        return 1
