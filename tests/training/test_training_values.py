"""Values of prefixes: soft Q-learning against its formula and its fixed point, and roll-outs."""

import math

import pytest
import torch
from tiny import EOS, gpt2_lm, gpt2_rm
from training import close, normal, step, trainer
from transformers import AutoModelForCausalLM

from rgtg_fast.ops import prefix_bt_loss
from rgtg_fast.scorers import VocabRewardScorer
from rgtg_fast.training import LabelledDataset
from rgtg_fast.training.experimental import contrastive_twist_loss, rollout_targets, rollout_values
from rgtg_fast.training.objectives import soft_value, td_targets

ROWS = [
    {"prompt_ids": prompt, "answer_ids": answer, "label": label, "targets": [label] * len(answer)}
    for prompt, answer, label in (
        ([5, 6], [7, 8, 9, EOS], 1.5),
        ([5], [10, EOS], -2.0),
        ([], [11, 12, EOS], 0.3),  # no prompt: its first token has no Q
    )
]


def lm(seed=0):
    torch.manual_seed(seed)
    return gpt2_lm(initializer_range=0.2).double()


def value_of(q, logprobs, beta):
    """V of one state, written out."""
    if beta == math.inf:
        return q.max()
    if beta == 0:
        return (logprobs.exp() * q).sum()
    return (logprobs.exp() * (beta * q).exp()).sum().log() / beta


@pytest.mark.parametrize("beta", [1.0, 0.0, 2.5, math.inf])
@pytest.mark.parametrize(("decay", "first"), [(0.0, 1), (1.0, 1), (0.7, 2)])
def test_soft_q_is_the_squared_error_to_its_targets(tmp_path, beta, decay, first):
    model, base = lm(), lm(1)
    options = {"value_beta": beta, "td_lambda": decay, "first": first, "invalid": "drop"}
    trained = trainer(tmp_path, model, LabelledDataset(ROWS), loss_type="soft_q", **options)
    trained.reference_model, trained._parts = base, None
    loss, gradients = step(trained, ROWS)
    per_text = []
    for row in ROWS:
        ids, start, length = (
            row["prompt_ids"] + row["answer_ids"],
            len(row["prompt_ids"]),
            len(row["answer_ids"]),
        )
        q = model(torch.tensor([ids])).logits[0]
        logprobs = base(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        target, errors = torch.tensor(row["label"]).double(), []
        for i in range(length - 1, -1, -1):
            at = start + i  # the token's place; it is drawn from the state at - 1
            if i < length - 1:
                after = value_of(q[at].detach(), logprobs[at], beta)
                target = (1 - decay) * after + decay * target
            if at > 0 and i >= first - 1:
                errors.append((q[at - 1, ids[at]] - target) ** 2)
        per_text.append(torch.stack(errors).mean())
    expected = torch.stack(per_text).mean()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    close(gradients, {n: p.grad for n, p in model.named_parameters()}, 1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.7, 3.0])
def test_the_fixed_point_of_soft_values_is_the_log_mean_exp_of_the_rewards(beta):
    """Of all answers of two tokens out of three, by backward induction."""
    rng = torch.Generator().manual_seed(0)
    first = torch.rand(3, generator=rng).double().log_softmax(-1)
    second = torch.rand(3, 3, generator=rng).double().log_softmax(-1)
    rewards = torch.randn(3, 3, generator=rng).double()
    q = soft_value(rewards, second, beta)  # of each first token
    value = soft_value(q, first, beta)
    joint = (first[:, None] + second).flatten()
    if beta:
        want = (joint + beta * rewards.flatten()).logsumexp(-1) / beta
        # And the ratio policy of Q is the policy that is optimal at beta.
        policy = (first + beta * q).log_softmax(-1)[:, None] + (
            second + beta * rewards
        ).log_softmax(-1)
        optimum = (joint + beta * rewards.flatten()).log_softmax(-1)
        torch.testing.assert_close(policy.flatten(), optimum)
    else:
        want = (joint.exp() * rewards.flatten()).sum()
    torch.testing.assert_close(value, want)


def test_targets_of_one_step_and_of_all_steps():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    reward, lengths = torch.tensor([10.0, 20.0]), torch.tensor([3, 2])
    one, every = (td_targets(values, reward, lengths, decay) for decay in (0.0, 1.0))
    assert one.tolist()[0] == [2.0, 3.0, 10.0] and one.tolist()[1][:2] == [5.0, 20.0]
    assert every.tolist()[0] == [10.0] * 3 and every.tolist()[1][:2] == [20.0] * 2
    half = td_targets(values, reward, lengths, 0.5)
    assert half.tolist()[0] == [0.5 * 2 + 0.5 * (0.5 * 3 + 0.5 * 10), 0.5 * 3 + 0.5 * 10, 10.0]


