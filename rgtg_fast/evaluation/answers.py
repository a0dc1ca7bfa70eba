"""Answers of a run to a batch of prompts, with the divergence from the base and its likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import rgtg_fast

from .. import ops
from ..scorers.registry import KINDS
from .prompts import Prompt
from .scoring import Classifier
from .settings import Run


@dataclass(frozen=True)
class Answer:
    """One answer.

    `ids` are its tokens without EOS, `end` is the EOS token that ended it (None: the length limit
    did), `logp` its log-probability under the base, EOS included. `kl` is the sum over tokens of
    the exact KL of the step's policy from the base, `log_ratio` log q - log p of the drawn tokens;
    None where unknown. `proxy` is the guide's (or the selector's) reward of the whole answer.
    """

    text: str
    ids: list[int]
    end: int | None
    logp: float
    kl: float | None
    log_ratio: float | None
    proxy: float | None = None


class _AtOnce(StoppingCriteria):
    """Stopping criterion: ends every answer after its first token."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Answerer:
    """The base policy `lm` with `guide` (None: unguided), answering as `run` says.

    A row's tokens depend on (seed, prompt number) and, unguided, on the batch it is in.
    """

    def __init__(
        self,
        lm: Any,
        tokenizer: Any,
        run: Run,
        max_new_tokens: int,
        guide: Any = None,
        reward_tokenizer: Any = None,
        selector: Classifier | None = None,
    ) -> None:
        self.lm, self.tokenizer, self.run, self.max_new_tokens = lm, tokenizer, run, max_new_tokens
        self.guide, self.reward_tokenizer, self.selector = guide, reward_tokenizer, selector
        eos = lm.generation_config.eos_token_id
        self.eos = eos if isinstance(eos, list) else [eos] if eos is not None else []

    def batches(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], seed: int, size: int
    ) -> Iterator[list[dict]]:
        """Rows for the prompts, whose places in the file are `numbers`, in their order, `size` at a
        time."""
        groups = [range(at, min(at + size, len(prompts))) for at in range(0, len(prompts), size)]
        repeated = [p for p in prompts for _ in range(self.run.best_of)]
        copies = [i * self.run.best_of + j for i in numbers for j in range(self.run.best_of)]
        if self.guide is None:
            answers: Iterator[list[Answer]] = (
                self._unguided(repeated[own], copies[own], seed) for own in self._copies_of(groups)
            )
        else:
            answers = self._in_order(repeated, copies, seed, self._copies_of(groups))
        for group, own in zip(groups, answers, strict=True):
            yield self.batch([prompts[i] for i in group], [numbers[i] for i in group], own)

    def _copies_of(self, groups: Sequence[range]) -> list[slice]:
        n = self.run.best_of
        return [slice(group.start * n, group.stop * n) for group in groups]

    def _in_order(
        self, prompts: list[Prompt], copies: list[int], seed: int, groups: Sequence[slice]
    ) -> Iterator[list[Answer]]:
        """Guided answers to the prompts of each group, as soon as all of it have one."""
        done: dict[int, Answer] = {}
        answers = self._guided(prompts, copies, seed, groups[0].stop if groups else 1)
        for group in groups:
            wanted = range(group.start, group.stop)
            while not all(i in done for i in wanted):
                index, answer = next(answers)
                done[index] = answer
            yield [done.pop(i) for i in wanted]

    def batch(self, prompts: list[Prompt], numbers: list[int], answers: list[Answer]) -> list[dict]:
        """The rows of `answers` to the prompts, `best_of` for each."""
        n = self.run.best_of
        if n == 1:
            return [{"i": i, **vars(a)} for i, a in zip(numbers, answers, strict=True)]
        assert self.selector is not None
        repeated = [p for p in prompts for _ in range(n)]
        scores = self.selector.score(repeated, [vars(a) for a in answers])
        rows = []
        for at, i in enumerate(numbers):
            own = slice(at * n, at * n + n)
            best = max(range(n), key=scores[own].__getitem__)
            unguided = self.guide is None and self._is_base()
            row = {
                "i": i,
                **vars(answers[own][best]),
                "kl": math.log(n) - (n - 1) / n if unguided else None,
                "log_ratio": None,
                "proxy": scores[own][best],
                "others": [
                    {"text": a.text, "proxy": s, "end": a.end}
                    for j, (a, s) in enumerate(zip(answers[own], scores[own], strict=True))
                    if j != best
                ],
            }
            rows.append(row)
        return rows

    def rehearse(self, prompt: Prompt) -> None:
        """The first token of an answer, with everything that all of it would need."""
        stop = StoppingCriteriaList([_AtOnce()])
        if self.guide is None:
            answers = self._unguided([prompt], [0], 0, stop)
        else:
            answers = [answer for _, answer in self._guided([prompt], [0], 0, 1, stop)]
        if self.selector is not None:
            self.selector.score([prompt], [vars(a) for a in answers])

    def _options(self, stop: StoppingCriteriaList | None) -> dict[str, Any]:
        options: dict[str, Any] = {
            "do_sample": self.run.do_sample,
            "max_new_tokens": self.max_new_tokens,
            "stopping_criteria": stop,
        }
        if self.run.do_sample:  # None would mean 50, the configuration class's default
            options["top_k"] = 0
        return options

    @torch.no_grad()
    def _unguided(
        self,
        prompts: list[Prompt],
        copies: list[int],
        seed: int,
        stop: StoppingCriteriaList | None = None,
    ) -> list[Answer]:
        inputs = self.tokenizer.pad(
            {"input_ids": [p.ids for p in prompts]}, padding_side="left", return_tensors="pt"
        ).to(self.lm.device)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options = {**given, **self._options(stop), "return_dict_in_generate": True}
        out = self._sample(options, copies[0], seed)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        live = self._live(new)
        steps = [self._step(*step) for step in zip(out.logits, new.T, strict=True)]
        columns = [torch.stack(values, 1).double() for values in zip(*steps, strict=True)]
        answers = []
        for row in range(len(prompts)):
            n = int(live[row].sum())
            sums = [float(column[row, :n].sum()) for column in columns]
            answers.append(self._answer(new[row, :n].tolist(), sums))
        return answers

    def _answer(self, ids: list[int], sums: Sequence[float], proxy: float | None = None) -> Answer:
        """An answer of these tokens, with the `sums` log p, KL and log q - log p."""
        end = ids.pop() if ids[-1] in self.eos else None
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        logp, kl, log_ratio = sums
        return Answer(text, ids, end, logp, kl, log_ratio, proxy)

    def _sample(self, options: dict[str, Any], first: int, seed: int) -> Any:
        run = self.run
        if run.do_sample:
            options |= {
                "temperature": run.temperature,
                "top_k": run.top_k,
                "top_p": run.top_p,
                **({"min_p": run.min_p} if run.min_p else {}),
            }
        with torch.random.fork_rng():
            torch.manual_seed(int(ops.split_seed(seed, first + 1)[first]))
            return self.lm.generate(**options, output_logits=True)

    def _guided(
        self,
        prompts: list[Prompt],
        copies: list[int],
        seed: int,
        batch_size: int,
        stop: StoppingCriteriaList | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Answers in the order they end, each with the place of its prompt."""
        run = self.run
        tokenizers = {}
        if self.reward_tokenizer is not None:
            tokenizers = {"tokenizer": self.tokenizer, "reward_tokenizer": self.reward_tokenizer}
        many = rgtg_fast.generate_many(
            self.lm,
            [p.ids for p in prompts],
            reward_model=self.guide,
            batch_size=batch_size,
            k=run.k,
            beta=run.beta,
            temperature=run.temperature,
            seed=ops.split_seed(seed, max(copies) + 1)[copies],
            eos_reward=run.eos_reward,
            reward_method=run.reward_method,
            **tokenizers,
            **self._options(stop),
        )
        for got in many:
            if got.error is not None:
                raise ValueError(f"prompt {copies[got.index] // run.best_of}: {got.error}")
            sums = [math.fsum(column) for column in (got.logprobs, got.kl, got.log_ratio)]
            per_token = KINDS[run.kind].per_token
            proxy = math.fsum(got.rewards) if per_token else got.rewards[-1]
            yield got.index, self._answer(got.tokens, sums, proxy)

    def _live(self, new: Tensor) -> Tensor:
        """Which new tokens [B, T] belong to the answer: those up to and with the first EOS."""
        ends = torch.isin(new, torch.tensor(self.eos, dtype=new.dtype, device=new.device))
        return (ends.int().cumsum(1) - ends.int()) == 0

    def _step(self, logits: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p, KL(q || p) and log q - log p, fp64 [B], at the base's logits [B, V] of a step, of
        the `token` [B] drawn."""
        base = torch.log_softmax(logits.double(), -1)
        logp = base.gather(1, token[:, None])[:, 0]
        if not self.run.do_sample:  # all of q is on the token taken
            return logp, -logp, -logp
        if self._is_base():
            return logp, torch.zeros_like(logp), torch.zeros_like(logp)
        logq = torch.log_softmax(self._warp(logits).double(), -1)
        kl = torch.where(logq > -torch.inf, logq.exp() * (logq - base), 0.0).sum(-1)
        return logp, kl, logq.gather(1, token[:, None])[:, 0] - logp

    def _is_base(self) -> bool:
        run = self.run
        warped = run.temperature != 1 or run.top_k or run.top_p < 1 or run.min_p
        return run.do_sample and not warped

    def _warp(self, logits: Tensor) -> Tensor:
        """What Hugging Face draws from, in its order of warpers: logits [B, V]."""
        run, warpers = self.run, LogitsProcessorList()
        if run.temperature != 1:
            warpers.append(TemperatureLogitsWarper(run.temperature))
        if run.top_k:
            warpers.append(TopKLogitsWarper(run.top_k))
        if run.top_p < 1:
            warpers.append(TopPLogitsWarper(run.top_p))
        if run.min_p:
            warpers.append(MinPLogitsWarper(run.min_p))
        return warpers(logits.new_zeros((len(logits), 1), dtype=torch.long), logits)  # type: ignore[arg-type]
