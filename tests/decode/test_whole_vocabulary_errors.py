"""Rewards that are no numbers, and requests that k=None and candidates="sum" cannot serve."""

import pytest
import tiny
import torch
from mixtures import models
from test_whole_vocabulary import guided, rewards

import rgtg_fast
from rgtg_fast.scorers import AutoregressiveScorer, VocabRewardScorer


class Broken(VocabRewardScorer):
    """Its rewards of one row go wrong at the third token."""

    value = torch.nan

    def _rewards_of_all(self, state):
        rewards = super()._rewards_of_all(state)
        if int(self.texts.counts[1]) == 9 + 2:
            rewards[1, 17] = self.value
        return rewards

    def _rewards(self, state, ids):
        return self._rewards_of_all(state).gather(1, ids)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "more", [{"k": None}, {"k": 4, "candidates": "sum"}, {"guided_top_p": 0.5}]
)
def test_a_reward_that_is_no_number_is_an_error_of_its_row(value, sampled, more):
    scorer = Broken(models()["a"])
    scorer.value = value
    if "guided_top_p" in more:
        more = {"k": None} | more
    with pytest.raises(ValueError, match="row 1, step 2: the reward model gave"):
        guided({"reward_model": scorer}, sampled=sampled, **more)
    assert not scorer.handles
    # Without a look, the other rows go on as they would.
    out = guided({"reward_model": scorer}, sampled=sampled, check_nan=False, **more)
    options, _ = rewards()["farma"]
    want = guided(options, sampled=sampled, **more)
    assert torch.equal(out.sequences[[0, 2]], want.sequences[[0, 2]])


class Shapeless(AutoregressiveScorer):
    def score_all(self):
        return super().score_all()[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": None}, "k=None needs the reward of every token, and LlamaForSequenceClassification"),
        ({"k": 5, "candidates": "sum"}, "candidates='sum' needs the reward of every token"),
        ({"candidates": "both"}, "candidates='both' is unknown; pass one of lm, sum"),
        ({"guided_top_p": 0.0}, r"guided_top_p=0.0; pass a number in \(0, 1\]"),
        ({"guided_top_p": float("nan")}, "guided_top_p=nan"),
        ({"guided_top_p": torch.tensor([0.5])}, "guided_top_p="),
        ({"guided_top_p": "0.5"}, "guided_top_p must be a float"),
        ({"guided_top_p": 0.5, "kl_budget": 0.1, "do_sample": True}, "pass one of them"),
        ({"k": 0}, "k=0 is out of range"),
    ],
)
def test_unclear_requests_are_refused_before_the_models_run(rm, options, message):
    with pytest.raises(ValueError, match=message):
        guided({"reward_model": rm} | options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": None, "output_candidates": True}, "k=None has no candidates; leave it out, or pass"),
        ({"k": None, "kl_budget": 0.1, "do_sample": True}, "kl_budget= solves .* and k=None looks"),
        ({"candidates": "sum", "min_entropy": 0.1}, "min_entropy= is of .* candidates='sum'"),
        ({"k": None, "prune": True, "reward_range": (-1, 1)}, "scores all candidates or none"),
        ({"k": None, "reward_model": 2 * Shapeless(tiny.llama_lm())}, r"score_all gave \[300\]"),
        (
            {"k": None, "reward_model": Shapeless(tiny.llama_lm()), "reward_kind": None},
            r"Shapeless.score_all gave \[300\]; it must give rewards \[B, V\] of every token",
        ),
    ],
)  # fmt: skip
def test_what_needs_candidates_is_refused(options, message):
    given, _ = rewards()["genarm"]
    if "reward_model" in options:
        given = {}
    with pytest.raises(ValueError, match=message):
        guided(given | options)


def test_generate_many_refuses_them_where_rows_cannot_come_and_go():
    options, _ = rewards()["genarm"]
    hooked = tiny.llama_lm()
    hooked.model.register_forward_hook(lambda *a: None)
    for more in ({"k": None}, {"k": 5, "guided_top_p": 0.5}):
        with pytest.raises(
            ValueError, match=r"need rows that come and go, and Llama.*call generate"
        ):
            next(rgtg_fast.generate_many(hooked, [[3, 4]], **options, **more, max_new_tokens=2))


def test_speculation_leaves_them_alone(rm):
    options, _ = rewards()["genarm"]
    with pytest.warns(UserWarning, match="no speculation: "):
        got = guided(options, sampled=True, k=None, speculate=4)
    assert torch.equal(got.sequences, guided(options, sampled=True, k=None).sequences)
    with pytest.warns(UserWarning, match=r"guided_top_p= take in the rewards of a step as a whole"):
        guided({"reward_model": rm}, sampled=True, guided_top_p=0.5, speculate=4)
