"""Dense rewards for free: a reward model's attention as labels for every prefix (ABC)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...models.attention import last_attention
from ...models.reward_model import as_reward_model
from ...scorers.attention_credit import check_share
from ..collate import LabelledCollator
from ..formats import Row
from ..objectives import answer_columns


def dense_rewards(
    reward: Tensor, attention: Tensor, answer_mask: Tensor, share: float = 0.5
) -> Tensor:
    """Attention-based credit (arXiv 2402.00782): one reward per token, adding up to the answer's.

    With a_t the attention from the answer's last token T to token t, in the reward model's last
    layer and averaged over its heads, α_t = a_t / Σ_answer a, β = `share` and R = `reward`::

        r_t = β α_t R,    r_T += (1 - β) R,    so Σ_t r_t = R

    The paper shows this to be potential-based shaping: the best policy stays the best.

    Args:
        reward: float [N], of the whole answers.
        attention: float [N, L], or [N, heads, L], which is averaged over the heads.
        answer_mask: [N, L], 1 = token of the answer.
        share: β, 0 (all at the end) to 1 (all by attention).

    Returns float [N, L], zero outside the answers, in the reward's dtype (fp32 at least).

    Raises `ValueError` for shapes that do not fit, a share out of range, and, on a CPU, an empty
    answer.
    """
    check_share(share)
    if attention.dim() == 3:
        attention = attention.mean(1)
    if reward.dim() != 1 or attention.shape != answer_mask.shape or len(reward) != len(attention):
        raise ValueError(
            f"reward {list(reward.shape)}, attention {list(attention.shape)} and answer_mask "
            f"{list(answer_mask.shape)} do not fit; pass [N], [N, L] (or [N, heads, L]) and [N, L]"
        )
    inside = answer_mask.bool()
    if inside.device.type == "cpu" and not inside.any(-1).all():
        raise ValueError("answer_mask has a row without a token; leave empty answers out")
    dtype = torch.promote_types(reward.dtype, torch.float32)
    reward, weights = reward.to(dtype), attention.to(dtype).masked_fill(~inside, 0)
    dense = share * weights / weights.sum(-1, keepdim=True) * reward[:, None]
    at = torch.arange(inside.shape[1], device=inside.device)
    last = (at * inside).argmax(-1, keepdim=True)
    return dense.scatter_add(1, last, (1 - share) * reward[:, None])


@torch.no_grad()
def attention_labels(
    model: Any, rows: Iterable[Row], *, share: float = 0.5, batch_size: int = 16
) -> list[Row]:
    """Labels for every prefix of answers, from one forward of a trained reward model each.

    The target of the prefix y[1:i] is what its tokens were given, ``Σ_{t ≤ i} r_t`` of
    `dense_rewards`: it grows to R at the answer's end. `loss_type="rad"` fits them by squared
    error, for a reward model of partial sequences without labels of partial sequences::

        from rgtg_fast.training import PreferenceDataset
        from rgtg_fast.training.experimental import attention_labels

        pairs = PreferenceDataset("pairs.jsonl", tokenizer)
        rows = attention_labels(full_rm, pairs, share=0.8)
        trainer = PrefixRewardTrainer(
            new_rm, PrefixRewardConfig("rm", loss_type="rad", weights="uniform"), train_dataset=rows
        )

    Args:
        model: a causal reward model (see `rgtg_fast.scorers.RewardModel`), run in eval mode.
        rows: of token ids: `prompt_ids` with `answer_ids`, or with `chosen_ids` and `rejected_ids`
            (a `PreferenceDataset`), of which both answers become rows.
        share: β of the paper.
        batch_size: texts per forward; attention weights of all layers are held, L² numbers each.

    Returns rows `{prompt_ids, answer_ids, label, targets}`: R, and one target per answer token.

    Raises `ValueError` for a model that gives no attention weights.
    """
    rm = copy.copy(as_reward_model(model))
    rm.attention = "eager"  # only eager attention returns its weights
    rm = rm.twin()
    single: list[Row] = []
    for row in rows:
        for name in ("answer_ids", "chosen_ids", "rejected_ids"):
            if name in row:
                single.append({"prompt_ids": row["prompt_ids"], "answer_ids": row[name]})
    if not single:
        raise ValueError("rows is empty; pass rows with prompt_ids and answer_ids")
    collate = LabelledCollator()
    for at in range(0, len(single), batch_size):
        part = single[at : at + batch_size]
        batch = collate([row | {"label": 0.0} for row in part])
        batch = {name: value.to(rm.device) for name, value in batch.items()}
        hidden, out = rm.forward_base(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_attentions=True,
            use_cache=False,
        )
        weights = last_attention(rm, out)  # [N, heads, L, L]
        index = torch.arange(len(hidden), device=hidden.device)
        last = (batch["attention_mask"].sum(-1) - 1).to(hidden.device)
        reward = rm.rewards(hidden[index, last][:, None])[:, 0]
        mask = batch["answer_mask"].to(reward.device)
        attention = weights[index, :, last].float().to(reward.device)
        attention = answer_columns(attention, batch["start"].to(reward.device), mask.shape[-1])
        sums = dense_rewards(reward.double(), attention, mask, share).cumsum(-1)
        for row, r, total, answer in zip(
            part, reward.tolist(), sums.cpu(), mask.bool().cpu(), strict=True
        ):
            row |= {"label": r, "targets": total[answer].tolist()}
    return single
