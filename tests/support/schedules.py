"""Random schedules of rows that come and go, played on a scorer and on plain lists of tokens.

A schedule is a list of (operation, seed): a row more or less when Hypothesis shrinks it changes
nothing of the others. Every score is compared with full forwards without a cache.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import zoo
from hypothesis import strategies as st
from torch import Tensor

K = 3
MOST_ROWS, LONGEST = 5, 26  # zoo's windows are 5
OPERATIONS = ("join", "leave", "fork", "extend", "crop", "score", "step", "step", "step", "late")

schedules = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**20)), min_size=4, max_size=24
)
Reward = Callable[[Tensor, int], Tensor]  # ids [n, L], length of the prompt -> rewards [n]


class Schedule:
    """A scorer, and the tokens of its rows: handle -> (tokens, length of its prompt)."""

    def __init__(self, scorer: Any, reward: Reward, eos: int = -1, skips: bool = False) -> None:
        self.scorer, self.reward, self.eos, self.skips = scorer, reward, eos, skips
        self.rows: dict[int, tuple[list[int], int]] = {}
        self.check: Callable[[Schedule], None] = lambda schedule: None  # before the end

    @torch.no_grad()
    def run(self, schedule: list[tuple[str, int]], prefilled: int = 0) -> None:
        """Play it, beginning with a padded batch of `prefilled` rows, and end with all rows."""
        if prefilled:
            self._prefill(random.Random(prefilled), prefilled)
        for operation, seed in schedule:
            getattr(self, "_" + operation)(random.Random(seed))
            assert self.scorer.handles == list(self.rows)
            for cache in getattr(self.scorer, "caches", ()) if self.rows else ():
                assert_extents_are_apart(cache)
        if self.rows:
            self._score_rows(random.Random(0), list(self.rows))
            self.check(self)
        self.scorer.finish()

    def _prefill(self, chance: random.Random, count: int) -> None:
        prompts = [self._tokens(chance, 1, 12) for _ in range(count)]
        prompts += prompts[-1:]  # a copy, as num_return_sequences gives it
        batch = zoo.left_pad([torch.tensor(prompt) for prompt in prompts])
        self.scorer.prefill(batch["input_ids"], batch["attention_mask"])
        self.rows = {i: (list(p), len(p)) for i, p in enumerate(prompts)}

    def _join(self, chance: random.Random) -> None:
        count = min(chance.choice((1, 1, 2, 3)), MOST_ROWS - len(self.rows))
        prompts = [self._tokens(chance, 1, 12) for _ in range(count)]
        handles = self.scorer.join([torch.tensor(prompt) for prompt in prompts])
        assert not set(handles) & set(self.rows)
        for handle, prompt in zip(handles, prompts, strict=True):
            self.rows[handle] = (prompt, len(prompt))

    def _leave(self, chance: random.Random) -> None:
        gone = self._some(chance)
        self.scorer.leave(gone)
        for handle in gone:
            del self.rows[handle]

    def _fork(self, chance: random.Random) -> None:
        """Rows go on in another order, some of them several times and some not at all."""
        before = list(self.rows)
        if not before:
            return
        kept = [chance.randrange(len(before)) for _ in range(chance.randint(1, MOST_ROWS))]
        self.scorer.keep_rows(torch.tensor(kept))
        new = list(self.scorer.handles)
        first = [kept.index(row) == i for i, row in enumerate(kept)]
        for row, handle, is_first in zip(kept, new, first, strict=True):
            assert is_first == (handle == before[row]) and (is_first or handle not in before)
        rows = [self.rows[before[row]] for row in kept]
        self.rows = {h: (list(t), n) for h, (t, n) in zip(new, rows, strict=True)}

    def _extend(self, chance: random.Random) -> list[int]:
        handles = self._some(chance)
        tokens = [self._tokens(chance, 0, min(7, LONGEST - self._length(h))) for h in handles]
        self.scorer.extend(handles, [torch.tensor(t, dtype=torch.int64) for t in tokens])
        for handle, more in zip(handles, tokens, strict=True):
            self.rows[handle][0].extend(more)
        return handles

    def _crop(self, chance: random.Random) -> list[int]:
        handles = self._some(chance)
        lengths = [chance.randint(1, self._length(handle)) for handle in handles]
        given = torch.tensor(lengths, dtype=torch.int64) if chance.random() < 0.5 else lengths
        self.scorer.crop(handles, given)
        for handle, length in zip(handles, lengths, strict=True):
            tokens, prompt = self.rows[handle]
            self.rows[handle] = (tokens[:length], min(prompt, length))
        return handles

    def _score(self, chance: random.Random) -> None:
        self._score_rows(chance, self._some(chance))

    def _step(self, chance: random.Random) -> None:
        """Score and commit: mostly all rows, or some of them, or some of those scored."""
        handles = [h for h in self.rows if self._length(h) < LONGEST]
        if chance.random() < 0.3:
            handles = [h for h in handles if chance.random() < 0.6]
        self._commit(chance, handles, self._score_rows(chance, handles))

    def _late(self, chance: random.Random) -> None:
        """Rows come, go and change between a score and its commit, which is of the others."""
        handles = [h for h in self.rows if self._length(h) < LONGEST]
        ids = self._score_rows(chance, handles)
        if chance.random() < 0.7:
            self._leave(chance)
        if chance.random() < 0.7:
            self._join(chance)
        changed = self._crop(chance) + self._extend(chance) if chance.random() < 0.5 else []
        self._commit(chance, handles, ids, 0.7, changed)

    def _commit(
        self,
        chance: random.Random,
        handles: list[int],
        ids: Tensor | None,
        share: float = 1.0,
        changed: Sequence[int] = (),
    ) -> None:
        """Commit what `_score_rows` scored: in a `share` of the rows that are left, but for those
        that have `changed`."""
        slots = {}
        for i, handle in enumerate(handles):
            right = ids[i] != self.eos  # nothing follows EOS
            right = right if self.kept is None else right & self.kept[i]
            if (
                handle in self.rows
                and handle not in changed
                and right.any()
                and chance.random() < share
            ):
                slots[handle] = chance.choice(right.nonzero()[:, 0].tolist())
        if chance.random() < 0.2:
            slots = dict(list(slots.items())[::2])
        if not slots:
            return
        everyone = list(slots) == handles == list(self.rows) and chance.random() < 0.5
        self.scorer.commit(torch.tensor(list(slots.values())), *([] if everyone else [list(slots)]))
        for handle, slot in slots.items():
            self.rows[handle][0].append(int(ids[handles.index(handle), slot]))

    def _score_rows(self, chance: random.Random, handles: list[int]) -> Tensor | None:
        """Score candidates [n, K] of the rows, as full forwards do."""
        self.kept = None
        if not handles:
            return None
        order = torch.Generator().manual_seed(chance.randrange(2**20))
        ids = torch.stack([torch.randperm(zoo.VOCAB - 3, generator=order)[:K] + 3 for _ in handles])
        if self.eos >= 0:
            ids[:, chance.randrange(K)] = self.eos
        keep = None
        if self.skips and chance.random() < 0.4:
            keep = torch.rand(ids.shape, generator=order) < 0.5
            keep[0, 0] = True
            keep[:, chance.randrange(K)] |= chance.random() < 0.7
        self.kept = keep
        options = (
            {} if handles == list(self.rows) and chance.random() < 0.5 else {"handles": handles}
        )
        got = self.scorer.score(ids, **({} if keep is None else {"keep": keep}), **options)
        for i, handle in enumerate(handles):
            want = self._wanted(handle, ids[i])
            asked = slice(None) if keep is None else keep[i]
            torch.testing.assert_close(got[i][asked], want[asked], rtol=1e-4, atol=1e-4)
            assert got[i].isnan().sum() == (0 if keep is None else (~keep[i]).sum())
        return ids

    def _wanted(self, handle: int, ids: Tensor) -> Tensor:
        tokens, prompt = self.rows[handle]
        texts = torch.cat([torch.tensor(tokens).expand(K, -1), ids[:, None]], dim=1)
        rewards = self.reward(texts, prompt)
        if (ids == self.eos).any():
            before = self.reward(torch.tensor(tokens)[None], prompt)
            rewards = torch.where(ids == self.eos, before, rewards)
        return rewards

    def _some(self, chance: random.Random) -> list[int]:
        """Some of the rows, in any order."""
        handles = [h for h in self.rows if chance.random() < 0.4]
        chance.shuffle(handles)
        return handles

    def _length(self, handle: int) -> int:
        return len(self.rows[handle][0])

    @staticmethod
    def _tokens(chance: random.Random, least: int, most: int) -> list[int]:
        return [chance.randrange(3, zoo.VOCAB) for _ in range(chance.randint(least, max(0, most)))]


def assert_extents_are_apart(cache: Any) -> None:
    """No slot of a row is another's, and no row is longer than what it has."""
    slots = sorted(cache.extents)
    assert all(one.end <= other.start for one, other in itertools.pairwise(slots))
    assert slots[-1].end <= min(store.shape[2] for store in cache.stores)
    lengths = next(iter(cache.lengths.values())).tolist()
    for extent, length in zip(cache.extents, lengths, strict=True):
        assert cache.width + length <= extent.size
        assert length <= cache.length
