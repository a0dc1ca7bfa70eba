"""Attention-based credit, pessimistic heads, consistency: the formulas hold."""

import itertools

import pytest
import torch
import zoo
from scipy import stats
from tiny import gpt2_lm, gpt2_rm, llama_lm, llama_rm, prompts
from training import config, id_pairs, normal, step, trainer

import rgtg_fast
from rgtg_fast.scorers import AttentionCreditScorer, RewardHead
from rgtg_fast.training import LabelledDataset, PreferenceDataset, fit_head, pair_features
from rgtg_fast.training.experimental import (
    PessimisticHead,
    attention_labels,
    consistency_rate,
    dense_rewards,
    kendall_tau,
    reward_consistency,
)
from rgtg_fast.training.experimental.pessimistic import gram


@torch.no_grad()
def by_hand(rm, ids, prompt):
    """R of the text `ids` and the last layer's attention of its last token, mean of the heads,
    over the answer, by the model's public forward."""
    rm.set_attn_implementation("eager")
    ids = torch.tensor([ids])
    out = rm(ids, output_attentions=True)
    weights = out.attentions[-1][0, :, -1].mean(0)[prompt:]
    rm.set_attn_implementation("sdpa")
    return out.logits.item(), (weights / weights.sum()).double()


# Attention-based credit


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_dense_rewards_are_the_equation_token_by_token(share):
    reward = torch.tensor([2.0, -3.0], dtype=torch.float64)
    attention = normal(2, 4, 6).softmax(-1)  # [N, heads, L]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    dense = dense_rewards(reward, attention, mask, share)
    for row, (first, end) in enumerate([(2, 6), (1, 4)]):
        a = attention[row].mean(0)[first:end]
        expected = torch.zeros(6, dtype=torch.float64)
        expected[first:end] = share * a / a.sum() * reward[row]
        expected[end - 1] += (1 - share) * reward[row]
        torch.testing.assert_close(dense[row], expected)
    torch.testing.assert_close(dense.sum(-1), reward)


