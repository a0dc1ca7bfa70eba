"""A scorer made of scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import RowScorer, Scorer
from .combine import Combination


class WeightedScorer:
    """One reward of several scorers, all on the same rows: `combination` of theirs.

    A candidate is scored by each part; one that can skip candidates gets `keep`. `weights` of the
    combination that are tensors are for the rows of `prefill`, in their order. After an exception
    within a call that changes rows, `finish` is the only way on.
    """

    method = "weighted"

    def __init__(self, parts: Sequence[Scorer], combination: Combination) -> None:
        self.parts, self.combination = list(parts), combination
        # The scorers that it is made of, of sums within it those.
        self.leaves = [s for part in self.parts for s in leaves_of(part)]
        self._begin(None)

    @property
    def can_skip(self) -> bool:
        return any(can_skip(part) for part in self.parts)

    @property
    def commits_unscored(self) -> str | None:
        """Those that cannot skip score everything, and can commit anything."""
        said = {getattr(p, "commits_unscored", None) for p in self.parts if can_skip(p)}
        return None if None in said or not said else "step" if "step" in said else "row"

    @property
    def capturable(self) -> bool:
        return all(getattr(part, "capturable", False) for part in self.parts)

    @property
    def caches(self) -> list[Any]:
        return [cache for part in self.parts for cache in getattr(part, "caches", ())]

    def known(self, ids: Tensor) -> Tensor | None:
        """Which of `ids` every part has a token for; None where that is so of all."""
        found = [p.known(ids) for p in self.parts if hasattr(p, "known")]
        masks = [mask.to(ids.device) for mask in found if mask is not None]
        return torch.stack(masks).all(0) if masks else None

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        self._begin(len(input_ids))
        for part in self.parts:
            part.prefill(input_ids, attention_mask)

    def score(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        return self._combined(ids, keep, [{}] * len(self.parts), None)

    def score_all(self) -> Tensor:
        """Rewards fp32 [B, V_r] of every token that a part has, -inf of one that another lacks."""
        rewards = [rewards_of_all(part) for part in self.parts]
        width = max(each.shape[1] for each in rewards)
        own = rewards[0].device
        return self.now([of_width(each.to(own), width) for each in rewards], None)

    def commit(self, slot: Tensor) -> None:
        for part in self.parts:
            part.commit(slot)

    def finish(self) -> None:
        """End the call in every part, also where ending it in one fails."""
        self._begin(None)
        ends: list[Callable[[], None]] = [p.finish for p in self.parts if hasattr(p, "finish")]
        _all_of(ends)

    def _begin(self, rows: int | None) -> None:
        """A call begins, with as many rows; None: with those that join."""
        self.now, self.drawn = self.combination, []  # type: tuple[Combination, list[int]]
        for name, value in self.combination.per_row if rows is not None else ():
            if len(value) != rows:
                raise ValueError(
                    f"{name} has {len(value)} values for {rows} rows; pass a float, or a value "
                    "for each"
                )

    def _combined(
        self, ids: Tensor, keep: Tensor | None, options: list[dict[str, Any]], rows: Tensor | None
    ) -> Tensor:
        rewards = []
        for part, own in zip(self.parts, options, strict=True):
            if keep is not None and can_skip(part):
                own = own | {"keep": keep}
            rewards.append(checked(part, part.score(ids, **own), ids))
        total = self.now(rewards, rows)
        return total if keep is None else total.masked_fill(~keep.to(total.device), torch.nan)


class WeightedRows(WeightedScorer):
    """The same of parts that are all `RowScorer`s: rows come and go in all of them at once.

    The handles are the first part's. Tensors among the weights have a value for each prompt:
    `of_prompts` says which ones join next.
    """

    parts: list[RowScorer]  # type: ignore[assignment]

    @property
    def handles(self) -> list[int]:
        return self.parts[0].handles

    def of_prompts(self, indices: Sequence[int]) -> None:
        """The rows that `join` next are of these prompts, of those that weights are given for."""
        for name, value in self.combination.per_row:
            if max(indices, default=-1) >= len(value):
                raise ValueError(f"{name} has {len(value)} values, and this is prompt {indices}")
        self.drawn = [*self.drawn, *indices]
        if self.combination.per_row:
            self.now = self.combination.at_rows(
                torch.tensor(self.drawn, dtype=torch.int64, device="cpu")
            )
        for part in self.parts:
            if isinstance(part, WeightedRows):
                part.of_prompts(indices)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        super().prefill(input_ids, attention_mask)
        self.drawn = list(range(len(input_ids)))

    def score(
        self, ids: Tensor, keep: Tensor | None = None, handles: Sequence[int] | None = None
    ) -> Tensor:
        rows = None
        if handles is not None:
            rows = torch.tensor(self._rows(handles), dtype=torch.int64, device="cpu")
        return self._combined(ids, keep, self._options(handles), rows)

    def commit(self, slot: Tensor, handles: Sequence[int] | None = None) -> None:
        for part, own in zip(self.parts, self._options(handles), strict=True):
            part.commit(slot, **own)  # type: ignore[call-arg]

    def join(self, prompts: Sequence[Tensor]) -> list[int]:
        if self.combination.per_row and len(self.drawn) != len(self.handles) + len(prompts):
            raise ValueError(
                f"weights have a value for each prompt, and which {len(prompts)} prompts join is "
                "not known; call of_prompts([...]) before, or pass floats"
            )
        before = len(self.handles)
        try:
            joined = [part.join(prompts) for part in self.parts]
        except BaseException:  # rows that are in some of the parts only leave these
            _all_of([lambda p=p: p.leave(p.handles[before:]) for p in self.parts])  # type: ignore[misc]
            raise
        return joined[0]

    def leave(self, handles: Sequence[int]) -> None:
        gone = set(self._rows(handles))
        kept = [row for row in range(len(self.handles)) if row not in gone]
        for part, own in zip(self.parts, self._own(handles), strict=True):
            part.leave(own)
        self._keep(kept)

    def extend(self, handles: Sequence[int], ids: Sequence[Tensor]) -> None:
        for part, own in zip(self.parts, self._own(handles), strict=True):
            part.extend(own, ids)

    def crop(self, handles: Sequence[int], lengths: Sequence[int] | Tensor) -> None:
        for part, own in zip(self.parts, self._own(handles), strict=True):
            part.crop(own, lengths)

    def keep_rows(self, rows: Tensor) -> None:
        """As `ScorerRows.keep_rows`."""
        for part in self.parts:
            part.keep_rows(rows)  # type: ignore[attr-defined]
        self._keep(rows.tolist())

    def _keep(self, rows: list[int]) -> None:
        if self.combination.per_row:
            self.drawn = [self.drawn[row] for row in rows]
            self.now = self.combination.at_rows(
                torch.tensor(self.drawn, dtype=torch.int64, device="cpu")
            )

    def _rows(self, handles: Sequence[int]) -> list[int]:
        """The numbers of the rows."""
        unknown = [handle for handle in handles if handle not in self.handles]
        if unknown or len(set(handles)) != len(handles):
            what = f"{unknown} are none of" if unknown else f"{list(handles)} name a row twice in"
            raise ValueError(f"handles: {what} the {len(self.handles)} rows {self.handles}")
        return [self.handles.index(handle) for handle in handles]

    def _own(self, handles: Sequence[int]) -> list[list[int]]:
        """Each part's handles of the rows; taken before any of them changes."""
        rows = self._rows(handles)
        return [[part.handles[row] for row in rows] for part in self.parts]

    def _options(self, handles: Sequence[int] | None) -> list[dict[str, Any]]:
        if handles is None:
            return [{}] * len(self.parts)
        return [{"handles": own} for own in self._own(handles)]


