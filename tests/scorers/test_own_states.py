"""`VocabHead`: rewards of next tokens from the states that the language model has anyway."""

import copy
import threading
import weakref

import pytest
import torch
import zoo
from torch import nn

import rgtg_fast
from rgtg_fast import RewardHead, VocabHead, WeightedRewards
from rgtg_fast.decode import logits


def weights(lm, seed=3, rows=zoo.VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(rows, lm.config.hidden_size, generator=generator)


def guided(lm, reward, **options):
    call = {**zoo.left_pad(zoo.prompts()), "k": 6, "max_new_tokens": 8, "seed": 5}
    call |= {"do_sample": True, "return_dict_in_generate": True, "reward_model": reward}
    return rgtg_fast.generate(lm, **(call | options))


@torch.no_grad()
def assert_rewards(lm, out, reward, rows=3):
    """`reward(h)[v]` of the chosen tokens v, h of a plain forward of the text before v."""
    steps = out.rewards.shape[1]
    for row, prompt in zip(range(rows), zoo.prompts(), strict=False):
        answer = out.sequences[row, -steps:]
        hidden = lm.model(torch.cat([prompt, answer])[None], use_cache=False).last_hidden_state[0]
        want = reward(hidden[len(prompt) - 1 : -1]).gather(1, answer[:, None])[:, 0]
        torch.testing.assert_close(out.rewards[row], want.float(), rtol=1e-4, atol=1e-4)


def forwards_of(lm):
    """Counts the forwards of the language model's layers, whoever runs them."""
    count = []
    cls = type(lm.model.layers[0])
    plain = cls.forward

    def forward(self, *args, **kwargs):
        count.append(1)
        return plain(self, *args, **kwargs)

    return count, cls, forward


def test_no_forward_is_made_for_the_rewards(monkeypatch):
    lm = zoo.lm("llama")
    count, cls, forward = forwards_of(lm)
    head = VocabHead(lm, weights(lm))
    guided(lm, head)  # what is probed once
    monkeypatch.setattr(cls, "forward", forward)
    guided(lm, head)
    assert len(count) == 8 * len(lm.model.layers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_states_of_a_forward_of_its_own_give_the_same_tokens(family):
    lm = zoo.lm(family)
    q = weights(lm)
    want = guided(lm, VocabHead(lm, q))
    other = guided(lm, VocabHead(copy.deepcopy(lm), q))
    assert torch.equal(other.sequences, want.sequences)
    torch.testing.assert_close(other.rewards, want.rewards, rtol=1e-4, atol=1e-4)


def test_the_states_of_another_language_model_are_its_own():
    lm, other = zoo.lm("llama"), zoo.build_lm("llama", seed=9)
    q = weights(other)
    out = guided(lm, VocabHead(other, q))
    assert_rewards(other, out, lambda h: h @ q.T)


def test_hugging_faces_own_loop_gives_the_same_tokens():
    lm = zoo.lm("llama")
    head = VocabHead(lm, weights(lm))
    want = guided(lm, head).sequences
    assert torch.equal(guided(lm, head, output_hidden_states=True).sequences, want)
    hooked = copy.deepcopy(lm)
    hooked.register_forward_hook(lambda *_: None)
    assert torch.equal(guided(hooked, VocabHead(hooked, weights(lm))).sequences, want)


def test_another_prompt_for_the_reward_is_read():
    lm = zoo.lm("llama")
    prompts = [prompt.flip(0) for prompt in zoo.prompts()]
    own = zoo.left_pad(prompts)
    own = {f"reward_{name}": value for name, value in own.items()}
    q = weights(lm)
    out = guided(lm, VocabHead(lm, q), **own)
    want = guided(lm, VocabHead(copy.deepcopy(lm), q), **own)
    assert torch.equal(out.sequences, want.sequences)
    assert not torch.equal(out.rewards, guided(lm, VocabHead(lm, q)).rewards)


def test_double_q_less_the_value_of_modules_in_training_mode():
    lm = zoo.lm("llama")
    size = lm.config.hidden_size

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weights(lm, 4))

        def forward(self, x):
            return nn.functional.dropout(x, 0.5, self.training) @ self.weight.T

    torch.manual_seed(0)
    sequential = nn.Sequential(nn.Linear(size, 16), nn.Dropout(0.5), nn.Linear(16, zoo.VOCAB))
    dense, value = Dense(), nn.Linear(size, 1)
    out = guided(lm, VocabHead(lm, [sequential, dense], value))
    assert sequential.training and dense.training
    sequential.eval(), dense.eval()
    assert_rewards(
        lm, out, lambda h: torch.minimum(sequential(h), dense(h)) - value(h).expand(-1, zoo.VOCAB)
    )


def test_a_token_without_a_row_is_never_chosen():
    lm, rows = zoo.lm("llama"), zoo.VOCAB // 2
    for q in (weights(lm, rows=rows), nn.Sequential(nn.Linear(lm.config.hidden_size, rows))):
        out = guided(lm, VocabHead(lm, q), k=20, num_return_sequences=4)
        assert out.sequences[:, -8:].max() < rows
        assert guided(lm, VocabHead(lm, weights(lm)), k=20).sequences[:, -8:].max() >= rows


def test_rewards_of_all_tokens_are_those_of_each():
    lm = zoo.lm("llama")
    size = lm.config.hidden_size
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(size, 8), nn.ReLU(), nn.Linear(8, zoo.VOCAB - 5))
    head, h = VocabHead(lm, [weights(lm), narrow], torch.randn(size)), torch.randn(3, size)
    ids = torch.arange(zoo.VOCAB).expand(3, -1)
    of_each = head.rewards(h, ids)
    torch.testing.assert_close(head.score_all(h), of_each[:, :-5], rtol=1e-5, atol=1e-5)
    assert (of_each[:, -5:] == -torch.inf).all()


