"""Backtracking: a language model whose backspace token takes back the token before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..decode import options as numbers
from ..decode.refill import Entry
from ..scorers.rewrite import rewriters_of
from ..scorers.rows import ScorerRows
from .batch import Batch
from .checks import real
from .output import SequenceAnswer
from .prompt_rewards import prompt_rewards
from .run import Run

_STEPS_OF_A_TOKEN = 4  # steps that an answer may take, by default, for each token it may have


def backtracking(
    model: Any,
    prompts: Iterable[Any],
    *,
    backspace_token_id: int,
    reward_model: Any = None,
    k: int | None = 10,
    beta: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 16,
    tokenizer: Any = None,
    **options: Any,
) -> Iterator[SequenceAnswer]:
    """Decode a model with a backspace token, which un-does the last token of the text; guided or
    not.

    The process of SequenceMatch (Cundy & Ermon, arXiv 2306.05426), and its ratio policy. At each
    step one token v is drawn, behind the text y as it stands, from

        softmax(log π(v | x, y) + beta r(x, y v))    over the `k` most likely tokens of π.

    A backspace takes the last token of y back, and the process goes on as if that had never been:
    for it r(x, y v) is the reward of the text that it leads to, y without its last token (of the
    prompt alone, where y has one token; of a reward of single tokens, minus that of the token
    taken back: one that is never positive, as GenARM's log-probabilities, speaks for every
    backspace, the more the larger `beta`). The reward model never sees it. Where y is empty there
    is nothing to un-do, and π is without the backspace. An answer ends as elsewhere, with EOS, a
    stopping criterion or at its longest, and cannot be taken back then; or as it stands after
    `max_steps` draws.

    Args:
        model: a causal language model that has been trained with such a token.
        prompts, tokenizer, options: as for `best_of`; `temperature` too makes π, so that the
            softmax((log π + b r) / T) of `generate` is `temperature=T` with `beta=b / T`. With
            `do_sample=False` the best token is taken at each step; as a model that would take back
            what it prefers then goes in circles, `max_steps` is what ends it.
        backspace_token_id: `tokenizer.convert_tokens_to_ids("<backspace>")`, for one.
        reward_model: as for `generate`, or None: tokens are drawn from π. It may have no row for
            the backspace. It must know rewards of prompts: of one token most scorers of whole texts
            do not, and such a prompt gives an error.
        k: candidates of a step, up to 64. None, without a reward model: the whole vocabulary.
        beta: β, of the reward.
        max_steps: draws of an answer, backspaces included; None: 4 for each of its tokens.
        batch_size: prompts at a time; where one's answer is done, the next takes its place.
            Draws do not depend on it: the first one at a place of the answer has the row's seed
            (without a backspace, answers are those of `generate_many`), draw i > 0 at it
            `ops.split_seed(seed, i + 1)[i]`.

    Returns:
        An iterator of a `SequenceAnswer` for each prompt, in the order they end, with `steps` and
        `undone`; steps = len(tokens) + 2 undone. `logprob` is the sum of log π of the tokens of
        the text, each behind those before it and among all tokens that might have been drawn there,
        the backspace one of them; it is not the probability that the process ends in this text,
        which is a sum over all ways to it. Of each prefix of a row are kept its k candidates (with
        k=None the last hidden state), so that un-doing runs no model.

    Raises:
        ValueError: as `best_of`; a backspace that is no token of the model, or EOS, padding or the
            unknown token, or not the one that the model was trained with; k=None with a reward
            model.

    Example::

        back = tokenizer.convert_tokens_to_ids("<backspace>")
        options = {"tokenizer": tokenizer, "max_new_tokens": 64, "seed": 0}
        for answer in rgtg_fast.backtracking(
            lm, texts, backspace_token_id=back, reward_model=rm, **options
        ):
            print(answer.text, answer.reward, answer.undone)
    """
    rule = _Rule(
        numbers.integer("backspace_token_id", backspace_token_id, 0),
        None if k is None else numbers.integer("k", k, 1, 64),
        real("beta", beta),
        None if max_steps is None else numbers.integer("max_steps", max_steps, 1),
        reward_model is not None,
    )
    batch_size = numbers.integer("batch_size", batch_size, 1)
    if k is None and rule.guided:
        raise ValueError(
            "k=None draws from the whole vocabulary, and reward_model is asked for candidates; "
            "pass k from 1 to 64, or no reward model"
        )
    run = Run(
        model,
        reward_model if rule.guided else _NoReward(),
        tokenizer,
        options,
        backspace=rule.backspace,
        greedy=True,
        k=rule.k or 1,
    )
    _check(run)
    return run.in_turn(prompts, lambda: _Backtracking(run, rule, batch_size).answers(prompts))


def _check(run: Run) -> None:
    """The backspace must be a token of its own, and nothing else may write it."""
    back: Any = run.backspace
    vocabulary = run.model.get_input_embeddings().weight.shape[0]
    if back >= vocabulary:
        raise ValueError(
            f"backspace_token_id={back}, but model has {vocabulary} tokens (0 to {vocabulary - 1})"
        )
    unknown = getattr(run.tokenizer, "unk_token_id", None)  # what a name that it lacks is taken for
    others = {"eos": run.eos, "pad": {run.kwargs.get("pad_token_id")}, "unk": {unknown}}
    for name, ids in others.items():
        if back in ids:
            raise ValueError(
                f"backspace_token_id={back} is {name}_token_id; pass the id of a token that has no "
                "other use"
            )
    trained = getattr(run.model.config, "backspace_token_id", None)  # sequencematch says so
    if trained not in (None, back):
        raise ValueError(
            f"backspace_token_id={back}, but model was trained with {trained}; pass that"
        )
    if any(rewriter.drafts is None for rewriter in rewriters_of(run.call.scorer)):
        raise ValueError(
            "reward_model rewrites drafts of the language model, in which its backspaces would be "
            "tokens; pass RewriteScorer(rm, drafts=...)"
        )


@dataclass(frozen=True)
class _Rule:
    """The numbers of the method."""

    backspace: int
    k: int | None
    beta: float
    max_steps: int | None
    guided: bool


@dataclass
class _Path:
    """The prefixes of a row's text, from the prompt alone to the text itself."""

    entry: Entry
    rewards: list[float]  # of each
    # Behind each, as far as it was looked at: log π, rewards and ids [k] of the candidates, or
    # with the whole vocabulary the language model's state [H].
    known: list[tuple[Tensor, ...]] = field(default_factory=list)
    draws: list[int] = field(default_factory=list)  # at each place
    seeds: list[int] = field(default_factory=list)
    steps: int = 0
    undone: int = 0

    def seed(self, place: int) -> int:
        """Of the next draw at a place of the answer."""
        if place == len(self.draws):
            self.draws.append(0)
        i = self.draws[place]
        if i >= len(self.seeds):
            self.seeds = ops.split_seed(self.entry.seed, 2 * i + 8).tolist()
            self.seeds[0] = self.entry.seed
        return self.seeds[i]


