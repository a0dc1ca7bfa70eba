"""Candidates at several positions in one forward, against a forward for each of their texts."""

import pytest
import torch
import zoo
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lora_checkpoints import make_checkpoint

import rgtg_fast
from rgtg_fast.models.reward_model import as_reward_model
from rgtg_fast.scorers import TreeScorer
from rgtg_fast.scorers.joint import JointScorer

K, AHEAD = 4, 5
KINDS = ["tree", "tree of gemma3", "head", "adapter"]


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    _, lm = make_checkpoint(path, "qwen2")
    width = lm.config.hidden_size
    weight = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return {
        "tree": as_reward_model(zoo.build_rm("llama")),
        "tree of gemma3": as_reward_model(zoo.build_rm("gemma3")),  # sliding windows
        "head": rgtg_fast.RewardHead(lm, weight / width**0.5),
        "adapter": rgtg_fast.RewardAdapter.from_pretrained(lm, path),
    }


def new_scorer(reward_models, kind, eos_reward):
    rm = reward_models[kind]
    cls = TreeScorer if kind.startswith("tree") else JointScorer
    scorer = cls(
        rm,
        K,
        fused=True,
        capacity=64,
        eos_ids=torch.tensor([zoo.EOS]),
        eos_reward=eos_reward,
    )
    scorer.ahead = AHEAD
    return scorer


def reward_of(rm, text, eos_reward):
    """The reward of a text by a forward over all of it, without a cache."""
    if eos_reward == "previous" and text[-1] == zoo.EOS:
        text = text[:-1]
    with torch.no_grad():
        hidden, _ = rm.twin().forward_base(torch.tensor([text]), use_cache=False)
        return float(rm.rewards(hidden[:, -1:], "reference")[0, 0])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_rewards_of_combs_are_those_of_whole_texts(reward_models, kind, data):
    """Rounds of combs of any depth, with any candidates left out, each row taking any number."""
    rm = reward_models[kind]
    eos_reward = data.draw(st.sampled_from(["hidden", "previous"]))
    scorer = new_scorer(reward_models, kind, eos_reward)
    token = st.integers(3, zoo.VOCAB - 1)
    texts = [data.draw(st.lists(token, min_size=1, max_size=9)) for _ in range(2)]
    scorer.prefill(*zoo.left_pad([torch.tensor(t) for t in texts]).values())
    for _ in range(3):
        m = data.draw(st.integers(1, AHEAD))
        draw = data.draw(st.integers(0, 2**31))
        generator = torch.Generator().manual_seed(draw)
        # Different ids at a position, as candidates are.
        ids = torch.rand((2, m, zoo.VOCAB), generator=generator).topk(K).indices
        # What comes after EOS is of no row.
        chance = torch.rand((2, m, K), generator=generator).where(ids != zoo.EOS, -1.0)
        chain = chance.argmax(-1)
        keep = torch.rand((2, m, K), generator=generator) < data.draw(st.floats(0.2, 1.5))
        depth = torch.tensor([data.draw(st.integers(0, m)) for _ in texts])
        keep &= (torch.arange(m) < depth[:, None])[..., None]
        keep |= (torch.arange(K) == chain[..., None]) & (torch.arange(m) < depth[:, None])[
            ..., None
        ]
        if not keep.any():
            keep[0, 0, int(chain[0, 0])], depth[0] = True, 1
        got = scorer.score_comb(ids, chain[:, :-1], keep)
        assert torch.equal(got.isnan(), ~keep)
        for row, text in enumerate(texts):
            drafted = ids[row].gather(1, chain[row, :, None])[:, 0].tolist()
            for at, slot in keep[row].nonzero().tolist():
                behind = [*text, *drafted[:at], int(ids[row, at, slot])]
                want = reward_of(rm, behind, eos_reward)
                assert abs(float(got[row, at, slot]) - want) < 2e-4, (kind, row, at, slot)
        counts = torch.tensor([data.draw(st.integers(0, int(d))) for d in depth])
        slot = torch.zeros(2, dtype=torch.int64)
        for row, count in enumerate(counts.tolist()):
            if count:
                possible = keep[row, count - 1] & (ids[row, count - 1] != zoo.EOS)
                kept = possible.nonzero()[:, 0].tolist()
                slot[row] = data.draw(st.sampled_from(kept))
                drafted = ids[row].gather(1, chain[row, :, None])[: count - 1, 0].tolist()
                texts[row] += [*drafted, int(ids[row, count - 1, slot[row]])]
        scorer.commit_comb(counts, slot)
    got = scorer.score(ids[:, 0])
    for row, text in enumerate(texts):
        for slot in range(K):
            want = reward_of(rm, [*text, int(ids[row, 0, slot])], eos_reward)
            assert abs(float(got[row, slot]) - want) < 2e-4
