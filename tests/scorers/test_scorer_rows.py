"""Rows of their own length: random schedules of all that can be done to them, on every scorer,
against full forwards without a cache."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_checkpoints import make_checkpoint
from oracle import public
from schedules import K, Schedule, schedules
from torch import Tensor

import rgtg_fast
from rgtg_fast.models.attention import last_attention
from rgtg_fast.models.reward_model import as_reward_model
from rgtg_fast.scorers import (
    AttentionCreditScorer,
    AutoregressiveScorer,
    LogprobScorer,
    TextScorer,
    VocabRewardScorer,
    make_scorer,
)
from rgtg_fast.scorers.joint import JointScorer

EOS = torch.tensor([zoo.EOS])


def separate(method: str, family: str, eos: bool) -> Schedule:
    """A reward model apart from the language model."""
    rm = zoo.rm(family)
    options = {"eos_ids": EOS, "eos_reward": "previous"} if eos else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scorer: Any = make_scorer(rm, k=K, method=method, **options)
    assert scorer.method == method
    reward = public(rm)
    with_eos = zoo.EOS if eos else -1
    return Schedule(scorer, lambda ids, prompt: reward(ids), with_eos, scorer.can_skip)


def joint(reward: Any, family: str, eos: bool) -> Schedule:
    """A head or an adapter on the language model, whose logits come from the same forwards."""
    options = {"eos_ids": EOS, "eos_reward": "previous"} if eos else {}
    fused = family not in ("gpt_oss", "gptj")
    scorer = JointScorer(reward, K, fused=fused, **options)
    twin = reward.twin()

    def full(ids: Tensor, prompt: int) -> Tensor:
        hidden, _ = twin.forward_base(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return twin.rewards(hidden[:, -1:])[:, 0]

    def logits_are_the_models(schedule: Schedule) -> None:
        for row, (tokens, _) in enumerate(schedule.rows.values()):
            want = reward.lm(torch.tensor(tokens)[None]).logits[0, -1]
            got = reward.lm.get_output_embeddings()(scorer.next_hidden[row])
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)

    schedule = Schedule(scorer, full, zoo.EOS if eos else -1)
    schedule.check = logits_are_the_models
    return schedule


@functools.cache
def head_on(family: str) -> Any:
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0)) / 32**0.5
    return rgtg_fast.RewardHead(zoo.lm(family), weight)


def credit(family: str, share: float = 0.5) -> Schedule:
    """Attention-based credit, whose rewards depend on where the answer begins."""
    rm = zoo.rm(family)
    scorer = AttentionCreditScorer(rm, share)
    parts = as_reward_model(rm)
    parts.attention = "eager"
    twin = parts.twin()

    def by_hand(ids: Tensor, prompt: int) -> Tensor:
        hidden, out = twin.forward_base(ids, use_cache=False, output_attentions=True)
        weights = last_attention(twin, out)[:, :, -1].mean(1)[:, prompt:]
        reward = twin.rewards(hidden[:, -1:])[:, 0]
        return (1 - share + share * weights[:, -1] / weights.sum(-1)) * reward

    return Schedule(scorer, by_hand)


def next_token(kind: type, family: str) -> Schedule:
    """Rewards of all next tokens from one forward: GenARM's and FaRMA's."""
    lm = zoo.lm(family)
    scorer = kind(lm)

    def full(ids: Tensor, prompt: int) -> Tensor:
        prefix, last = ids[:1, :-1], ids[:, -1]
        if kind is AutoregressiveScorer:
            logits = lm(prefix).logits[0, -1].log_softmax(-1)
        else:
            hidden = lm.base_model(prefix).last_hidden_state[0, -1]
            logits = lm.get_output_embeddings()(hidden)
        return logits[last]

    return Schedule(scorer, full)


def logprob(family: str) -> Schedule:
    """Log-probs of whole answers: of what comes behind the prompt."""
    lm = zoo.lm(family)
    return Schedule(LogprobScorer(lm), logprobs_of(lm))


def logprobs_of(lm: Any) -> Any:
    def full(ids: Tensor, prompt: int) -> Tensor:
        of_next = lm(ids).logits[:, :-1].double().log_softmax(-1)
        of_each = of_next.gather(2, ids[:, 1:, None])[..., 0]
        return of_each[:, prompt - 1 :].sum(1)

    return full


class Letters:
    """A tokenizer of ids as letters."""

    def get_vocab(self) -> dict[str, int]:
        return {chr(0x100 + i): i for i in range(zoo.VOCAB)}

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return "".join(chr(0x100 + int(i)) for i in ids)


class Merges(Letters):
    """Other tokens: runs of up to three letters that rise are one, which more text may change."""

    def get_vocab(self) -> dict[str, int]:
        return {"other": 0}

    def __call__(self, texts: list[str], truncation: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text) for text in texts]}

    def encode(self, text: str) -> list[int]:
        tokens = [zoo.BOS]
        while text:
            end = 1
            while end < min(3, len(text)) and text[end - 1] < text[end]:
                end += 1
            tokens.append(3 + sum(map(ord, text[:end])) % (zoo.VOCAB - 3))
            text = text[end:]
        return tokens


def retokenized(family: str) -> Schedule:
    """A causal reward model behind other tokens."""
    rm, letters, merges = zoo.rm(family), Letters(), Merges()
    scorer: Any = make_scorer(rm, k=K, tokenizer=letters, reward_tokenizer=merges)
    assert scorer.method == "retokenize"
    reward = public(rm)

    def full(ids: Tensor, prompt: int) -> Tensor:
        texts = [letters.decode(row, skip_special_tokens=True) for row in ids]
        return torch.cat([reward(torch.tensor([merges.encode(text)])) for text in texts])

    return Schedule(scorer, full, skips=True)


def text() -> Schedule:
    def reward(text: str) -> float:
        return sum(ord(c) * 0.7**i for i, c in enumerate(reversed(text))) / 100

    scorer = TextScorer(lambda texts: [reward(t) for t in texts], Letters())
    decode = functools.partial(Letters().decode, skip_special_tokens=True)
    return Schedule(
        scorer,
        lambda ids, prompt: torch.tensor([reward(decode(row)) for row in ids.tolist()]),
        skips=True,
    )


def composed(reduction: str, *parts: Schedule) -> Schedule:
    """Several scorers on the same rows."""
    scorers = [part.scorer for part in parts]
    sign = {"sum": (0.7, -0.3, 2.0)}.get(reduction, (1.5, 0.5, 1.0))[: len(parts)]
    penalty = {"penalty": 0.5} if reduction == "pessimistic" else {}
    reward = rgtg_fast.WeightedRewards(scorers, sign, reduction=reduction, offset=1.0, **penalty)

    def full(ids: Tensor, prompt: int) -> Tensor:
        each = torch.stack(
            [w * p.reward(ids, prompt).double() for w, p in zip(sign, parts, strict=True)]
        )
        if reduction == "sum":
            return (each.sum(0) + 1).float()
        if reduction == "min":
            return (each.min(0).values + 1).float()
        return (each.mean(0) - 0.5 * each.std(0, correction=0) + 1).float()

    return Schedule(make_scorer(reward, k=K), full, skips=any(p.skips for p in parts))


def pair() -> Schedule:
    """DPO's implicit reward."""
    policy, reference = zoo.lm("llama"), zoo.lm("gpt2")
    one, two = logprobs_of(policy), logprobs_of(reference)
    scorer: Any = make_scorer((policy, reference), k=K)
    return Schedule(scorer, lambda ids, prompt: (one(ids, prompt) - two(ids, prompt)).float())


