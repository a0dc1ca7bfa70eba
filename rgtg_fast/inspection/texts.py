"""Outputs as texts: tokens with their characters, rewards, KL and candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..output import Answer, RewardGuidedOutput

_UNFINISHED = "\ufffd"  # what decoders write for a part of a character


@dataclass(frozen=True)
class Candidate:
    """A token that could have been taken; `q` is its probability under the ratio policy, NaN where
    it is not known."""

    text: str
    id: int
    logprob: float
    reward: float
    q: float


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    `reward` is that of the prefix with it (of the token itself where rewards are per token), `gain`
    how far that is above the mean over the candidates under π, or without candidates above the
    reward one token before; `kl` in nats. NaN where unknown.
    """

    text: str
    id: int
    reward: float
    gain: float
    kl: float
    candidates: list[Candidate] = field(default_factory=list)


@dataclass(frozen=True)
class Text:
    """An answer and its prompt (without special tokens; empty where it is not known)."""

    prompt: str
    tokens: list[Token]

    @property
    def kl(self) -> float:
        """Of all tokens whose KL is known, in nats."""
        return math.fsum(t.kl for t in self.tokens if math.isfinite(t.kl))

    @property
    def reward(self) -> float:
        """After the last token that has one; NaN without."""
        known = [t.reward for t in self.tokens if not math.isnan(t.reward)]
        return known[-1] if known else math.nan