def test_rows_that_end_leave_and_copies_share_a_prompt():
    lm = zoo.lm("llama")
    q = weights(lm)
    ends = {"eos_token_id": list(range(3, 30)), "max_new_tokens": 16, "num_return_sequences": 3}
    want = guided(lm, VocabHead(copy.deepcopy(lm), q), **ends).sequences
    head = VocabHead(lm, q)
    assert torch.equal(guided(lm, head, **ends).sequences, want)
    plain = guided(lm, head, **ends, return_dict_in_generate=False)
    assert torch.equal(plain, want) and (want[:, -1] == zoo.PAD).any()


def test_in_a_sum_with_a_reward_head_on_the_same_states():
    lm = zoo.lm("llama")
    q, w = weights(lm), weights(lm, 9)[0]
    sums = [
        WeightedRewards([VocabHead(one, q), reward], [0.5, 2.0])
        for one, reward in (
            (lm, RewardHead(lm, w)),
            (copy.deepcopy(lm), RewardHead(copy.deepcopy(lm), w)),
        )
    ]
    one, two = (guided(lm, reward) for reward in sums)
    assert torch.equal(one.sequences, two.sequences)
    torch.testing.assert_close(one.rewards, two.rewards, rtol=1e-4, atol=1e-4)


def test_two_heads_in_a_sum_are_both_read():
    lm = zoo.lm("llama")
    a, b = weights(lm, 1), weights(lm, 2)
    out = guided(lm, WeightedRewards([VocabHead(lm, a), VocabHead(lm, b)], [0.5, 2.0]))
    assert_rewards(lm, out, lambda h: h @ (0.5 * a + 2.0 * b).T)


def test_entropy_gating_asks_for_rows_by_themselves():
    lm = zoo.lm("llama")
    q = weights(lm)
    out = guided(lm, VocabHead(lm, q), min_entropy=1.4, max_new_tokens=16)
    want = guided(lm, VocabHead(copy.deepcopy(lm), q), min_entropy=1.4, max_new_tokens=16)
    assert torch.equal(out.sequences, want.sequences)
    torch.testing.assert_close(out.rewards, want.rewards, rtol=1e-4, atol=1e-4, equal_nan=True)
    gated = out.rewards.isnan()
    assert (gated[0] & ~gated[1]).any(), "the rows asked for are the first ones at every step"