@pytest.mark.parametrize("rm", [gpt2_rm, llama_rm])
def test_labels_are_the_running_sums_of_the_models_own_attention(rm):
    model, rows = rm(), id_pairs(5)
    labels = attention_labels(model, PreferenceDataset(rows), share=0.6, batch_size=4)
    assert len(labels) == 10 and model.config._attn_implementation == "sdpa"
    for number, label in enumerate(labels):
        row = rows[number // 2]
        answer = row[("chosen_ids", "rejected_ids")[number % 2]]
        reward, credit = by_hand(model, row["prompt_ids"] + answer, len(row["prompt_ids"]))
        dense = 0.6 * credit * reward
        dense[-1] += 0.4 * reward
        assert label["answer_ids"] == answer and label["label"] == pytest.approx(reward, abs=1e-4)
        torch.testing.assert_close(
            torch.tensor(label["targets"]), dense.cumsum(0).float(), rtol=1e-4, atol=1e-4
        )


def test_the_loss_is_the_squared_error_to_every_prefixs_own_target(tmp_path):
    rows = attention_labels(gpt2_rm(), id_pairs(3), share=1.0)
    model = gpt2_rm(seed=9)
    trained = trainer(tmp_path, model, rows, loss_type="rad", weights="uniform")
    loss, _ = step(trained, trained.train_dataset.rows)
    errors = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        rewards = model.score(model.transformer(ids).last_hidden_state)[0, :, 0]
        targets = torch.tensor(row["targets"])
        errors.append(((rewards[len(row["prompt_ids"]) :] - targets) ** 2).mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean().detach(), rtol=1e-4, atol=1e-4)


def test_evaluation_holds_rewards_against_the_prefixs_target(tmp_path):
    rows = attention_labels(gpt2_rm(), id_pairs(6), share=1.0)
    options = {"loss_type": "rad", "leaks": "allow", "max_steps": 1}
    trained = trainer(tmp_path, gpt2_rm(seed=9), rows, rows, **options)
    metrics = trained.evaluate()
    first = []
    for row in rows:
        at = -(-len(row["answer_ids"]) // 10) - 1
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"][: at + 1]])
        first.append((trained.model(ids).logits.item() - row["targets"][at]) ** 2)
    assert metrics["eval_mse_decile_10"] == pytest.approx(sum(first) / len(first), rel=1e-3)


def test_targets_that_do_not_fit_are_an_error():
    row = {"prompt_ids": [5], "answer_ids": [6, 7], "label": 4.0, "targets": [1.0]}
    with pytest.raises(ValueError, match="1 with targets that are not one number per token"):
        LabelledDataset([row])


def test_targets_are_cut_with_their_answer():
    row = {"prompt_ids": [5], "answer_ids": [6, 7, 8], "label": 4.0, "targets": [1.0, 2.0, 4.0]}
    assert LabelledDataset([row], max_length=3)[0]["targets"] == [1.0, 2.0]


@pytest.mark.parametrize(("rm", "share"), [(gpt2_rm, 0.5), (llama_rm, 1.0)])
def test_the_scorer_gives_each_candidate_its_own_share(rm, share):
    model, inputs = rm(), prompts(5, 3)
    scorer = AttentionCreditScorer(model, share=share)
    scorer.prefill(**inputs)
    texts = [[int(i) for i in ids if i] for ids in inputs["input_ids"]]
    starts, slots = [5, 3], [[1, 2], [0, 1], [2, 2]]
    for time, slot in enumerate(slots):
        ids = torch.arange(6).view(2, 3) + 10 * time + 7
        rewards = scorer.score(ids)
        for b, j in itertools.product(range(2), range(3)):
            reward, credit = by_hand(model, [*texts[b], int(ids[b, j])], starts[b])
            expected = (1 - share + share * credit[-1]) * reward
            assert rewards[b, j] == pytest.approx(float(expected), abs=2e-4)
        scorer.commit(torch.tensor(slot))
        for b in range(2):
            texts[b].append(int(ids[b, slot[b]]))
    scorer.keep_rows(torch.tensor([1]))
    reward, credit = by_hand(model, [*texts[1], 9], starts[1])
    expected = (1 - share + share * credit[-1]) * reward
    assert scorer.score(torch.tensor([[8, 9, 7]]))[0, 1] == pytest.approx(float(expected), abs=2e-4)


def test_a_scorer_without_a_share_is_the_reward_model():
    arguments = {"k": 4, "beta": 1.0, "max_new_tokens": 6}
    inputs, rm = prompts(6, 3), llama_rm()
    plain = rgtg_fast.generate(gpt2_lm(), **inputs, reward_model=rm, **arguments)
    credit = AttentionCreditScorer(rm, share=0.0)
    for _ in range(2):  # a scorer can be used again
        out = rgtg_fast.generate(gpt2_lm(), **inputs, reward_model=credit, **arguments)
        assert torch.equal(out, plain)


def test_a_model_that_looks_ahead_cannot_guide_by_its_attention():
    with pytest.raises(ValueError, match="cannot be scored from a cache"):
        AttentionCreditScorer(zoo.rm("bert"))


# Pessimistic heads


@pytest.fixture(scope="module")
def features():
    return pair_features(llama_lm(), PreferenceDataset(id_pairs(40)), full=True)


def test_a_pessimistic_head_is_its_equation(features):
    theta, reference, hidden = normal(32), normal(32, seed=1), normal(2, 3, 32, seed=2).float()
    head = PessimisticHead.from_features(features, theta, 1.5, l2=0.1, reference=reference)
    delta = features.differences.double()
    sigma = 0.1 * torch.eye(32, dtype=torch.float64) + sum(torch.outer(d, d) for d in delta)
    phi = hidden.double() - reference
    form = torch.einsum("...i,ij,...j", phi, torch.linalg.inv(sigma), phi)
    expected = phi @ theta - 1.5 * form.sqrt()
    assert head(hidden).dtype == torch.float32
    torch.testing.assert_close(head(hidden), expected.float())
    torch.testing.assert_close(head.uncertainty(hidden), form.sqrt())


def test_it_is_the_least_reward_of_the_confidence_ellipsoid(features):
    theta, phi = normal(32), normal(32, seed=2)
    sigma = gram(features.differences, 1.0)
    least = float(PessimisticHead(theta, sigma, 2.0)(phi))
    direction = torch.linalg.solve(sigma, phi)
    worst = theta - 2 * direction / (phi @ direction).sqrt()
    off = worst - theta
    assert float(off @ sigma @ off) == pytest.approx(4.0)
    assert float(worst @ phi) == pytest.approx(least, rel=1e-5)
    whiten = torch.linalg.inv(torch.linalg.cholesky(sigma)).T
    for other in normal(200, 32, seed=3):
        assert (theta + 2 * whiten @ other / other.norm()) @ phi >= least - 1e-5


def test_doubt_falls_where_data_is(features):
    head = PessimisticHead.from_features(features, torch.zeros(32), 1.0, l2=1e-2)
    seen = features.differences / features.differences.norm(dim=-1, keepdim=True)
    _, axes = torch.linalg.eigh(gram(features.differences, 1e-2))
    assert head.uncertainty(seen).max() < head.uncertainty(axes[:, 0])


def test_a_pessimistic_head_guides_and_without_penalty_is_the_linear_head(features):
    lm, fit = llama_lm(), fit_head(features)
    arguments = {**prompts(5, 3), "k": 4, "max_new_tokens": 5, "beta": 3.0}
    outs = [
        rgtg_fast.generate(lm, reward_model=RewardHead(lm, head), **arguments).tolist()
        for head in (
            fit.weight,
            PessimisticHead.from_features(features, fit.weight, 0.0),
            PessimisticHead.from_features(features, fit.weight, 50.0),
        )
    ]
    assert outs[0] == outs[1] != outs[2]


def test_a_saved_head_is_the_same(features, tmp_path):
    head = PessimisticHead.from_features(features, normal(32), 0.7, reference=normal(32, seed=1))
    head.save(tmp_path / "head.safetensors")
    hidden = normal(4, 32)
    assert torch.equal(PessimisticHead.load(tmp_path / "head.safetensors")(hidden), head(hidden))


def test_a_sigma_that_is_no_covariance_is_an_error():
    with pytest.raises(ValueError, match="not positive definite; pass a larger l2"):
        PessimisticHead(torch.ones(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1.0)


# Consistency


@pytest.mark.parametrize("values", [3, 50])
@pytest.mark.parametrize("n", [2, 3, 9])
def test_tau_b_is_scipys_ties_and_all(values, n):
    generator = torch.Generator().manual_seed(n)
    a, b = torch.randint(values, (2, 40, n), generator=generator).double()
    expected = [stats.kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(
        kendall_tau(a, b, "b"), torch.tensor(expected, dtype=torch.float64), equal_nan=True
    )


def test_tau_a_counts_pairs_in_order_less_pairs_out_of_order():
    a, b = torch.tensor([1.0, 1, 2, 3]), torch.tensor([1.0, 2, 2, 0])
    # Tied in a or b: (0, 1), (1, 2). Alike: (0, 2). Opposed: (0, 3), (1, 3), (2, 3).
    assert float(kendall_tau(a, b)) == (1 - 3) / 6
    infinite = torch.tensor([0.0, torch.inf, torch.inf])
    assert float(kendall_tau(infinite, infinite)) == 2 / 3


def test_consistency_is_one_for_equal_rankings_zero_for_opposite_half_for_ties():
    a = torch.tensor([1.0, 5, 3]).expand(3, 3)
    b = torch.stack([a[0] * 2, -a[0], torch.zeros(3)])
    assert consistency_rate(a, b).tolist() == [1.0, 0.0, 0.5]


def test_answers_to_one_prompt_are_ranked_together():
    rows, (one, two) = id_pairs(6), (gpt2_rm(seed=4), gpt2_rm(seed=5))
    for row in rows[:3]:
        row["prompt_ids"] = rows[0]["prompt_ids"]
    rows[1]["chosen_ids"] = rows[0]["chosen_ids"]  # counted once
    groups = [rows[:3], *([row] for row in rows[3:])]
    rates = []
    for group in groups:
        answers = {tuple(row[s]) for row in group for s in ("chosen_ids", "rejected_ids")}
        texts = [torch.tensor([[*group[0]["prompt_ids"], *answer]]) for answer in answers]
        scores = [[model(ids).logits.item() for ids in texts] for model in (one, two)]
        rates.append((stats.kendalltau(*scores).statistic + 1) / 2)
    rate = reward_consistency(one, two, PreferenceDataset(rows), batch_size=4)
    assert rate == pytest.approx(sum(rates) / len(rates))
    assert reward_consistency(one, one, PreferenceDataset(rows)) == 1.0


@pytest.mark.parametrize("loss_type", ["prefix", "full"])
def test_consistency_weighs_each_pair_against_its_swap(tmp_path, loss_type):
    rows, model = id_pairs(4), gpt2_rm(initializer_range=0.1)
    swapped = [
        row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows
    ]
    plain = trainer(tmp_path, model, rows, loss_type=loss_type)
    forward, backward = step(plain, rows), step(plain, swapped)
    weighed = step(trainer(tmp_path, model, rows, loss_type=loss_type, consistency=0.8), rows)
    smoothed = step(trainer(tmp_path, model, rows, loss_type=loss_type, label_smoothing=0.2), rows)
    torch.testing.assert_close(weighed[0], 0.8 * forward[0] + 0.2 * backward[0])
    torch.testing.assert_close(weighed[0], smoothed[0])
    for name, gradient in weighed[1].items():
        expected = 0.8 * forward[1][name] + 0.2 * backward[1][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"consistency": 0.5}, "no more than by chance"),
        ({"consistency": 0.9, "label_smoothing": 0.2}, "both given"),
        ({"consistency": 0.9, "loss_type": "rad"}, "has no part in loss_type='rad'"),
    ],
)
def test_consistencies_that_make_no_sense_are_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