def read_outputs(
    outputs: Mapping[str, Any],
    tokenizer: Any,
    beta: float | Mapping[str, float] | None,
    temperature: float,
    do_sample: bool,
) -> list[dict[str, Text]]:
    """For each prompt, its answers by name."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; pass that of the call, above 0")
    columns = {}
    reader = _Reader(tokenizer, temperature, do_sample)
    for name, output in outputs.items():
        reader.beta = beta.get(name) if isinstance(beta, Mapping) else beta
        columns[str(name)] = reader.texts_of(name, output)
    counts = {name: len(texts) for name, texts in columns.items()}
    if not counts or not max(counts.values()):
        raise ValueError("there is no text; pass an output of generate with at least one row")
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"numbers of prompts differ ({said}); pass outputs of the same prompts")
    rows = range(next(iter(counts.values())))
    return [{name: texts[i] for name, texts in columns.items()} for i in rows]


class _Reader:
    """Reads outputs with a tokenizer; the text of a token by itself is looked up once."""

    def __init__(self, tokenizer: Any, temperature: float, do_sample: bool) -> None:
        if not hasattr(tokenizer, "decode"):
            raise ValueError(f"tokenizer={tokenizer!r} has no decode; pass the language model's")
        self.tokenizer, self.temperature, self.do_sample = tokenizer, temperature, do_sample
        self.beta: float | None = None
        self.alone: dict[int, str] = {}

    def texts_of(self, name: Any, output: Any) -> list[Text]:
        if isinstance(output, RewardGuidedOutput):
            return [self._row(output, i) for i in range(len(output.sequences))]
        if isinstance(output, Answer):
            return [self._answer(output)]
        if isinstance(output, Sequence) and not isinstance(output, (str, bytes)):
            return [text for each in output for text in self.texts_of(name, each)]
        raise ValueError(
            f"{name}: {type(output).__name__} is no output that says what the reward did; call "
            "generate with return_dict_in_generate=True (beta=0 for the base)"
        )

    def _answer(self, answer: Answer) -> Text:
        if answer.error is not None:
            raise ValueError(f"prompt {answer.index} has no answer: {answer.error}")
        tokens, before = [], 0.0
        pieces = self._pieces(answer.tokens)
        for i, (piece, id) in enumerate(zip(pieces, answer.tokens, strict=True)):
            reward = answer.rewards[i]
            tokens.append(Token(piece, id, reward, reward - before, answer.kl[i]))
            before = reward
        return Text("", tokens)

    def _row(self, output: RewardGuidedOutput, row: int) -> Text:
        assert output.rewards is not None and output.kl is not None
        steps = output.rewards.shape[1]
        prompt = output.sequences[row, : output.sequences.shape[1] - steps]
        rewards, kl = output.rewards[row].tolist(), output.kl[row].tolist()
        count = self._length(output, row, rewards, kl)
        ids = output.sequences[row, prompt.shape[0] :][:count].tolist()
        tokens, before = [], 0.0
        for i, (piece, id) in enumerate(zip(self._pieces(ids), ids, strict=True)):
            candidates = self._candidates(output, row, i)
            mean = _mean_reward(candidates)
            gain = rewards[i] - (before if mean is None else mean)
            tokens.append(Token(piece, id, rewards[i], gain, kl[i], candidates))
            before = rewards[i]
        return Text(self.tokenizer.decode(prompt.tolist(), skip_special_tokens=True), tokens)

    def _length(
        self, output: RewardGuidedOutput, row: int, rewards: list[float], kl: list[float]
    ) -> int:
        """Tokens of the row: behind its end nothing is known of any step."""
        scored = output.candidates_scored
        found = len(rewards) if scored is None else 0
        for i in range(len(rewards)):
            asked = scored is not None and int(scored[row, i]) > 0
            if asked or not (math.isnan(rewards[i]) and math.isnan(kl[i])):
                found = i + 1
        return found

    def _candidates(self, output: RewardGuidedOutput, row: int, step: int) -> list[Candidate]:
        if output.candidate_ids is None:
            return []
        assert output.candidate_logprobs is not None and output.candidate_rewards is not None
        ids = output.candidate_ids[row, step].tolist()
        logprobs = output.candidate_logprobs[row, step].double()
        rewards = output.candidate_rewards[row, step].double()
        beta = self.beta
        if output.beta is not None:
            beta = float(output.beta[row, step])
        q = torch.full_like(logprobs, torch.nan)
        if beta is not None:
            # A candidate without reward could not win: its share is none.
            tilted = torch.where(rewards.isnan(), -torch.inf, logprobs + beta * rewards)
            tilted = tilted.masked_fill(logprobs == -torch.inf, -torch.inf)
            best = torch.zeros_like(tilted).index_fill_(0, tilted.argmax(), 1.0)
            q = (tilted / self.temperature).softmax(0) if self.do_sample else best
        columns = zip(ids, logprobs.tolist(), rewards.tolist(), q.tolist(), strict=True)
        return [Candidate(self._alone(id), id, *values) for id, *values in columns]

    def _alone(self, id: int) -> str:
        """A token's characters: behind itself, as a decoder may drop the space of a first one."""
        if id not in self.alone:
            once, twice = self.tokenizer.decode([id]), self.tokenizer.decode([id, id])
            text = twice[len(once) :] if twice.startswith(once) else once
            if not text or _UNFINISHED in text:
                text = str(self.tokenizer.convert_ids_to_tokens(id))
            self.alone[id] = text
        return self.alone[id]

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        """The characters that each token adds; none for one that ends within a character, which
        the token that ends it adds."""
        pieces, start, read = [], 0, 0
        for end in range(1, len(ids) + 1):
            before = self.tokenizer.decode(ids[start:read])
            after = self.tokenizer.decode(ids[start:end])
            if after.endswith(_UNFINISHED) and end < len(ids):
                pieces.append("")
                continue
            pieces.append(after[len(before) :])
            # From the last whole token on: what a decoder does at a text's beginning is over.
            start, read = read, end
        return pieces


def _mean_reward(candidates: Sequence[Candidate]) -> float | None:
    """The mean reward under π, of the candidates that have one; None where none has."""
    known = [c for c in candidates if math.isfinite(c.reward) and c.logprob > -math.inf]
    if not known:
        return None
    most = max(c.logprob for c in known)
    weights = [math.exp(c.logprob - most) for c in known]
    total = math.fsum(w * c.reward for w, c in zip(weights, known, strict=True))
    return total / math.fsum(weights)
