"""Answers of a run to a batch of prompts, with the divergence from the base and its likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    def batch(self, prompts: Sequence[Prompt], numbers: Sequence[int], seed: int) -> list[dict]:
        """A row for each of the prompts, whose places in the file are `numbers`."""
        n = self.run.best_of
        repeated = [p for p in prompts for _ in range(n)]
        copies = [i * n + j for i in numbers for j in range(n)]
        answers = self._answer(repeated, copies, seed)
        if n == 1:
            return [{"i": i, **vars(a)} for i, a in zip(numbers, answers, strict=True)]
        assert self.selector is not None
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
        answers = self._answer([prompt], [0], 0, StoppingCriteriaList([_AtOnce()]))
        if self.selector is not None:
            self.selector.score([prompt], [vars(a) for a in answers])

    @torch.no_grad()
    def _answer(
        self,
        prompts: list[Prompt],
        copies: list[int],
        seed: int,
        stop: StoppingCriteriaList | None = None,
    ) -> list[Answer]:
        inputs = self.tokenizer.pad(
            {"input_ids": [p.ids for p in prompts]}, padding_side="left", return_tensors="pt"
        ).to(self.lm.device)
        options: dict[str, Any] = {
            **{name: inputs[name] for name in ("input_ids", "attention_mask")},
            "do_sample": self.run.do_sample,
            "max_new_tokens": self.max_new_tokens,
            "return_dict_in_generate": True,
            "stopping_criteria": stop,
        }
        if self.run.do_sample:  # None would mean 50, the configuration class's default
            options["top_k"] = 0
        if self.guide is None:
            out = self._sample(options, copies[0], seed)
        else:
            out = self._guided(options, copies, seed)
        start = inputs["input_ids"].shape[1]
        new = out.sequences[:, start:]
        live = self._live(new)
        if self.guide is None:
            steps = [self._step(*step) for step in zip(out.logits, new.T, strict=True)]
            logp, kl, ratio = (torch.stack(values, 1) for values in zip(*steps, strict=True))
        else:
            logp, kl, ratio = self._guided_steps(out, new)
        rewards = getattr(out, "rewards", None)
        answers = []
        for row in range(len(prompts)):
            n = int(live[row].sum())
            ids = new[row, :n].tolist()
            end = ids.pop() if ids[-1] in self.eos else None
            answers.append(
                Answer(
                    text=self.tokenizer.decode(ids, skip_special_tokens=True),
                    ids=ids,
                    end=end,
                    logp=float(logp[row, :n].double().sum()),
                    kl=float(kl[row, :n].double().sum()),
                    log_ratio=float(ratio[row, :n].double().sum()),
                    proxy=None if rewards is None else self._proxy(rewards[row, :n]),
                )
            )
        return answers

    def _proxy(self, rewards: Tensor) -> float:
        return float(rewards.sum() if KINDS[self.run.kind].per_token else rewards[-1])

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

    def _guided(self, options: dict[str, Any], copies: list[int], seed: int) -> Any:
        run = self.run
        tokenizers = {}
        if self.reward_tokenizer is not None:
            tokenizers = {"tokenizer": self.tokenizer, "reward_tokenizer": self.reward_tokenizer}
        return rgtg_fast.generate(
            self.lm,
            reward_model=self.guide,
            k=run.k,
            beta=run.beta,
            temperature=run.temperature,
            seed=ops.split_seed(seed, max(copies) + 1)[copies],
            eos_reward=run.eos_reward,
            reward_method=run.reward_method,
            output_candidates=True,
            **tokenizers,
            **options,
        )

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

    def _guided_steps(self, out: Any, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, [B, T], of the tokens `new` [B, T] that a guide chose among its candidates."""
        run, drawn = self.run, out.candidate_ids == new[..., None]
        candidates = out.candidate_logprobs.double()
        logp = torch.where(drawn, candidates, 0.0).sum(-1)
        if not run.do_sample:
            return logp, out.kl, -logp
        scores = candidates + run.beta * out.candidate_rewards.double()
        logq = torch.log_softmax(scores / run.temperature, -1)
        return logp, out.kl, torch.where(drawn, logq - candidates, 0.0).sum(-1)

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
