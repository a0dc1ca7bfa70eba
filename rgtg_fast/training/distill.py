"""Distillation of the guided policy into a language model or an adapter: its data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..decode.options import integer
from ..generate import generate
from ..models.padding import left_padded
from .data import TokenRows
from .encode import encode_guided
from .formats import Row


def guided_rows(
    lm: Any,
    prompts: Sequence[Any],
    *,
    reward_model: Any,
    tokenizer: Any = None,
    batch_size: int = 16,
    seed: int = 0,
    **options: Any,
) -> Iterator[Row]:
    """Rows for `loss_type="distill"`: an answer of the guided policy to each prompt, sampled, and
    the policy itself, q ∝ exp((log π + β r) / T), at every step of it.

    A row has `prompt_ids`, `answer_ids` [T], and for each of the T steps `candidate_ids` and
    `candidate_logprobs`, log q, of what could be drawn there; as `json.dumps` takes it.

    Args:
        lm, reward_model, options: as for `rgtg_fast.generate`; `beta` and `temperature` are
            numbers, and `k` is one of candidates.
        prompts: token ids (lists, or int64 [P]), or texts with `tokenizer`; one may come twice.
        seed: split among the prompts.

    Raises `ValueError` for options whose policy is another than that, and as `generate` does.
    """
    for name in ("guided_top_p", "do_sample", "output_candidates", "return_dict_in_generate"):
        if name in options:
            raise ValueError(f"{name} has no part in guided_rows; drop it")
    if options.get("k", 10) is None:
        raise ValueError("k=None; guided_rows keeps the policy over k candidates: pass k<=64")
    for name in ("beta", "temperature"):
        if isinstance(options.get(name), Tensor):
            raise ValueError(f"{name} is a tensor; pass one number for all prompts")
    size = integer("batch_size", batch_size, 1)
    seeds = ops.split_seed(seed, len(prompts))
    eos = lm.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    for at in range(0, len(prompts), size):
        part = [_ids(prompt, tokenizer) for prompt in prompts[at : at + size]]
        ids, mask = left_padded(part)
        device = lm.get_input_embeddings().weight.device
        out: Any = generate(
            lm,
            ids.to(device),
            attention_mask=mask.to(device),
            reward_model=reward_model,
            tokenizer=tokenizer,
            seed=seeds[at : at + size],
            do_sample=True,
            prune=False,
            output_candidates=True,
            return_dict_in_generate=True,
            **{"top_k": 0} | options,
        )
        logq = _policy(out, options).cpu()
        candidates, chosen = out.candidate_ids.tolist(), out.sequences[:, ids.shape[1] :].tolist()
        for n, prompt in enumerate(part):
            stop = [t + 1 for t, token in enumerate(chosen[n]) if token in ends]
            length = min(stop, default=len(chosen[n]))
            yield _row(prompt, chosen[n][:length], candidates[n], logq[n])


def _ids(prompt: Any, tokenizer: Any) -> Tensor:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("prompts of text need tokenizer=; pass it, or token ids")
        prompt = tokenizer(prompt)["input_ids"]
    return torch.as_tensor(prompt, dtype=torch.int64)


def _policy(out: Any, options: dict[str, Any]) -> Tensor:
    """log q [B, T, k] of the ratio policy over the candidates."""
    beta = options.get("beta", 1.0) if out.beta is None else out.beta[..., None]
    # A step that went without reward, as `min_entropy` says, is drawn from π.
    tilt = torch.where(out.candidate_rewards.isnan(), 0.0, beta * out.candidate_rewards)
    scores = (out.candidate_logprobs + tilt) / options.get("temperature", 1.0)
    return scores.log_softmax(-1)


def _row(prompt: Tensor, answer: list[int], candidates: list[list[int]], logq: Tensor) -> Row:
    steps: list[list[tuple[int, float]]] = []
    for ids, values in zip(candidates[: len(answer)], logq[: len(answer)].tolist(), strict=True):
        steps.append([(i, v) for i, v in zip(ids, values, strict=True) if v > -math.inf])
    return {
        "prompt_ids": prompt.tolist(),
        "answer_ids": answer,
        "candidate_ids": [[i for i, _ in step] for step in steps],
        "candidate_logprobs": [[v for _, v in step] for step in steps],
    }


class GuidedAnswers(TokenRows):
    """Rows of `guided_rows`. Options as in `PreferenceDataset`.

    Raises:
        ValueError: for missing keys, empty answers and prompts, and steps whose candidates do not
            fit the answer or whose probabilities do not sum to 1, with counts.
    """

    answers = ("answer_ids",)
    eos_rule = "keep"
    encode = staticmethod(encode_guided)

    @staticmethod
    def fault(row: Row) -> str | None:
        ids, logprobs = row["candidate_ids"], row["candidate_logprobs"]
        if not row["answer_ids"] or not row["prompt_ids"]:
            return "an empty answer or prompt"
        if [len(step) for step in ids] != [len(step) for step in logprobs]:
            return "candidates without a log-probability each"
        if len(ids) != len(row["answer_ids"]):
            return "candidates that are not of one step per token of answer_ids"
        if any(abs(sum(map(math.exp, step)) - 1) > 1e-3 for step in logprobs):
            return "a step whose candidates' probabilities do not sum to 1"
        return None

    def largest_id(self) -> int:
        """The largest token id of all rows."""
        of_steps = (max(step) for row in self.rows for step in row["candidate_ids"])
        return max(super().largest_id(), *of_steps)


@dataclass
class GuidedCollator:
    """N rows to `input_ids` and `attention_mask` int64 [N, L], padded on the right, `start` int64
    [N], `answer_mask` int64 [N, T], and `candidate_ids` int64 and `candidate_logprobs` fp32
    [N, T, k]; what is no candidate has token 0 and log-prob -inf."""

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        tokens = [row["prompt_ids"] + row["answer_ids"] for row in rows]
        ids = torch.zeros(len(rows), max(map(len, tokens)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        width = max(len(row["answer_ids"]) for row in rows)
        most = max(len(step) for row in rows for step in row["candidate_ids"])
        answer = torch.zeros(len(rows), width, dtype=torch.int64)
        candidates = torch.zeros(len(rows), width, most, dtype=torch.int64)
        logprobs = torch.full(candidates.shape, -torch.inf)
        for n, (row, sequence) in enumerate(zip(rows, tokens, strict=True)):
            ids[n, : len(sequence)] = torch.tensor(sequence)
            mask[n, : len(sequence)] = 1
            answer[n, : len(row["answer_ids"])] = 1
            steps = zip(row["candidate_ids"], row["candidate_logprobs"], strict=True)
            for t, (own, values) in enumerate(steps):
                candidates[n, t, : len(own)] = torch.tensor(own)
                logprobs[n, t, : len(own)] = torch.tensor(values)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "answer_mask": answer,
            "start": torch.tensor([len(row["prompt_ids"]) for row in rows]),
            "candidate_ids": candidates,
            "candidate_logprobs": logprobs,
        }