def test_the_base_policy_of_soft_q_is_the_model_before_training(tmp_path):
    model = gpt2_lm(initializer_range=0.2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = trainer(tmp_path, model, LabelledDataset(ROWS), loss_type="soft_q")
    trained.train()
    assert any((p != before[name]).any() for name, p in model.named_parameters())
    for name, parameter in trained.reference_model.named_parameters():
        assert torch.equal(parameter, before[name]) and not parameter.requires_grad
    trained.save_model(str(tmp_path / "rm"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "rm")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.slow
def test_soft_q_learns_what_going_on_with_a_token_is_worth(tmp_path):
    """Token 20 leads to a good end half of the time, 30 never. (With values of its own base
    policy, which is uniform, all that was never seen would count.)"""
    rows = []
    for answer, label in (([20, 21, EOS], 1.0), ([20, 22, EOS], 0.0), ([30, 21, EOS], 0.0)):
        rows.append({"prompt_ids": [5, 6], "answer_ids": answer, "label": label})
    model = gpt2_lm(initializer_range=0.1)
    options = {"max_steps": 150, "learning_rate": 3e-3, "td_lambda": 1.0}
    trained = trainer(tmp_path, model, rows * 4, loss_type="soft_q", **options)
    trained.train()
    guide = VocabRewardScorer(model.eval())
    guide.prefill(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.long))
    good, bad = guide.score(torch.tensor([[20, 30]]))[0].tolist()
    assert good > bad + 0.1
    guide.commit(torch.tensor([0]))
    good, bad = guide.score(torch.tensor([[21, 22]]))[0].tolist()
    assert good == pytest.approx(1.0, abs=0.2) and bad == pytest.approx(0.0, abs=0.2)


def test_a_roll_outs_value_is_the_mean_the_log_mean_exp_or_the_best():
    rewards = torch.tensor([[1.0, 3.0], [-2.0, 0.0]]).double()
    assert rollout_values(rewards, 0.0).tolist() == [2.0, -1.0]
    assert rollout_values(rewards, math.inf).tolist() == [3.0, 0.0]
    want = [
        math.log((math.exp(0.5 * a) + math.exp(0.5 * b)) / 2) / 0.5 for a, b in rewards.tolist()
    ]
    assert rollout_values(rewards, 0.5).tolist() == pytest.approx(want)


def length(rows):
    return [float(len(row["answer_ids"])) for row in rows]


def test_roll_outs_end_at_eos_or_at_the_limit_and_whole_answers_keep_their_own_reward():
    model = gpt2_lm(initializer_range=0.02)
    never, at_once = model.config.vocab_size, gpt2_lm(initializer_range=0.02)
    bias = torch.zeros(never)
    bias[EOS] = 1e4  # after any prefix EOS follows; with the sign turned, never
    for lm_, sign in ((model, -1), (at_once, 1)):
        lm_.lm_head = torch.nn.Linear(model.config.n_embd, never)
        lm_.lm_head.bias.data = sign * bias
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8, EOS], "rejected_ids": [9]}]
    ends = rollout_targets(at_once, length, rows, samples=3, max_new_tokens=4)
    assert [row["targets"] for row in ends] == [[2.0, 3.0, 3.0], [2.0]]
    assert [row["label"] for row in ends] == [3.0, 1.0]
    goes_on = rollout_targets(model, length, rows, samples=3, max_new_tokens=4, beta=1.0)
    assert [row["targets"] for row in goes_on] == [
        pytest.approx([5.0, 6.0, 3.0]),
        pytest.approx([5.0]),
    ]


def test_roll_outs_are_samples_of_the_base_policy_and_leave_the_generator_alone():
    model = gpt2_lm(initializer_range=0.2).eval()
    logprobs = model(torch.tensor([[5, 7]])).logits[0, -1].log_softmax(-1)
    likely = int(logprobs.argmax())
    rows = [{"prompt_ids": [5], "answer_ids": [7]}]

    def share(seed):
        def reward(texts):
            return [float(row["answer_ids"][1:2] == [likely]) for row in texts]

        options = {"samples": 400, "max_new_tokens": 1, "batch_size": 200, "seed": seed}
        return rollout_targets(model, reward, rows, **options)[0]["targets"][0]

    state = torch.get_rng_state()
    p = float(logprobs.exp()[likely])
    assert share(0) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 400))
    assert share(0) == share(0) != share(1)
    assert torch.equal(state, torch.get_rng_state())


