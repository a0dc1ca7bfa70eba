"""Texts in progress: rows of one batch, in the language model and in the reward.

join (a prompt is run once) -> select (copies, and what is dropped) -> draw ... -> judge
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList

from .. import ops
from ..decode.plan import ended
from ..decode.refill import Entry
from ..scorers.base import RowScorer
from ..scorers.causal import StaticForward
from ..scorers.expand import ExpandScorer
from ..scorers.implicit import LogprobScorer
from ..scorers.registry import KINDS
from ..scorers.rewrite import rewriters_of
from ..scorers.tree import SiblingScorer
from ..scorers.weighted import WeightedRows, leaves_of
from .cost import cache_bytes, tokens_cropped, tokens_joined, tokens_read
from .output import Candidate, Cost

_PER_TOKEN: Any = tuple(kind.make for kind in KINDS.values() if kind.per_token)


@dataclass
class Text:
    """A row: the tokens of its answer, log π of each of them, and what is known of it.

    The language model has run all of the text but its last `unfed` tokens, the reward all but the
    last `unread`; `reward` is that of what it has read. Copies share the `cost`."""

    entry: Entry
    cost: Cost
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reward: float = math.nan
    unfed: int = 0
    unread: int = 0
    ended: bool = False
    error: str | None = None

    def ids(self) -> Tensor:
        """Prompt and answer int64 [1, P + t]."""
        answer = torch.tensor(self.tokens, dtype=torch.int64, device=self.entry.ids.device)
        return torch.cat([self.entry.ids, answer])[None]

    def __len__(self) -> int:
        return len(self.entry.ids) + len(self.tokens)


class Texts:
    """Rows in the order of `rows`, in `lm` and in `scorer` alike.

    `processors` (of scores alone) are those of all rows that have none of their own, `eos` the
    tokens that end an answer, `not_first` one that begins none. `hidden` [B, H] are the language
    model's states behind each row, `scores` fp32 [B, V] the logits of these, processed: π is their
    softmax; `entropy` [B] is that of the logits before it, in nats.
    """

    def __init__(
        self,
        lm: StaticForward,
        scorer: RowScorer,
        processors: LogitsProcessorList,
        eos: set[int],
        tokenizer: Any,
        backend: ops.Backend,
        not_first: int | None,
    ) -> None:
        self.lm, self.scorer, self.processors = lm, scorer, processors
        self.eos, self.tokenizer, self.backend = eos, tokenizer, backend
        self.not_first = not_first
        self.rows: list[Text] = []
        self.hidden = torch.zeros((0, 0), device=lm.device)
        self.scores = torch.zeros((0, 0), dtype=torch.float32, device=lm.device)
        self.entropy: list[float] = []
        kinds = {
            isinstance(x, _PER_TOKEN) and not isinstance(x, LogprobScorer) for x in self._parts
        }
        if len(kinds) > 1:
            raise ValueError(
                "reward_model is a sum of rewards of single tokens and of whole texts, of which a "
                "text has no one reward; pass parts of one kind"
            )
        (self.per_token,) = kinds

    @property
    def _parts(self) -> list[Any]:
        return leaves_of(self.scorer)

    @torch.no_grad()
    def join(self, entries: Sequence[Entry]) -> None:
        """Rows with these prompts come in behind the others; each prompt is run once."""
        if isinstance(self.scorer, WeightedRows):
            self.scorer.of_prompts([entry.index for entry in entries])
        for rewriter in rewriters_of(self.scorer):
            rewriter.expect([e.index for e in entries], [e.steps for e in entries])
        prompts = [entry.ids for entry in entries]
        self.scorer.join(prompts)
        hidden = self.lm.join([prompt.to(self.lm.device) for prompt in prompts])
        new = [Text(entry, Cost()) for entry in entries]
        self.rows += new
        for text in new:
            text.reward = 0.0 if self.per_token else math.nan
            text.cost.lm_tokens += len(text)
            text.cost.reward_tokens += tokens_joined(self.scorer, len(text))
        scores, entropy = self._scores(hidden, new)
        there = len(self.rows) > len(new)
        self.hidden = torch.cat([self.hidden, hidden]) if there else hidden
        self.scores = torch.cat([self.scores, scores]) if there else scores
        self.entropy = self.entropy + entropy
        self._weigh()

    @torch.no_grad()
    def prompt_rewards(self, first: int, otherwise: str) -> list[float]:
        """r(x) of the prompts of rows `first` and behind it, which have just joined; 0 where
        rewards are of single tokens. A row of which it is not known fails, and is told what to do
        `otherwise`."""
        rows = range(first, len(self.rows))
        if self.per_token:
            return [0.0 for _ in rows]
        rewards = self._prompt_rewards(self.scorer, first)[:, 0].tolist()
        for row, reward in zip(rows, rewards, strict=True):
            if not math.isfinite(reward):
                self.fail(
                    row,
                    f"the reward of the prompt alone is {reward} (of a prompt of one token most "
                    f"scorers know none), and {otherwise}",
                )
        return rewards

    def _prompt_rewards(self, scorer: Any, first: int) -> Tensor:
        """The same [n, 1] of a part of the reward; NaN where there is none."""
        if isinstance(scorer, WeightedRows):
            parts = [self._prompt_rewards(part, first) for part in scorer.parts]
            rows = torch.arange(first, len(self.rows), dtype=torch.int64, device="cpu")
            return scorer.now(parts, rows)
        if isinstance(scorer, SiblingScorer | ExpandScorer):
            return scorer.last_reward[first:, None].cpu()
        if isinstance(scorer, LogprobScorer):  # a sum over the tokens of the answer
            return torch.zeros((len(self.rows) - first, 1), device="cpu")
        rewards = [self._prompt_reward(scorer, text) for text in self.rows[first:]]
        return torch.tensor(rewards, dtype=torch.float32, device="cpu")[:, None]

    def _prompt_reward(self, scorer: Any, text: Text) -> float:
        """The reward of a prompt's last token behind those before it, in a row of its own; NaN
        where there are none."""
        ids = text.entry.ids
        if len(ids) == 1:
            return math.nan
        (handle,) = scorer.join([ids[:-1]])
        try:
            reward = scorer.score(ids[None, -1:], handles=[handle])
        finally:
            scorer.leave([handle])
        joined = tokens_joined(scorer, len(ids) - 1)
        text.cost.reward_tokens += joined + tokens_read(scorer, len(ids) - 1, 0, 1)
        text.cost.rewards += 1
        return float(reward)

    @torch.no_grad()
    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; one named again is copied."""
        if list(rows) == list(range(len(self.rows))):
            return
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.lm.device)
        self.lm.keep_rows(index)
        self.scorer.keep_rows(index)  # type: ignore[attr-defined]
        chosen = [self.rows[row] for row in rows]
        self.rows = [
            replace(text, tokens=list(text.tokens), logprobs=list(text.logprobs)) for text in chosen
        ]
        self.hidden = self.hidden[index.to(self.hidden.device)]
        self.scores = self.scores[index]
        self.entropy = [self.entropy[row] for row in rows]
        self._weigh()

    @torch.no_grad()
    def draw(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """One more token of π in each of these rows, with the noise of its seed, the token's place
        in the answer, and its id: the same whatever the batch."""
        if not rows:
            return
        self.advance(rows)
        for row, token, logprob in self.drawn(rows, seeds):
            self.add(row, [token], [logprob])

    def drawn(
        self, rows: Sequence[int], seeds: Sequence[int] | None
    ) -> list[tuple[int, int, float]]:
        """A token of π for each of these rows, which the language model has run, with log π of it:
        drawn as in `draw`, or without seeds the most likely one. Rows that have none fail."""
        noise: tuple[Any, ...] = ()
        if seeds is not None:
            own = torch.tensor(list(seeds), dtype=torch.int64, device=self.scores.device)
            noise = 1.0, own, self.positions(rows)
        scores = [self.scores[list(rows)]]
        found = ops.mix_logits(scores, [1.0], 1, None, *noise, backend=self.backend)
        best, ids, logprobs = (column[:, 0].tolist() for column in found[:3])
        drawn = []
        for row, score, token, logprob in zip(rows, best, ids, logprobs, strict=True):
            if math.isfinite(score):
                drawn.append((row, token, logprob))
            else:
                self.fail(row, "the language model's logits contain NaN, or leave no token")
        return drawn

    def positions(self, rows: Sequence[int]) -> Tensor:
        """How many tokens the answers have, int64 [n]."""
        counts = [len(self.rows[row].tokens) for row in rows]
        return torch.tensor(counts, dtype=torch.int64, device=self.scores.device)

    def add(self, row: int, tokens: list[int], logprobs: list[float]) -> None:
        """Append tokens to a row, which neither model has run."""
        text = self.rows[row]
        text.tokens += tokens
        text.logprobs += logprobs
        text.unfed += len(tokens)
        text.unread += len(tokens)
        if text.entry.criteria is not None:
            text.ended = bool(ended(text.entry.criteria, text.ids(), None))
        else:
            text.ended = text.tokens[-1] in self.eos
        text.ended |= len(text.tokens) >= text.entry.steps

    def fail(self, row: int, what: str) -> None:
        """A row ends, as nothing can follow."""
        text = self.rows[row]
        text.ended = True
        text.error = text.error or f"step {len(text.tokens)}: {what}; check the inputs and models"

    @torch.no_grad()
    def advance(self, rows: Sequence[int]) -> None:
        """Run the language model on what it has not run of these rows: their `scores`."""
        behind = [row for row in rows if self.rows[row].unfed]
        if not behind:
            return
        texts, device = [self.rows[row] for row in behind], self.lm.device
        new = [torch.tensor(text.tokens[-text.unfed :], device=device) for text in texts]
        whole = len(behind) == len(self.rows) and behind == sorted(behind)
        index = None if whole else torch.tensor(behind, dtype=torch.int64, device=device)
        if max(map(len, new)) == 1:
            hidden = self.lm.step(torch.stack(new), index)
        else:
            counts = torch.tensor([len(ids) for ids in new], dtype=torch.int64, device=device)
            padded = pad_sequence(new, batch_first=True)
            states = self.lm.forward.extend(padded, counts, index)
            hidden = states[torch.arange(len(behind), device=states.device), counts - 1]
        for text in texts:
            text.cost.lm_tokens += text.unfed
            text.unfed = 0
        self.restore(behind, hidden)
        self._weigh()

    @torch.no_grad()
    def restore(self, rows: Sequence[int], hidden: Tensor) -> None:
        """Have `scores` and `entropy` behind these rows, of the language model's states [n, H]
        behind them."""
        scores, entropy = self._scores(hidden, [self.rows[row] for row in rows])
        self.hidden[list(rows)], self.scores[list(rows)] = hidden, scores
        for row, nats in zip(rows, entropy, strict=True):
            self.entropy[row] = nats

    @torch.no_grad()
    def read(self, rows: Sequence[int]) -> None:
        """Have the reward read these rows to their ends; `reward` stays what it was."""
        behind = [row for row in rows if self.rows[row].unread]
        if not behind:
            return
        texts = [self.rows[row] for row in behind]
        new = [
            torch.tensor(text.tokens[-text.unread :], dtype=torch.int64, device="cpu")
            for text in texts
        ]
        self.scorer.extend([self.scorer.handles[row] for row in behind], new)
        for text in texts:
            length = len(text) - text.unread
            text.cost.reward_tokens += tokens_read(self.scorer, length, text.unread, 0)
            text.unread = 0
        self._weigh()

    @torch.no_grad()
    def judge(self, rows: Sequence[int]) -> None:
        """The rewards of these rows, of their whole texts."""
        while True:
            behind = [row for row in rows if self.rows[row].unread]
            if not behind:
                return
            texts = [self.rows[row] for row in behind]
            # A reward of single tokens is asked for each of them, any other for the last alone.
            new = [1 if self.per_token else text.unread for text in texts]
            parts = [
                text.tokens[len(text.tokens) - text.unread :][:count]
                for text, count in zip(texts, new, strict=True)
            ]
            handles = [self.scorer.handles[row] for row in behind]
            before = [torch.tensor(part[:-1], dtype=torch.int64, device="cpu") for part in parts]
            self.scorer.extend(handles, before)
            last = torch.tensor([part[-1:] for part in parts], dtype=torch.int64, device="cpu")
            for row, reward in zip(behind, self.ask(behind, last)[:, 0].tolist(), strict=True):
                text = self.rows[row]
                text.reward = text.reward + reward if self.per_token else reward
            self.commit(behind, torch.zeros(len(behind), dtype=torch.int64, device="cpu"))
            for text, count in zip(texts, new, strict=True):
                text.unread -= count

    def ask(self, rows: Sequence[int], ids: Tensor) -> Tensor:
        """Rewards fp32 [n, k], on the CPU, of candidates `ids` [n, k] behind what the scorer has
        read of these rows; a row with a NaN or +inf among them fails."""
        handles = [self.scorer.handles[row] for row in rows]
        given = ids.to(self.lm.device)
        rewards = self.scorer.score(given, handles=handles).float().cpu()  # type: ignore[call-arg]
        bad = (rewards.isnan() | (rewards == torch.inf)).any(1).tolist()
        for row, wrong, of_row in zip(rows, bad, rewards, strict=True):
            text, k = self.rows[row], ids.shape[1]
            new = 0 if self.per_token else max(text.unread - 1, 0)
            length = len(text) - text.unread
            text.cost.reward_tokens += tokens_read(self.scorer, length, new, k)
            text.cost.rewards += k
            if wrong:
                self.fail(row, f"the reward model gave {of_row.tolist()}")
        self._weigh()
        return rewards

    def commit(self, rows: Sequence[int], slots: Tensor) -> None:
        """Append candidates `slots` [n] of the last `ask` to these rows in the scorer."""
        handles = [self.scorer.handles[row] for row in rows]
        self.scorer.commit(slots.to(self.lm.device), handles)  # type: ignore[call-arg]

    @torch.no_grad()
    def take_back(self, rows: Sequence[int], kept: Sequence[int]) -> None:
        """Forget all but the first `kept` tokens of the answers of these rows. What is behind what
        is kept, and the reward of it, is the caller's to put back."""
        texts = [self.rows[row] for row in rows]
        lengths = [len(text.entry.ids) + n for text, n in zip(texts, kept, strict=True)]
        gone = [len(text) - length for text, length in zip(texts, lengths, strict=True)]
        device = self.lm.device
        # What a model has not run, its cache has not: cropping it to more would make it longer.
        ran = [i for i, text in enumerate(texts) if text.unfed < gone[i]]
        if ran:
            index = torch.tensor([rows[i] for i in ran], dtype=torch.int64, device=device)
            to = torch.tensor([lengths[i] for i in ran], dtype=torch.int64, device=device)
            self.lm.forward.crop(to, index)
        read = [i for i, text in enumerate(texts) if text.unread < gone[i]]
        if read:
            handles = [self.scorer.handles[rows[i]] for i in read]
            self.scorer.crop(handles, [lengths[i] for i in read])
        for i, (text, n) in enumerate(zip(texts, kept, strict=True)):
            del text.tokens[n:], text.logprobs[n:]
            text.unfed = max(0, text.unfed - gone[i])
            text.unread = max(0, text.unread - gone[i])
            text.ended = False
            text.cost.reward_tokens += tokens_cropped(self.scorer) if i in read else 0

    def candidate(self, row: int, weight: float | None = None) -> Candidate:
        """A row as the caller gets it."""
        text = self.rows[row]
        decoded = None
        if self.tokenizer is not None:
            decoded = self.tokenizer.decode(text.tokens, skip_special_tokens=True)
        logprob = math.fsum(text.logprobs)
        return Candidate(list(text.tokens), decoded, text.reward, logprob, weight)

    def _scores(self, hidden: Tensor, texts: Sequence[Text]) -> tuple[Tensor, list[float]]:
        """Processed logits fp32 [n, V] behind texts, and the entropies [n] of the raw ones."""
        logits = self.lm.logits(hidden).to(torch.float32, copy=True)
        if self.not_first is not None:
            # Before the processors: what is kept of the most likely must not be this token alone.
            logits[[i for i, x in enumerate(texts) if not x.tokens], self.not_first] = -torch.inf
        logp = logits.log_softmax(-1)
        terms = torch.where(logp > -torch.inf, logp.exp() * logp, 0.0)
        entropy = (-terms.sum(-1)).tolist()
        own = [i for i, text in enumerate(texts) if text.entry.processors is not None]
        if not own:
            none = torch.zeros((len(texts), 1), dtype=torch.int64, device=logits.device)
            return self.processors(none, logits), entropy  # type: ignore[arg-type]
        rows = []
        for i, text in enumerate(texts):
            processors = text.entry.processors
            processors = self.processors if processors is None else processors
            rows.append(processors(text.ids().to(logits.device), logits[i : i + 1]))  # type: ignore[arg-type]
        return torch.cat(rows), entropy

    def _weigh(self) -> None:
        """Note what the caches hold now."""
        total = self.lm.forward.cache.nbytes() + cache_bytes(self.scorer)
        for text in self.rows:
            text.cost.cache_bytes = max(text.cost.cache_bytes, total)
