"""Every kind of reward under another default dtype or device, in inference mode, among threads, and
through generate_many: the tokens of a plain call."""

import threading

import pytest
import tiny
import torch
from test_numerics import SETTINGS

import rgtg_fast
from rgtg_fast import Reward, WeightedRewards, presets
from rgtg_fast.scorers import RewardHead

LM, RM, OTHER = tiny.llama_lm(), tiny.llama_rm(), tiny.gpt2_rm()
ARM, SECOND = tiny.llama_lm(seed=5), tiny.llama_lm(seed=6)
PROMPTS = tiny.prompts(5, 9)
WIDTH, V = LM.config.hidden_size, LM.config.vocab_size
DRAWN = {"do_sample": True, "top_k": 0}


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


SHARES = torch.tensor([0.7, 0.1])
REWARDS = {
    "pargs": presets.pargs(RM),
    "farma": presets.farma(ARM),
    "genarm": presets.genarm(ARM),
    "dpo_implicit": presets.dpo_implicit(ARM, SECOND),
    "cd_q": presets.cd_q(LM, randn(V, WIDTH)),
    "ilql": presets.ilql(LM, [randn(V, WIDTH), -randn(V, WIDTH)], randn(WIDTH)),
    "dexperts": presets.dexperts(ARM, SECOND),
    "contrastive": presets.contrastive(ARM),
    "a sum with shares of each row": {
        "reward_model": WeightedRewards([RM, OTHER], [SHARES, 0.3]),
        "k": 6,
    },
    "a sum over all tokens": {
        "reward_model": WeightedRewards(
            [Reward(ARM, reward_kind="genarm"), Reward(SECOND, reward_kind="farma")], [0.7, 0.3]
        ),
        "k": None,
    },
    "a budget": {"reward_model": WeightedRewards([(ARM, SECOND), RM], [0.7, 0.3]), "kl_budget": 0.3}
    | DRAWN,
    "gated": {"reward_model": RM, "k": 6, "min_entropy": 1.5},
    "heads": {
        "reward_model": WeightedRewards(
            [RewardHead(LM, randn(WIDTH)), RewardHead(LM, -randn(WIDTH), layer=1)], [1.0, 2.0]
        )
    },
    "texts": {
        "reward_model": lambda texts: [len(text) / 10 for text in texts],
        "tokenizer": tiny.tokenizer(),
        "k": 4,
    },
}


def answers(name, **more):
    options = {**PROMPTS, "max_new_tokens": 6, "seed": 3} | REWARDS[name] | more
    return rgtg_fast.generate(LM, **options).tolist()


@pytest.fixture(scope="module")
def want():
    return {name: answers(name) for name in REWARDS}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", REWARDS)
def test_a_setting_changes_no_token(name, setting, want):
    with SETTINGS[setting]():
        got = answers(name)
    assert got == want[name]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", REWARDS)
def test_nor_does_it_where_rows_come_and_go(name, setting, want):
    prompts = [
        row[mask.bool()]
        for row, mask in zip(PROMPTS["input_ids"], PROMPTS["attention_mask"], strict=True)
    ]
    options = {"batch_size": 2, "max_new_tokens": 6, "seed": 3} | REWARDS[name]
    with SETTINGS[setting]():
        got = list(rgtg_fast.generate_many(LM, prompts, **options))
    width = PROMPTS["input_ids"].shape[1]
    for answer in got:
        assert answer.error is None and answer.tokens == want[name][answer.index][width:]


@pytest.mark.parametrize("name", REWARDS)
def test_threads_share_what_a_preset_gives(name, want):
    got = []
    threads = [threading.Thread(target=lambda: got.append(answers(name))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [want[name]] * 3


@pytest.mark.parametrize("name", REWARDS)
def test_autocast_of_a_call_ends_with_it(name, want):
    with torch.autocast("cpu", torch.bfloat16):
        cast = answers(name)
    assert all(len(row) == len(other) for row, other in zip(cast, want[name], strict=True))
    assert answers(name) == want[name]


@pytest.mark.parametrize("name", REWARDS)
def test_rows_that_end_at_different_steps_with_every_option_on(name, want):
    width = PROMPTS["input_ids"].shape[1]
    options = {**PROMPTS, "max_new_tokens": 8, "seed": 3} | REWARDS[name] | DRAWN
    options |= {"eos_token_id": [want[name][0][width + 1], want[name][1][width + 3]]}
    options |= {"pad_token_id": 0, "min_new_tokens": 1, "num_return_sequences": 2}
    options |= {"top_p": 0.95, "temperature": 0.8, "repetition_penalty": 1.1}
    options |= {
        "return_dict_in_generate": True,
        "output_candidates": options.get("k", 5) is not None,
    }
    one = rgtg_fast.generate(LM, **options)
    # One token at a time, and rows that have ended stay.
    other = rgtg_fast.generate(LM, **options, speculate=False, compact=False)
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(one.rewards, other.rewards, rtol=1e-4, atol=1e-4, equal_nan=True)
