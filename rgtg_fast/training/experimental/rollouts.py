"""Values of prefixes by Monte Carlo: what the base policy makes of them, judged when it is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ...models.padding import left_padded
from ..formats import Row


def rollout_values(rewards: Tensor, beta: float) -> Tensor:
    """Of the rewards [.., n] of n roll-outs the mean [..], or, with beta > 0, the soft value
    ``(1/beta) log mean exp(beta r)``, or, with beta = inf, the largest."""
    if beta == 0:
        return rewards.mean(-1)
    if beta == math.inf:
        return rewards.amax(-1)
    return ((beta * rewards).logsumexp(-1) - math.log(rewards.shape[-1])) / beta


def rollout_targets(
    lm: Any,
    reward: Callable[[list[Row]], list[float]],
    rows: Iterable[Row],
    *,
    samples: int = 8,
    beta: float = 0.0,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Row]:
    """Targets for every prefix of answers, from `samples` continuations of each by `lm`.

    The target of the prefix y[1:i] is `rollout_values` of the rewards of whole answers that begin
    with it; that of an answer that ends with EOS is its own reward. A continuation that does not
    end within `max_new_tokens` is judged as it is. `loss_type="rad"` with `weights="uniform"` fits
    a classifier to them, `loss_type="soft_q"` reads the labels alone and bootstraps instead::

        rows = rollout_targets(lm, judge, PreferenceDataset("pairs.jsonl", tokenizer), samples=4)
        trainer = PrefixRewardTrainer(
            new_rm, PrefixRewardConfig("rm", loss_type="rad", weights="uniform"), train_dataset=rows
        )

    Args:
        lm: the base policy, a causal language model; sampled at temperature 1, nothing cut off.
        reward: rewards of whole answers, rows of token ids `{prompt_ids, answer_ids}`.
        rows: of token ids: `prompt_ids` with `answer_ids`, or with `chosen_ids` and `rejected_ids`
            (a `PreferenceDataset`), of which both answers become rows.
        beta: inverse temperature of the value: 0 for the mean, inf for the best roll-out.
        seed: of the continuations; torch's own generators are left as they were.

    Returns rows `{prompt_ids, answer_ids, label, targets}`: the answer's own reward, and one target
    per answer token. The cost is that of ``samples · |y|`` answers for each answer y.

    Raises `ValueError` for no rows, and for options out of range.
    """
    for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value}; pass at least 1")
    if not beta >= 0:
        raise ValueError(f"beta={beta}; pass 0 or more, or inf")
    names = ("answer_ids", "chosen_ids", "rejected_ids")
    single = [(row["prompt_ids"], row[n]) for row in rows for n in names if n in row]
    if not single:
        raise ValueError("rows is empty; pass rows with prompt_ids and answer_ids")
    ends = lm.generation_config.eos_token_id
    eos = set(ends if isinstance(ends, list) else [ends])
    prefixes = [
        (prompt, answer[:end])
        for prompt, answer in single
        for end in range(1, len(answer) + 1)
        if answer[end - 1] not in eos
    ]
    started = [at for at in prefixes for _ in range(samples)]
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        whole = [
            row
            for i in range(0, len(started), batch_size)
            for row in _continued(lm, started[i : i + batch_size], eos, max_new_tokens)
        ]
    own = [{"prompt_ids": prompt, "answer_ids": answer} for prompt, answer in single]
    labels = [float(r) for r in reward(own)]
    judged = torch.tensor(reward(whole) if whole else [], dtype=torch.float64)
    values = iter(rollout_values(judged.view(-1, samples), beta).tolist())
    return [
        row | {"label": r, "targets": [r if t in eos else next(values) for t in row["answer_ids"]]}
        for row, r in zip(own, labels, strict=True)
    ]


@torch.no_grad()
def _continued(
    lm: Any, prefixes: list[tuple[list[int], list[int]]], eos: set[int], most: int
) -> list[Row]:
    """One sample of each prefix's continuation, as rows of whole answers, up to their EOS."""
    tensors = [torch.tensor(prompt + answer, device=lm.device) for prompt, answer in prefixes]
    ids, mask = left_padded(tensors)
    out = lm.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=most,
        pad_token_id=0,
    )
    rows: list[Row] = []
    for (prompt, answer), more in zip(prefixes, out[:, ids.shape[1] :].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(more) if token in eos), len(more))
        rows.append({"prompt_ids": prompt, "answer_ids": answer + more[:end]})
    return rows