TREES = ("llama", "gpt2", "mistral", "gemma3", "llama4", "qwen2", "gpt_oss", "deepseek_v3", "gptj")
CASES = {
    **{f"tree-{family}": functools.partial(separate, "tree", family) for family in TREES},
    **{
        f"expand-{family}": functools.partial(separate, "expand", family)
        for family in ("bloom", "mpt", "gpt_neo", "gemma3", "llama4")
    },
    "reencode-llama": functools.partial(separate, "reencode", "llama"),
    "reencode-bert": functools.partial(separate, "reencode", "bert"),
    **{
        f"joint-{family}": lambda eos, family=family: joint(head_on(family), family, eos)
        for family in ("llama", "gemma3", "gpt_oss")
    },
    "credit-llama": lambda eos: credit("llama"),
    **{
        f"logprob-{family}": lambda eos, family=family: logprob(family)
        for family in ("gpt2", "bloom")
    },
    "pair": lambda eos: pair(),
    "retokenize-llama": lambda eos: retokenized("llama"),
    "retokenize-gptj": lambda eos: retokenized("gptj"),
    "retokenize-gemma3": lambda eos: retokenized("gemma3"),
    "text": lambda eos: text(),
    "sum-tree-farma": lambda eos: composed(
        "sum", separate("tree", "llama", False), next_token(VocabRewardScorer, "mistral")
    ),
    "min-tree-reencode": lambda eos: composed(
        "min", separate("tree", "gpt2", False), separate("reencode", "bert", False)
    ),
    "pessimistic-three": lambda eos: composed(
        "pessimistic", separate("tree", "gemma3", False), text(), pair()
    ),
    **{
        f"{name}-{family}": lambda eos, kind=kind, family=family: next_token(kind, family)
        for name, kind in (("genarm", AutoregressiveScorer), ("farma", VocabRewardScorer))
        for family in ("llama", "mistral", "bloom")
    },
}
# One of each scorer, and what each way of running one is most likely to get wrong.
QUICK = ("tree-llama", "tree-llama4", "tree-gpt_oss", "expand-bloom", "reencode-llama")
QUICK += ("joint-gemma3", "credit-llama", "genarm-mistral", "farma-bloom", "logprob-bloom", "pair")
QUICK += (
    "retokenize-gptj",
    "retokenize-gemma3",
    "text",
    "sum-tree-farma",
    "min-tree-reencode",
    "pessimistic-three",
)
MANY = ("tree-gemma3", "tree-gpt_oss", "expand-gpt_neo", "reencode-llama", "joint-llama")
MANY += (
    "credit-llama",
    "genarm-llama",
    "farma-bloom",
    "pair",
    "pessimistic-three",
    "retokenize-llama",
)


