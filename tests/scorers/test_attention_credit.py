"""Attention-based credit where the reward is read below the last layer of a model."""

import pytest
import torch
from tiny import llama_lm, prompts

from rgtg_fast.scorers import AttentionCreditScorer, RewardHead


@torch.no_grad()
def by_hand(lm, weight, ids, layer):
    """(1/2 + α/2) R of the third of three tokens, the prompt having one, by the LM's forward."""
    lm.set_attn_implementation("eager")
    out = lm(ids, output_attentions=True, output_hidden_states=True)
    lm.set_attn_implementation("sdpa")
    attention = out.attentions[layer - 1][:, :, -1].mean(1)[:, 1:]
    reward = out.hidden_states[layer][:, -1] @ weight
    return (0.5 + 0.5 * attention[:, -1] / attention.sum(-1)) * reward


@pytest.mark.parametrize("layer", [1, 2])
def test_a_head_on_a_layer_takes_the_attention_of_that_layer(layer):
    lm, weight = llama_lm(), torch.linspace(-1, 1, 32)
    scorer = AttentionCreditScorer(RewardHead(lm, weight, layer=layer), share=0.5)
    scorer.prefill(**prompts(1))
    scorer.score(torch.tensor([[7, 8]]))
    scorer.commit(torch.tensor([1]))
    got = scorer.score(torch.tensor([[9, 10]]))[0]
    first = prompts(1)["input_ids"].item()
    wanted = by_hand(lm, weight, torch.tensor([[first, 8, 9], [first, 8, 10]]), layer)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_head_on_the_embeddings_has_no_attention():
    scorer = AttentionCreditScorer(RewardHead(llama_lm(), torch.ones(32), layer=0))
    scorer.prefill(**prompts(3))
    with pytest.raises(ValueError, match=r"no attention weights .* below its head"):
        scorer.score(torch.tensor([[7, 8]]))
