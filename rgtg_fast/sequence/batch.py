"""Many prompts through one batch of texts that is kept full."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from ..decode.refill import Entry
from ..output import Answer
from .output import SequenceAnswer
from .run import Run
from .texts import Texts

Rule = TypeVar("Rule")
State = TypeVar("State")


class Batch(ABC, Generic[Rule, State]):
    """A row for each prompt; where one's answer is done, the next prompt takes its place.

    `rule` holds the numbers of the method; `states` are of the rows of `texts`, in their order.
    """

    def __init__(self, run: Run, rule: Rule, batch_size: int) -> None:
        self.run, self.rule, self.batch_size = run, rule, batch_size
        self.states: list[State] = []

    @property
    def texts(self) -> Texts:
        return self.run.call

    def answers(self, prompts: Iterable) -> Iterator[SequenceAnswer]:
        """The answers, in the order they end."""
        entries = self.run.entries(prompts)
        waiting = next(entries, None)
        while waiting is not None or self.states:
            joining: list[Entry] = []
            while waiting is not None and len(self.states) + len(joining) < self.batch_size:
                if isinstance(waiting, Answer):
                    yield SequenceAnswer(waiting.index, error=waiting.error)
                elif not self.states and not joining:
                    self.run.make_room(waiting)
                    joining.append(waiting)
                elif self.run.has_room(waiting):
                    joining.append(waiting)
                else:
                    break  # once the batch is empty, it is made anew for longer prompts
                waiting = next(entries, None)
            there = [text.entry.index for text in self.texts.rows] if self.states else []
            try:
                if joining:
                    self._join(joining)
                done = self._advance() if self.states else []
            except ValueError as error:  # of all rows: the models may have others than each other
                self.states = []
                self.run.finish()
                failed = sorted({*there, *(entry.index for entry in joining)})
                done = [SequenceAnswer(index, error=str(error)) for index in failed]
            yield from done

    def _advance(self) -> list[SequenceAnswer]:
        self._step()
        rows = range(len(self.states))
        gone = [row for row in rows if self._is_done(row)]
        answers = [self._answer(row) for row in gone]
        if gone:
            kept = [row for row in rows if row not in gone]
            self.texts.select(kept)
            self.states = [self.states[row] for row in kept]
        return answers

    def _answer(self, row: int) -> SequenceAnswer:
        text = self.texts.rows[row]
        if text.error is not None:
            return SequenceAnswer(text.entry.index, cost=text.cost, error=text.error)
        own = self.texts.candidate(row)
        answer = SequenceAnswer(text.entry.index, list(own.tokens), own.text, own.reward)
        answer.logprob, answer.cost, answer.candidates = own.logprob, text.cost, [own]
        self._describe(row, answer)
        return answer

    @abstractmethod
    def _join(self, entries: list[Entry]) -> None:
        """Rows with these prompts come in, with their states."""

    @abstractmethod
    def _step(self) -> None:
        """Go on with all rows."""

    @abstractmethod
    def _is_done(self, row: int) -> bool:
        """Whether a row's answer is done, or has failed."""

    @abstractmethod
    def _describe(self, row: int, answer: SequenceAnswer) -> None:
        """Add to an answer what the method knows of its row."""
