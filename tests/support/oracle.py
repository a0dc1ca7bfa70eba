"""The naive loop, as an oracle: one row at a time, no padding, no cache, public forwards only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rgtg_fast import ops

NEAR = 1e-4  # two scores closer than this may swap between two correct fp32 computations

RewardFn = Callable[[torch.Tensor], torch.Tensor]  # ids [k, L] without padding -> rewards [k]


def public(rm: Any) -> RewardFn:
    """Rewards as the reward model's own public forward gives them."""
    return lambda ids: rm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].float()


def lm_logits(lm: Any, ids: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Next-token logits [V] of one row [L], PAD (id 0) never proposed, `bias` [V] added."""
    logits = lm(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -1]
    logits = logits.float().clone()
    logits[0] = -torch.inf
    return logits if bias is None else logits + bias


def choose(
    logp: torch.Tensor, rewards: torch.Tensor, ids: torch.Tensor, step: int, how: dict
) -> int:
    """The slot of the ratio policy: argmax of s, or the seeded Gumbel draw from softmax(s / T)."""
    if not how["do_sample"]:
        return int((logp + how["beta"] * rewards.double()).argmax())
    slot, _ = ops.ratio_sample(
        logp.float()[None], rewards[None], ids[None], how["beta"], how["temperature"],
        torch.tensor([how["seed"]]), step, True, backend="reference",
    )  # fmt: skip
    return int(slot)


@dataclass
class Row:
    tokens: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    near: list[bool] = field(default_factory=list)  # a nudge of NEAR would change this step

    def until(self, eos: int) -> Row:
        """This row as it would be had `eos` ended it."""
        n = self.tokens.index(eos) + 1 if eos in self.tokens else len(self.tokens)
        return Row(self.tokens[:n], self.rewards[:n], self.near[:n])


@torch.no_grad()
def decode_row(
    lm: Any, reward: RewardFn, prompt: torch.Tensor, *, k: int = 4, beta: float = 1.0,
    steps: int = 12, eos: Sequence[int] = (), bias: torch.Tensor | None = None,
    reward_prompt: torch.Tensor | None = None, do_sample: bool = False,
    temperature: float = 1.0, seed: int = 0,
) -> Row:  # fmt: skip
    how = {"do_sample": do_sample, "beta": beta, "temperature": temperature, "seed": int(seed)}
    row, ids = Row(), prompt
    seen = prompt if reward_prompt is None else reward_prompt
    for step in range(steps):
        logits = lm_logits(lm, ids, bias)
        order = torch.argsort(logits, descending=True, stable=True)  # stable: equal logits by id
        cand, rest = order[:k], order[k:]
        logp = torch.log_softmax(logits.double(), dim=-1)[cand]
        rewards = reward(torch.cat([seen.expand(k, -1), cand[:, None]], dim=1))
        slot = choose(logp, rewards, cand, step, how)
        nudged = logp.clone()
        nudged[slot] -= NEAR * (temperature if do_sample else 1.0)
        edge = len(rest) > 0 and bool(logits[cand[-1]] - logits[rest[0]] < NEAR)
        row.near.append(edge or choose(nudged, rewards, cand, step, how) != slot)
        row.tokens.append(int(cand[slot]))
        row.rewards.append(float(rewards[slot]))
        ids, seen = torch.cat([ids, cand[slot, None]]), torch.cat([seen, cand[slot, None]])
        if int(cand[slot]) in eos:
            break
    return row


def assert_same(out: Any, rows: list[Row], width: int, pad: int = 0, atol: float = 5e-5) -> int:
    """`out` (RewardGuidedOutput) is what the oracle says; returns the number of rows in which the
    two part at a near-tie, the one excuse there is (counted, and at most one per call)."""
    ties, tokens = 0, out.sequences[:, width:].tolist()
    for b, row in enumerate(rows):
        for t, want in enumerate(row.tokens):
            got = tokens[b][t] if t < len(tokens[b]) else "nothing"
            if got != want:
                assert row.near[t], f"row {b} step {t}: got {got}, want {row.tokens}, no near-tie"
                ties += 1
                break
            got_r, want_r = float(out.rewards[b, t]), row.rewards[t]
            bound = atol * (1 + abs(want_r))
            assert abs(got_r - want_r) <= bound, f"row {b} step {t}: {got_r=} {want_r=}"
        else:
            n = len(row.tokens)
            assert all(x == pad for x in tokens[b][n:]), f"row {b} goes on after its end"
            assert out.rewards[b, n:].isnan().all(), f"row {b} has rewards after its end"
    assert ties <= 1, f"{ties} of {len(rows)} rows part from the oracle at near-ties"
    if not ties:
        assert len(tokens[0]) == max(len(r.tokens) for r in rows)
    return ties
