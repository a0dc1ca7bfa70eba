"""What the decoders of whole sequences give, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Cost:
    """What an answer took, in tokens, so that methods can be compared.

    Attributes:
        lm_tokens: tokens that the language model ran, the prompt's (once) included.
        reward_tokens: the same of the reward model, of all of them together where it is a sum:
            each token once where it has a cache, the whole text for each reward where it has none.
            0 of functions and servers, whose tokens are not known here.
        rewards: how many rewards of texts (or of candidate tokens) were asked for.
        cache_bytes: the most that the key/value caches of both models held, of all rows that were
            there at a time.
    """

    lm_tokens: int = 0
    reward_tokens: int = 0
    rewards: int = 0
    cache_bytes: int = 0


@dataclass
class Candidate:
    """A text that was weighed.

    Attributes:
        tokens: of the answer, EOS included where it ended it.
        text: of the tokens without special ones, where a tokenizer was given.
        reward: of the prompt and the answer; None where there is no reward model.
        logprob: log π of the answer, in nats.
        weight: of a particle of `twisted_smc`, of sum 1; None elsewhere.
    """

    tokens: list[int]
    text: str | None
    reward: float | None
    logprob: float
    weight: float | None = None


@dataclass
class SequenceAnswer:
    """The answer to one of the prompts.

    Attributes:
        index: of the prompt, counted from 0.
        tokens, text, reward, logprob: of the answer, as in `Candidate`.
        cost: what it took.
        candidates: all that were weighed at the end, the answer among them.
        segments: of `cards`, the tokens of each segment; of `blockwise_best_of`, of each block.
        rejected: of `cards`, how many segments were rejected; of `speculative_rejection` and
            `treebon`, how many texts were.
        log_z: of `twisted_smc`, the estimate of log Z.
        undone: of `backtracking`, how many tokens were taken back.
        steps: of `backtracking`, how many tokens were drawn, backspaces included.
        error: why there is no answer; None for an answer.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    reward: float | None = None
    logprob: float | None = None
    cost: Cost = field(default_factory=Cost)
    candidates: list[Candidate] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    rejected: int = 0
    log_z: float | None = None
    undone: int = 0
    steps: int = 0
    error: str | None = None