def test_generate_many_refills_the_rows_of_the_language_model():
    lm = zoo.lm("llama")
    head = VocabHead(lm, weights(lm))
    prompts = zoo.prompts() + zoo.prompts(seed=8) + zoo.prompts(seed=9)
    options = {"k": 6, "do_sample": True, "max_new_tokens": 16, "eos_token_id": list(range(3, 30))}
    answers = list(
        rgtg_fast.generate_many(lm, prompts, reward_model=head, seed=2, batch_size=3, **options)
    )
    assert len({len(answer.tokens) for answer in answers}) > 2
    seeds = rgtg_fast.ops.split_seed(2, len(prompts))
    for answer in answers:
        i = answer.index
        own = options | {"seed": seeds[i : i + 1], "return_dict_in_generate": True}
        alone = rgtg_fast.generate(lm, prompts[i][None], reward_model=head, **own)
        assert answer.tokens == alone.sequences[0, len(prompts[i]) :].tolist()
        torch.testing.assert_close(torch.tensor(answer.rewards), alone.rewards[0])


def test_an_interrupt_and_threads_on_one_head_leave_nothing():
    lm = zoo.lm("llama")
    head = VocabHead(lm, weights(lm))
    want = guided(lm, head).sequences

    class Stop(BaseException):
        pass

    def stop(input_ids, scores):
        raise Stop

    with pytest.raises(Stop):
        guided(lm, head, logits_processor=[stop])
    results = [None] * 4

    def run(i):
        results[i] = guided(lm, head).sequences

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(result, want) for result in results)


def test_a_call_leaves_no_cache_behind(monkeypatch):
    made, plain = [], logits.CachedLogits.__init__

    def init(self, *args, **kwargs):
        made.append(weakref.ref(self))
        plain(self, *args, **kwargs)

    monkeypatch.setattr(logits.CachedLogits, "__init__", init)
    lm = zoo.lm("llama")
    guided(lm, VocabHead(lm, weights(lm)))
    assert len(made) == 1 and made[0]() is None


@pytest.mark.parametrize("of_head", [torch.float32, torch.float64, torch.bfloat16])
def test_a_language_model_in_bf16_and_a_head_of_another_dtype(of_head):
    lm = copy.deepcopy(zoo.lm("llama")).to(torch.bfloat16)
    q = weights(lm).to(of_head)
    out = guided(lm, VocabHead(lm, q))
    want = guided(lm, VocabHead(copy.deepcopy(lm), q))
    torch.testing.assert_close(out.rewards[:, 0], want.rewards[:, 0], rtol=0.05, atol=0.05)


def test_speculation_says_why_not():
    lm = zoo.lm("llama")
    with pytest.warns(UserWarning, match="no speculation: rewards by 'own_states'"):
        guided(lm, VocabHead(lm, weights(lm)), speculate=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_kind": "farma"}, "reward_kind='farma' is for a causal language model"),
        ({"reward_label": 1}, "reward_label is for a classifier"),
    ],
)
def test_options_of_other_rewards_are_refused(options, message):
    lm = zoo.lm("llama")
    with pytest.raises(ValueError, match=message):
        guided(lm, VocabHead(lm, weights(lm)), **options)


def test_another_default_dtype_and_autocast():
    lm = zoo.lm("llama")
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(lm.config.hidden_size, 8), nn.Linear(8, zoo.VOCAB))
    want = guided(lm, VocabHead(lm, mlp))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(guided(lm, VocabHead(lm, mlp)).sequences, want.sequences)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = guided(lm, VocabHead(lm, mlp))
    torch.testing.assert_close(out.rewards[:, 0], want.rewards[:, 0], rtol=0.1, atol=0.1)
