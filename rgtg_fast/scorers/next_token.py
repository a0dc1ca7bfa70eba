"""What scorers share that give every next token a reward from one forward of the prefix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import ops
from ..models.cache import SiblingCache
from ..models.compiled import CompiledSiblings
from ..models.copies import RowCaches, empty_cache
from ..models.language_model import LanguageModel
from ..models.padding import at_counts, groups_of_like_length, left_padded, positions_of
from ..models.parts import ModelParts, computing_dtype, numerics
from .base import put
from .causal import StaticForward, language_model
from .probe import TOLERANCE
from .rows import ScorerRows, Texts

# Of each model, by what it computes in: whether its tokens may come one by one on its own cache.
_cached_right: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()


class NextTokenScorer(ScorerRows):
    """A causal model on a cache of its own, one token a step; subclasses say what a candidate gets.

    `commit` only notes the winner; the next `score` runs its forward, so none is spent on the last
    token. The cache is static and updated in place where a probe finds that right for the model,
    and else Hugging Face's. `capacity`, which `generate` sets: prompt and answer, in tokens.
    """

    method = "next_token"
    notes = False  # whether `_note` is to hear of every token that rows are extended with
    capacity = 0
    reserved = 0  # slots of the cache
    compiled: CompiledSiblings | None = None  # the forward of one call; set before its prompts
    static: StaticForward | None  # for one call
    parts: ModelParts  # without a static cache
    rows: RowCaches
    head: Any
    texts: Texts
    state: Tensor  # [B, ..], what candidates are scored with, of the last token that was run
    chosen: Tensor  # int64 [B], the last token
    waiting: list[bool]  # of each row: whether the forward of `chosen` is still to be run

    def __init__(self, model: nn.Module, backend: ops.Backend = "auto") -> None:
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings over the vocabulary; pass a "
                "causal LM (AutoModelForCausalLM)"
            )
        self.model, self.rm, self.backend = model, ModelParts(model), backend
        self.vocabulary = self.rm.vocab_size
        self.begin(0)

    @property
    def device(self) -> torch.device:
        return self.rm.device

    def reserve(self, tokens: int) -> None:
        """Make room for rows of up to `tokens`, prompt and answer."""
        self.capacity = self.reserved = tokens

    def _taken_apart(self) -> LanguageModel | None:
        """The model's parts, where it runs on a static cache."""
        found = language_model(self.model, self.capacity or None, self.backend)
        return found[0] if found is not None and found[1] == "fused" else None

    @property
    def capturable(self) -> bool:
        return self._taken_apart() is not None

    @property
    def caches(self) -> Sequence[SiblingCache]:
        return () if self.static is None else (self.static.forward.cache,)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Prompts int64 [B, P] and their mask [B, P], padding on the left."""
        ids, mask = input_ids.to(self.rm.device), attention_mask.to(self.rm.device)
        self._start()
        self.begin(len(ids))
        if self.static is None:
            self.state, cache = self._run(ids, positions_of(mask), mask)
            self.rows.begin(cache, mask, 1)
        else:
            self.state = self._of_hidden(self.static, self.static.prefill(ids, mask))
        self.texts = Texts(ids, mask, self.reserved)
        self.chosen = ids[:, -1].clone()
        self.waiting = [False] * len(ids)

    @torch.no_grad()
    def score(
        self, ids: Tensor, keep: Tensor | None = None, handles: Sequence[int] | None = None
    ) -> Tensor:
        """Rewards fp32 [n, k] of the candidates `ids` int64 [n, k] behind the prefix of each row;
        -inf for ids past this model's vocabulary, NaN for those not in `keep` bool [n, k]."""
        self.scored = []
        names, rows = self.rows_of(handles)
        self.check_candidates(ids, len(names))
        if not names:
            return torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        self._catch_up(rows)
        self.ids, self.scored = ids.to(self.device, torch.int64), list(names)
        last = self.head.weight.shape[0] - 1
        state = self.state if rows is None else self.state[rows]
        rewards = self._rewards(state, self.ids.clamp(max=last))
        rewards = rewards.masked_fill(self.ids > last, -torch.inf)
        if keep is not None:
            rewards = rewards.masked_fill(~keep.to(self.device), torch.nan)
        return rewards.to(ids.device)

    @torch.no_grad()
    def score_all(self) -> Tensor:
        """Rewards [B, V_r] of every token of this model behind the prefixes of all rows."""
        self._catch_up(None)
        return self._rewards_of_all(self.state)

    @torch.no_grad()
    def commit(self, slot: Tensor, handles: Sequence[int] | None = None) -> None:
        """Append candidate `slot` int64 [n] of the last scored ids to the rows."""
        rows, at = self.scored_rows(handles, slot)
        if not len(slot):
            return
        slot = slot.to(self.device, torch.int64)
        ids = self.ids if at is None else self.ids[at]
        chosen = ids.gather(1, slot[:, None]).clamp(max=self.head.weight.shape[0] - 1)
        put(self.chosen, chosen[:, 0], rows)
        self.texts.extend(chosen, 1, rows)
        self._set_waiting(rows, True)
        self._committed(slot, rows, at)

    def _committed(self, slot: Tensor, rows: Tensor | None, at: Tensor | None) -> None:
        """Candidates `slot` [n] have joined the rows; `at` are their places among those scored."""

    def finish(self) -> None:
        """Let go of the call's cache, twin and logits."""
        for name in (
            *("static", "parts", "rows", "head", "texts", "state", "chosen", "ids", "waiting"),
            "compiled",
        ):
            self.__dict__.pop(name, None)
        self.begin(0)

    def _start(self) -> None:
        """Begin a call."""
        self.rm = ModelParts(self.model)  # anew: its modules may have changed
        view = self._taken_apart()
        if view is None:
            self.static, self.parts = None, self.rm.twin()
            self._check_cache()
            self.rows = RowCaches(self.parts.text_config)
            self.head = self.parts.model.get_output_embeddings()  # type: ignore[operator]
        else:
            self.static = StaticForward(view, self.reserved, self.backend, eval_mode=True)
            self.static.forward.compiled = self.compiled
            self.head = self.static.rest.output_embeddings()

    @torch.no_grad()
    def _check_cache(self) -> None:
        """`ValueError` where tokens that come one by one on Hugging Face's cache give other states
        than all at once, as those of recurrent layers do."""
        known = _cached_right.setdefault(self.model, {})
        key = self.rm.dtype, str(self.device), numerics(self.device)
        if key not in known:
            ids = torch.arange(1, 7, device=self.device)[None].expand(2, -1) % self.rm.vocab_size
            mask = torch.ones_like(ids)
            want, _ = self._run(ids, positions_of(mask), mask)
            _, cache = self._run(ids[:, :3], positions_of(mask[:, :3]), mask[:, :3])
            rows, got = RowCaches(self.parts.text_config), want
            rows.begin(cache, mask[:, :3], 1)
            for at in range(3, 6):
                batch = rows.batch_of(None, 1)
                got, _ = batch.feed(self._forward, ids[:, at : at + 1], mask[:, :1])
                batch.fed = 0
            allowed = TOLERANCE[computing_dtype(self.rm)] * want.float().std()
            known[key] = not bool((got.float() - want.float()).abs().max() > allowed)
        if not known[key]:
            raise ValueError(
                f"{type(self.model).__name__} gives other states where its tokens come one by one "
                "than where they come at once (layers with a recurrent state), so it cannot reward "
                "next tokens; pass a transformer, or a classifier as reward_model"
            )

    def _join(self, prompts: list[Tensor]) -> None:
        if "static" not in self.__dict__:
            self._start()
            self.texts, self.waiting = Texts(*left_padded(prompts[:1])), []
            self.texts.keep_rows(torch.zeros(0, dtype=torch.int64, device=self.device))
            self.chosen = prompts[0].new_zeros(0)
        states = [] if not len(self.chosen) else [self.state]
        if self.static is None:
            for group in groups_of_like_length(prompts):
                ids, mask = left_padded(group)
                state, cache = self._run(ids, positions_of(mask), mask)
                self.rows.join(cache, mask)
                states.append(state)
        else:
            states.append(self._of_hidden(self.static, self.static.join(prompts)))
        self.state = torch.cat(states)
        self.texts.join(*left_padded(prompts))
        self.chosen = torch.cat([self.chosen, *(prompt[-1:] for prompt in prompts)])
        self.waiting = [*self.waiting, *([False] * len(prompts))]

    def _extend(self, ids: Tensor, counts: Tensor, rows: Tensor | None) -> None:
        self._catch_up(rows)
        numbers = torch.arange(len(self.chosen), device=self.device) if rows is None else rows
        before = self.texts.counts[numbers]
        self.texts.extend(ids, counts, rows)
        if self.static is not None:
            hidden = self.static.forward.extend(ids, counts, rows)
            for at in range(ids.shape[1] if self.notes else 0):
                real = counts > at
                state = self.state[numbers[real]]
                if at:
                    state = self._of_hidden(self.static, hidden[real, at - 1])
                self._note(state, ids[real, at], before[real] + at, numbers[real])
            real = counts > 0
            state = self._of_hidden(self.static, at_counts(hidden, counts)[:, 0][real])
            self.state[numbers[real]] = state.to(self.state.dtype)
        else:
            for at in range(ids.shape[1]):
                real = counts > at
                if self.notes:
                    self._note(
                        self.state[numbers[real]], ids[real, at], before[real] + at, numbers[real]
                    )
                self._step(ids[real][:, at : at + 1], numbers[real])
        last = at_counts(ids[..., None], counts)[:, 0, 0]
        put(self.chosen, last.where(counts > 0, self.chosen[numbers]), rows)

    def _crop(self, lengths: Tensor, rows: Tensor | None) -> None:
        last = self.texts.crop(lengths, rows)
        # A row that waits has one token fewer in its cache, and stays so.
        if self.static is not None:
            self.static.forward.crop(lengths - 1, rows)
        else:
            self.rows.cut(lengths - 1, rows)
        put(self.chosen, last, rows)
        self.texts.extend(last[:, None], 1, rows)
        self._set_waiting(rows, True)

    def _keep_rows(self, rows: Tensor) -> None:
        self.state, self.chosen = self.state[rows], self.chosen[rows]
        self.texts.keep_rows(rows)
        self.waiting = [self.waiting[row] for row in rows.tolist()]
        if self.static is None:
            self.rows.keep_rows(rows)
        else:
            self.static.keep_rows(rows)

    def _tokens(self) -> Tensor:
        return self.texts.counts

    def _set_waiting(self, rows: Tensor | None, waiting: bool) -> None:
        for row in range(len(self.waiting)) if rows is None else rows.tolist():
            self.waiting[row] = waiting

    def _catch_up(self, rows: Tensor | None) -> None:
        """Run the forward of the last tokens of the rows, where it is still to be run."""
        numbers = range(len(self.waiting)) if rows is None else rows.tolist()
        behind = [row for row in numbers if self.waiting[row]]
        if not behind:
            return
        whole = rows is None and len(behind) == len(self.waiting)
        own = None if whole else torch.tensor(behind, dtype=torch.int64, device=self.device)
        chosen = self.chosen if own is None else self.chosen[own]
        self._step(chosen[:, None], own)
        self._set_waiting(own, False)

    def _step(self, ids: Tensor, rows: Tensor | None) -> None:
        """Run one more token int64 [n, 1] of the rows."""
        if self.static is None:
            batch = self.rows.batch_of(rows, 1)
            state, _ = batch.feed(self._forward, ids, torch.ones_like(ids))
            batch.fed = 0
        else:
            state = self._of_hidden(self.static, self.static.step(ids, rows))
        if rows is None:
            self.state = state
        else:
            self.state[rows] = state.to(self.state.dtype)

    def _run(self, ids: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """The state of prompts, and Hugging Face's cache filled with them."""
        cache = empty_cache(self.parts.text_config)
        options = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
        return self._forward(ids, cache=cache, **options)

    def _note(self, states: Tensor, ids: Tensor, places: Tensor, rows: Tensor) -> None:
        """Tokens `ids` [n] come behind prefixes of these states [n, ..], to places [n] of rows."""

    @abstractmethod
    def _of_hidden(self, static: StaticForward, hidden: Tensor) -> Tensor:
        """What candidates are scored with [B, ..], of the last hidden states [B, H]."""

    @abstractmethod
    def _forward(self, ids: Tensor, cache: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """The same by the model's own forward, and the cache."""

    @abstractmethod
    def _rewards(self, state: Tensor, ids: Tensor) -> Tensor:
        """Rewards fp32 [n, k] of `ids` [n, k] out of the state [n, ..] of their rows."""

    @abstractmethod
    def _rewards_of_all(self, state: Tensor) -> Tensor:
        """Rewards [n, V_r] of every token out of the same."""
