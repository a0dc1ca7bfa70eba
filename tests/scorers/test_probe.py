"""What the probe makes of a reward model's public forward."""

import warnings

import pytest
import torch
from tiny import full_reward, gpt2_rm, llama_rm, prompts
from torch import nn

from rgtg_fast.scorers import make_scorer


class WantsPairs(nn.Module):
    """A base and a head whose own forward is a loss over pairs, as in some training code."""

    def __init__(self, rm):
        super().__init__()
        self.transformer, self.score, self.config = rm.transformer, rm.score, rm.config

    def forward(self, input_ids, attention_mask):
        raise RuntimeError("an even number of rows is wanted")


class Holder(nn.Module):
    """A base and a head without a forward."""

    def __init__(self, rm):
        super().__init__()
        self.transformer, self.score, self.config = rm.transformer, rm.score, rm.config


class Named(nn.Module):
    """The head reads something else than the last hidden state; the public forward says so."""

    def __init__(self, rm):
        super().__init__()
        self.rm, self.model, self.score, self.config = rm, rm.model, rm.score, rm.config

    def forward(self, input_ids, attention_mask):
        out = self.rm(input_ids=input_ids, attention_mask=attention_mask)
        out.logits = -2 * out.logits
        return out


def rewards(model):
    ids = torch.tensor([[7, 8, 9]])
    scorer = make_scorer(model, k=3)
    scorer.prefill(**prompts(4))
    got = scorer.score(ids)[0]
    return got, torch.cat([prompts(4)["input_ids"].expand(3, -1), ids.T], 1)


def test_a_public_forward_that_fails_is_told_of_and_the_head_taken():
    with pytest.warns(UserWarning, match=r"WantsPairs failed with RuntimeError: an even number"):
        got, texts = rewards(WantsPairs(gpt2_rm()))
    torch.testing.assert_close(got, full_reward(gpt2_rm(), texts), rtol=1e-4, atol=1e-4)


def test_a_model_without_a_forward_of_its_own_is_nothing_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, texts = rewards(Holder(gpt2_rm()))
    torch.testing.assert_close(got, full_reward(gpt2_rm(), texts), rtol=1e-4, atol=1e-4)


def test_a_public_forward_that_differs_from_the_head_is_the_one_that_counts():
    with pytest.warns(UserWarning, match="public forward is not its head"):
        got, texts = rewards(Named(llama_rm()))
    torch.testing.assert_close(got, -2 * full_reward(llama_rm(), texts), rtol=1e-4, atol=1e-4)