def combined(parts: Sequence[Scorer], combination: Combination) -> WeightedScorer:
    """The scorer made of `parts`, whose rows come and go where all of theirs do."""
    rows = all(isinstance(p, RowScorer) and hasattr(p, "keep_rows") for p in parts)
    return (WeightedRows if rows else WeightedScorer)(parts, combination)


def leaves_of(scorer: Any) -> list[Any]:
    """The scorers that a scorer is made of: itself, if it is no sum."""
    return scorer.leaves if isinstance(scorer, WeightedScorer) else [scorer]


def can_skip(scorer: Any) -> bool:
    """Whether it takes `score(ids, keep)`."""
    return bool(getattr(scorer, "can_skip", False))


def checked(scorer: Scorer, rewards: Any, ids: Tensor) -> Tensor:
    """The rewards, which must be a tensor of the shape of `ids`."""
    if not isinstance(rewards, Tensor):
        raise ValueError(
            f"{type(scorer).__name__}.score gave {type(rewards).__name__}; it must give a tensor "
            f"of rewards {list(ids.shape)}"
        )
    if rewards.shape != ids.shape:
        raise ValueError(
            f"rewards has shape {list(rewards.shape)} for candidates {list(ids.shape)}; "
            f"{type(scorer).__name__}.score must give one number for each candidate"
        )
    return rewards.to(ids.device)


def rewards_of_all(scorer: Any) -> Tensor:
    """The rewards [B, V_r] of every token; `ValueError` for anything else."""
    rewards = scorer.score_all()
    if not isinstance(rewards, Tensor) or rewards.dim() != 2:
        got = list(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(
            f"{type(scorer).__name__}.score_all gave {got}; it must give rewards [B, V] of every "
            "token behind every row"
        )
    return rewards


def of_width(rewards: Tensor, width: int) -> Tensor:
    """The first `width` columns of rewards [B, V_r]; those that are missing are -inf."""
    more = width - rewards.shape[1]
    return rewards if not more else pad(rewards, (0, more), value=-torch.inf)


def _all_of(calls: list[Callable[[], Any]]) -> None:
    """Make every call; the first exception of any is raised after the last."""
    failed: BaseException | None = None
    for call in calls:
        try:
            call()
        except BaseException as error:
            failed = failed or error
    if failed is not None:
        raise failed