class _Backtracking(Batch[_Rule, _Path]):
    """The rows; the state of each is its path."""

    def _join(self, entries: list[Entry]) -> None:
        first = len(self.texts.rows)
        self.texts.join(entries)
        rewards = [0.0] * len(entries)
        if self.rule.guided:
            rewards = prompt_rewards(
                self.texts,
                first,
                "taking back an answer's first token leads there; pass a prompt of two tokens or "
                "more",
            )
        for row, reward in enumerate(rewards, first):
            self.states.append(_Path(entries[row - first], [reward]))
            self.texts.rows[row].reward = reward

    def _step(self) -> None:
        """One draw in each row."""
        texts, rule = self.texts, self.rule
        rows = [row for row in range(len(self.states)) if not texts.rows[row].ended]
        texts.advance(rows)
        new = [row for row in rows if len(self.states[row].known) == len(texts.rows[row].tokens)]
        drawn = self._of_all(rows, new) if rule.k is None else self._of_candidates(rows, new)
        back: list[int] = []
        chosen: list[tuple[int, int]] = []  # rows whose candidates the scorer has just scored
        for row, slot, token, logprob, reward in drawn:
            path, text = self.states[row], texts.rows[row]
            path.draws[len(text.tokens)] += 1
            path.steps += 1
            if token == rule.backspace:
                back.append(row)
                continue
            text.reward = text.reward + reward if texts.per_token else reward
            path.rewards.append(text.reward)
            texts.add(row, [token], [logprob])
            if rule.guided and row in new and not text.ended:
                chosen.append((row, slot))
        if chosen:
            slots = torch.tensor([slot for _, slot in chosen], dtype=torch.int64, device="cpu")
            texts.commit([row for row, _ in chosen], slots)
            for row, _ in chosen:
                texts.rows[row].unread = 0
        if back:
            self._take_back(back)

    def _of_candidates(self, rows: list[int], new: list[int]) -> list[tuple]:
        """A candidate of each row, as its slot, id, log π and reward; `new` are those rows whose
        candidates are not known yet."""
        texts = self.texts
        if new:
            self._find_candidates(new)
            rows = [row for row in rows if not texts.rows[row].ended]  # a reward may be NaN
        if not rows:
            return []
        columns = zip(*(self.states[row].known[-1] for row in rows), strict=True)
        logprobs, rewards, ids = (torch.stack(column) for column in columns)
        seeds = [self.states[row].seed(len(texts.rows[row].tokens)) for row in rows]
        slots, _ = ops.ratio_sample(
            logprobs,
            rewards,
            ids,
            self.rule.beta,
            1.0,
            torch.tensor(seeds, dtype=torch.int64, device=ids.device),
            texts.positions(rows),
            self.run.samples,
            backend=texts.backend,
        )
        at = slots.clamp(min=0)[:, None]
        own = [column.gather(1, at)[:, 0].tolist() for column in (ids, logprobs, rewards)]
        drawn = list(zip(rows, slots.tolist(), *own, strict=True))
        for row, slot, *_ in drawn:
            if slot < 0:
                texts.fail(
                    row,
                    "the language model's logits contain NaN or +inf, or no candidate is possible",
                )
        return [each for each in drawn if each[1] >= 0]

    def _find_candidates(self, rows: list[int]) -> None:
        """The candidates behind the texts of these rows."""
        texts, rule = self.texts, self.rule
        assert rule.k is not None
        logprobs, ids = ops.topk_logprobs(texts.scores[rows], rule.k, backend=texts.backend)
        rewards = torch.zeros_like(logprobs)
        if rule.guided:
            rewards = self._rewards(rows, ids, ids == rule.backspace)
        for row, *known in zip(rows, logprobs, rewards, ids, strict=True):
            self.states[row].known.append(tuple(known))

    def _rewards(self, rows: list[int], ids: Tensor, back: Tensor) -> Tensor:
        """Rewards fp32 [n, k] of candidates `ids` [n, k], which are backspaces where `back`."""
        texts = self.texts
        # The reward model sees another candidate in the backspace's place, if there is one.
        others = ids.where(~back, ids[:, :1].where(~back[:, :1], ids[:, -1:]))
        asked = (~back).any(1).nonzero()[:, 0].tolist()
        rewards = torch.zeros(ids.shape, dtype=torch.float32, device="cpu")
        if asked:
            asking = [rows[i] for i in asked]
            texts.read(asking)
            rewards[asked] = texts.ask(asking, others[asked])
        of_back = [self._reward_of_undoing(row) for row in rows]
        column = torch.tensor(of_back, dtype=torch.float32, device="cpu")[:, None]
        return column.where(back.cpu(), rewards).to(ids.device)

    def _reward_of_undoing(self, row: int) -> float:
        """That of the text without its last token, or what the sum of its tokens' is less."""
        rewards = self.states[row].rewards
        if len(rewards) == 1:
            return 0.0  # among the candidates only where it makes up their number, at -inf
        return rewards[-2] - rewards[-1] if self.texts.per_token else rewards[-2]

    def _of_all(self, rows: list[int], new: list[int]) -> list[tuple]:
        """As `_of_candidates`, of the whole vocabulary."""
        texts, seeds = self.texts, None
        for row in new:
            self.states[row].known.append((texts.hidden[row].clone(),))
        own = [self.states[row].seed(len(texts.rows[row].tokens)) for row in rows]
        if self.run.samples:
            seeds = own
        return [(row, 0, token, logp, 0.0) for row, token, logp in texts.drawn(rows, seeds)]

    def _take_back(self, rows: list[int]) -> None:
        """Take back the last token of each of these rows."""
        texts = self.texts
        kept = [len(texts.rows[row].tokens) - 1 for row in rows]
        texts.take_back(rows, kept)
        for row, n in zip(rows, kept, strict=True):
            path = self.states[row]
            del path.known[n + 1 :], path.rewards[n + 1 :]
            texts.rows[row].reward = path.rewards[-1]
            path.undone += 1
        if self.rule.k is None:
            texts.restore(rows, torch.stack([self.states[row].known[-1][0] for row in rows]))

    def _is_done(self, row: int) -> bool:
        text, most = self.texts.rows[row], self.rule.max_steps
        if most is None:
            most = _STEPS_OF_A_TOKEN * text.entry.steps
        return text.ended or self.states[row].steps >= most

    def _describe(self, row: int, answer: SequenceAnswer) -> None:
        path = self.states[row]
        answer.undone, answer.steps = path.undone, path.steps
        if not self.rule.guided:
            answer.reward = answer.candidates[0].reward = None


class _NoReward(ScorerRows):
    """Rows without a reward, of which none is asked for."""

    method = "none"
    device = torch.device("cpu")  # type: ignore[assignment]

    def __init__(self) -> None:
        self.begin(0)

    def _unasked(self, *args: Any) -> Any:
        raise AssertionError("backtracking without a reward model asked for a reward")

    prefill = score = commit = _extend = _crop = _tokens = _unasked  # type: ignore[assignment]

    def finish(self) -> None:
        """Let the rows go."""
        self.begin(0)

    def _join(self, prompts: list[Tensor]) -> None:
        pass

    def _keep_rows(self, rows: Tensor) -> None:
        pass