def test_rad_fits_the_targets_of_roll_outs(tmp_path):
    rows = rollout_targets(
        gpt2_lm(initializer_range=0.2),
        length,
        [{"prompt_ids": [5], "answer_ids": [7, 8]}],
        samples=2,
        max_new_tokens=3,
    )
    options = {"loss_type": "rad", "weights": "uniform"}
    model = gpt2_rm(initializer_range=0.2)
    loss, _ = step(trainer(tmp_path, model, LabelledDataset(rows), **options), rows)
    hidden = model.transformer(torch.tensor([[5, 7, 8]])).last_hidden_state[0, 1:]
    want = ((model.score(hidden)[:, 0] - torch.tensor(rows[0]["targets"])) ** 2).mean()
    torch.testing.assert_close(loss, want.detach())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples=0; pass at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; pass at least 1"),
        ({"beta": -1.0}, "beta=-1.0; pass 0 or more"),
        ({"rows": []}, "rows is empty"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(changes, message):
    rows = changes.pop("rows", [{"prompt_ids": [5], "answer_ids": [7]}])
    with pytest.raises(ValueError, match=message):
        rollout_targets(gpt2_lm(), length, rows, **changes)


def sampled(n=3, k=4, width=5):
    """Log-twists, mask and rewards of samples of unequal lengths."""
    lengths = torch.tensor([[1 + (i + 2 * j) % width for j in range(k)] for i in range(n)])
    mask = (torch.arange(width) < lengths[..., None]).long()
    return normal(n, k, width).requires_grad_(), mask, normal(n, k, seed=1), lengths


def test_the_gradient_of_twists_is_that_of_importance_weighted_samples():
    twists, mask, rewards, lengths = sampled()
    contrastive_twist_loss(twists, mask, rewards, beta=1.7).backward()
    want = torch.zeros_like(twists)
    for n in range(len(twists)):
        longest = int(lengths[n].max())
        positive = (1.7 * rewards[n]).exp() / (1.7 * rewards[n]).exp().sum()
        for t in range(longest):
            places = [min(t, int(length) - 1) for length in lengths[n]]
            psi = torch.stack([twists[n, k, at].detach().exp() for k, at in enumerate(places)])
            for k, at in enumerate(places):
                want[n, k, at] += (psi[k] / psi.sum() - positive[k]) / longest / len(twists)
    torch.testing.assert_close(twists.grad, want, rtol=1e-10, atol=1e-12)


def test_twists_of_two_samples_with_drawn_labels_are_bradley_terry_at_every_prefix():
    twists, mask, rewards, _ = sampled(k=2)
    twists = twists.detach()
    one, other = twists.unbind(1), mask.unbind(1)
    first, second = (
        prefix_bt_loss(one[a], one[b], other[a], other[b], reduction="none")
        for a, b in ((0, 1), (1, 0))
    )
    wins = rewards.softmax(1)
    expected = (wins[:, 0] * first + wins[:, 1] * second).mean()
    torch.testing.assert_close(contrastive_twist_loss(twists, mask, rewards), expected)


def test_the_optimal_twist_is_the_soft_value():
    """Over all 4 texts of two tokens, each once, under a uniform base policy."""
    rewards = torch.tensor([[0.3, -1.0, 0.7, 0.1]]).double()
    soft = rewards.view(2, 2).exp().mean(1).log().repeat_interleave(2)
    best = torch.stack([soft, rewards[0]], dim=-1)[None].requires_grad_()
    contrastive_twist_loss(best, torch.ones(1, 4, 2), rewards).backward()
    by_prefix = best.grad[0, :, 0].view(2, 2).sum(1)  # the same prefix has the same twist
    assert by_prefix.abs().max() < 1e-12 and best.grad[0, :, 1].abs().max() < 1e-12


def test_twists_that_do_not_fit_are_refused():
    twists, mask, rewards, _ = sampled()
    with pytest.raises(ValueError, match=r"rewards \[4\]; pass \[N, K, T\]"):
        contrastive_twist_loss(twists, mask, rewards[0])
    with pytest.raises(ValueError, match="a sample without tokens"):
        contrastive_twist_loss(twists, mask * 0, rewards)