def play(begin: Any, times: int) -> None:
    """That many schedules, each on the `begin(eos)` of one."""
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=times, deadline=None, derandomize=True, suppress_health_check=unhurried)
    @given(schedules, st.integers(0, 3), st.booleans())
    def run(schedule: list[tuple[str, int]], prefilled: int, eos: bool) -> None:
        begin(eos).run(schedule, prefilled)

    run()


@pytest.mark.parametrize("case", QUICK)
def test_rows_come_and_go(case: str) -> None:
    play(CASES[case], 4)


@pytest.mark.parametrize("case", QUICK)
def test_copies_of_a_row_go_their_own_ways(case: str) -> None:
    names = ("join", "step", "fork", "step", "extend", "fork", "step", "late", "fork", "crop")
    for first in (0, 100, 200):
        schedule = [(name, first + i) for i, name in enumerate((*names, "step", "step"))]
        CASES[case](False).run(schedule, first // 100)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_rows_come_and_go_in_every_family(case: str) -> None:
    play(CASES[case], 60)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", MANY)
def test_a_thousand_schedules(case: str) -> None:
    play(CASES[case], 1000)


@pytest.mark.parametrize("times", [2, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_rows_come_and_go_with_an_adapter(times: int, tmp_path: Path) -> None:
    _, lm = make_checkpoint(tmp_path)
    adapter = rgtg_fast.RewardAdapter.from_pretrained(lm, tmp_path)
    play(functools.partial(joint, adapter, "llama"), times)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gpt_oss", "gpt2"])
def test_rows_join_those_whose_masks_have_holes(family: str) -> None:
    """A window counts the hidden slots too; a row that joins has none."""
    rm = zoo.rm(family)
    scorer: Any = make_scorer(rm, k=K, method="tree")
    batch = zoo.left_pad(zoo.prompts(3, (12, 9)))
    batch["attention_mask"][0, 4:7] = 0
    (joined,) = zoo.prompts(4, (5,))
    want: Any = make_scorer(rm, k=K, method="tree")
    want.prefill(**batch)
    scorer.prefill(**batch)
    scorer.join([joined])
    rows = [None, None, joined]
    for step in range(8):
        ids = torch.arange(9).view(3, 3) * 5 + 4 + step
        got, expected = scorer.score(ids), want.score(ids[:2])
        torch.testing.assert_close(got[:2], expected, rtol=1e-4, atol=1e-4)
        texts = torch.cat([rows[2].expand(K, -1), ids[2][:, None]], dim=1)
        torch.testing.assert_close(got[2], public(rm)(texts), rtol=1e-4, atol=1e-4)
        slot = torch.tensor([step % 3, 1, 2])
        scorer.commit(slot)
        want.commit(slot[:2])
        rows[2] = texts[2]
    with pytest.raises(ValueError, match="mask hides tokens"):
        scorer.crop(scorer.handles[:1], [8])


def test_what_is_asked_of_rows_that_are_not_there_is_an_error() -> None:
    scorer: Any = make_scorer(zoo.rm("llama"), k=K)
    one, other = scorer.join(zoo.prompts(5, (4, 6)))
    ids = torch.arange(2 * K).view(2, K) + 5
    with pytest.raises(ValueError, match=r"handles: \[7\] are none of the 2 rows \[0, 1\]"):
        scorer.leave([7])
    with pytest.raises(ValueError, match="name a row twice"):
        scorer.score(ids, handles=[one, one])
    with pytest.raises(ValueError, match=r"prompts\[0\] must be token ids int64 \[n\], n >= 1"):
        scorer.join([torch.zeros(0, dtype=torch.int64)])
    with pytest.raises(ValueError, match="ids has the tokens of 1 rows for 2 handles"):
        scorer.extend([one, other], [torch.tensor([5])])
    for lengths in ([0, 3], [1, 7]):
        with pytest.raises(ValueError, match=r"lengths=\[.* for rows of \[4, 6\] tokens"):
            scorer.crop([one, other], lengths)
    scorer.score(ids)
    with pytest.raises(ValueError, match=r"slot has shape .1., and 2 rows are to be committed"):
        scorer.commit(torch.tensor([0]))
    scorer.crop([one], [2])
    with pytest.raises(ValueError, match="last scored"):
        scorer.commit(torch.tensor([0, 0]))
    scorer.commit(torch.tensor([1]), [other])
    scorer.finish()
    assert scorer.join(zoo.prompts(5, (4,))) == [0]
