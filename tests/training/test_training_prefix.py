"""One pass over a pair gives the loss and gradient of one row per prefix."""

import pytest
import torch
import torch.nn.functional as F
from tiny import EOS, PAD, gpt2_lm, gpt2_rm, llama_rm
from training import close, config, id_pairs, step, trainer

from rgtg_fast.training import PreferenceDataset


def exploded_loss(model, rows, extension="hold", first=1, linear=False):
    """The published way: a row per prefix and side, the shorter answer padded with EOS or held."""
    base = getattr(model, model.base_model_prefix)

    def reward(ids):
        hidden = base(torch.tensor([ids]), use_cache=False).last_hidden_state
        return model.score(hidden[:, -1])[0, 0]

    per_pair = []
    for row in rows:
        longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        losses, weights = [], []
        for i in range(first, longest + 1):
            sides = []
            for name in ("chosen_ids", "rejected_ids"):
                answer = row[name]
                if extension == "eos":
                    answer = answer + [EOS] * (longest - len(answer))
                sides.append(reward(row["prompt_ids"] + answer[:i]))
            losses.append(-F.logsigmoid(sides[0] - sides[1]))
            weights.append(float(i) if linear else 1.0)
        weight = torch.tensor(weights, dtype=torch.float64)
        per_pair.append((torch.stack(losses) * weight).sum() / weight.sum())
    return torch.stack(per_pair).mean()


@pytest.mark.parametrize("extension", ["hold", "eos"])
@pytest.mark.parametrize(
    # Llama's norms and rotary angles are fp32 inside, whatever the weights are.
    ("make", "tolerance"),
    [(gpt2_rm, 1e-10), (llama_rm, 1e-5)],
)
def test_loss_and_gradient_equal_the_exploded_rows(tmp_path, make, tolerance, extension):
    rows = id_pairs(5)
    model = make(initializer_range=0.2).double()
    loss, gradients = step(trainer(tmp_path, model, rows, extension=extension), rows)
    model.zero_grad()
    expected = exploded_loss(model, rows, extension)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=tolerance)
    close(gradients, {n: p.grad for n, p in model.named_parameters()}, tolerance)


@pytest.mark.parametrize("extension", ["hold", "eos"])
def test_evaluation_has_the_margin_of_every_prefix(tmp_path, extension):
    rows = [*id_pairs(4), {"prompt_ids": [5], "chosen_ids": [6, 7, PAD], "rejected_ids": [6, 7]}]
    model = gpt2_rm(initializer_range=0.2)
    trained = trainer(tmp_path, model, rows[:1], extension=extension)
    predicted = trained.predict(PreferenceDataset(rows))
    for row, margins, label in zip(
        rows, predicted.predictions, predicted.label_ids.tolist(), strict=True
    ):
        answers = [row["chosen_ids"], row["rejected_ids"]]
        assert label[:2] == [len(answer) for answer in answers]
        if extension == "eos":
            answers = [answer + [EOS] * (max(label[:2]) - len(answer)) for answer in answers]
        for i in range(1, max(label[:2]) + 1):
            texts = [torch.tensor([row["prompt_ids"] + answer[:i]]) for answer in answers]
            # Not the public forward, which looks for the last token that is no padding.
            hidden = [model.transformer(ids).last_hidden_state[0, -1] for ids in texts]
            margin = model.score(hidden[0] - hidden[1]).item()
            assert margins[i - 1] == pytest.approx(margin, abs=1e-4)
    assert label[2] == 2  # the last pair's answers begin alike


def test_linear_weights_from_the_second_prefix_on_equal_the_exploded_rows(tmp_path):
    rows = id_pairs(4, seed=1)
    model = gpt2_rm(initializer_range=0.2).double()
    loss, _ = step(trainer(tmp_path, model, rows, weights="linear", first=2), rows)
    expected = exploded_loss(model, rows, first=2, linear=True)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)


def test_full_is_bradley_terry_on_the_public_reward_of_whole_answers(tmp_path):
    rows = id_pairs(4, seed=2)
    model = gpt2_rm(initializer_range=0.2).double()
    loss, _ = step(trainer(tmp_path, model, rows, loss_type="full"), rows)
    gaps = [
        model(torch.tensor([r["prompt_ids"] + r["chosen_ids"]])).logits[0, 0]
        - model(torch.tensor([r["prompt_ids"] + r["rejected_ids"]])).logits[0, 0]
        for r in rows
    ]
    torch.testing.assert_close(loss, -F.logsigmoid(torch.stack(gaps)).mean().detach())


def test_margins_of_the_rows_are_taken_from_the_difference(tmp_path):
    rows = [{**row, "margin": 0.5 * n} for n, row in enumerate(id_pairs(3))]
    model = gpt2_rm(initializer_range=0.2).double()
    trained = trainer(tmp_path, model, rows, loss_type="full")
    loss, _ = step(trained, rows)
    plain = [step(trained, [{k: v for k, v in r.items() if k != "margin"}])[0] for r in rows]
    gaps = [-torch.log(torch.expm1(x)) for x in plain]
    expected = torch.stack([F.softplus(0.5 * n - g) for n, g in enumerate(gaps)]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["prefix", "genarm"])
def test_a_model_that_looks_ahead_is_refused(tmp_path, loss_type):
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    auto = BertForSequenceClassification if loss_type == "prefix" else BertForMaskedLM
    bert = auto(BertConfig(vocab_size=320, intermediate_size=16, num_labels=1, **shape))
    with pytest.raises(ValueError, match="looks ahead"):
        trainer(tmp_path, bert, id_pairs(4), loss_type=loss_type)


def test_a_language_model_is_refused_where_a_scalar_head_is_wanted(tmp_path):
    from tiny import gpt2_lm

    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        trainer(tmp_path, gpt2_lm(), id_pairs(4))


def test_training_learns_and_evaluates_by_prefix_length(tmp_path):
    from training import text_pairs

    trained = trainer(tmp_path, train=text_pairs(64), evaluate=text_pairs(32, seed=9), max_steps=30)
    trained.train()
    metrics = trained.evaluate()
    assert metrics["eval_prefix_accuracy"] > 0.9
    assert metrics["eval_accuracy_decile_50"] > 0.9
    history = [entry for entry in trained.state.log_history if "loss" in entry]
    assert history[-1]["loss"] < history[0]["loss"] and "accuracy" in history[-1]


@pytest.mark.parametrize("count", [8, 7])  # the last of 4 batches has one pair of two
@pytest.mark.parametrize("loss_type", ["prefix", "seq2seq"])  # means over rows, and over tokens
def test_gradient_accumulation_gives_the_step_of_the_whole_batch(tmp_path, count, loss_type):
    rows = PreferenceDataset(id_pairs(count))
    own = {"centering": 0.1} if loss_type == "prefix" else {}
    weights = []
    for size, pieces in ((8, 1), (2, 4)):
        kind = gpt2_rm if loss_type == "prefix" else gpt2_lm
        model = kind(initializer_range=0.1).double()
        trained = trainer(
            tmp_path,
            model,
            rows,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=pieces,
            optim="sgd",
            max_grad_norm=0.0,
            loss_type=loss_type,
            **own,
        )
        trained.train()
        weights.append(dict(model.named_parameters()))
    close(*weights, 1e-12)


def test_rows_that_the_model_has_no_positions_or_embeddings_for_are_refused(tmp_path):
    long = [row | {"prompt_ids": [5] * 20} for row in id_pairs(4)]
    with pytest.raises(
        ValueError, match=r"train has a row of 2. tokens and the model takes 16; set"
    ):
        trainer(tmp_path, gpt2_rm(n_positions=16), long)
    rewritten = [row | {"prompt_ids": [5] * 3, "chosen_ids": [7] * 7} for row in id_pairs(4)]
    with pytest.raises(ValueError, match=r"train has a row of 1[89] tokens \(prompt, draft, .*=8,"):
        trainer(tmp_path, gpt2_lm(n_positions=16), rewritten, loss_type="seq2seq")
    strange = [*id_pairs(3), {"prompt_ids": [5], "chosen_ids": [9], "rejected_ids": [10_000]}]
    with pytest.raises(ValueError, match="eval holds token id 10000 and the model has"):
        trainer(tmp_path, gpt2_rm(), id_pairs(4, seed=3), strange)


def test_margin_smoothing_and_centering_are_those_of_the_loss(tmp_path):
    rows = [{**row, "margin": 0.5} if n else row for n, row in enumerate(id_pairs(3))]
    model = gpt2_rm(initializer_range=0.2).double()
    options = {"margin": 0.25, "label_smoothing": 0.1, "centering": 0.3}
    loss, _ = step(trainer(tmp_path, model, rows, **options), rows)
    rewards = [
        [
            model(torch.tensor([row["prompt_ids"] + row[side][:i]])).logits[0, 0]
            for i in range(1, max(len(row["chosen_ids"]), len(row["rejected_ids"])) + 1)
        ]
        for row in rows
        for side in ("chosen_ids", "rejected_ids")
    ]
    per_pair = []
    for n, (chosen, rejected) in enumerate(zip(rewards[::2], rewards[1::2], strict=True)):
        r, s = torch.stack(chosen), torch.stack(rejected)
        gap = r - s - (0.5 if n else 0.25)
        losses = -0.9 * F.logsigmoid(gap) - 0.1 * F.logsigmoid(-gap) + 0.3 * (r + s) ** 2
        per_pair.append(losses.mean())
    torch.testing.assert_close(loss, torch.stack(per_pair).mean().detach())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "bt"}, "loss_type='bt'"),
        ({"weights": "quadratic"}, "weights='quadratic'"),
        ({"first": 0}, "first=0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"overlong": "cut"}, "overlong='cut'"),
        ({"invalid": "keep"}, "invalid='keep'"),
        ({"leaks": "maybe"}, "leaks='maybe'"),
        ({"eos": "always"}, "eos='always'"),
        ({"max_length": 1}, "max_length=1; pass at least 2"),
        ({"loss_type": "full", "extension": "eos"}, "extension='eos' has no part in .*'full'"),
        ({"loss_type": "genarm", "weights": "linear"}, "weights='linear' has no part in"),
        ({"loss_type": "rad", "margin": 1.0}, "margin=1.0 has no part in loss_type='rad'"),
        ({"loss_type": "seq2seq", "margin": 1.0}, "margin=1.0 has no part in loss_type='seq2seq'"),
        ({"loss_type": "genarm_prefix", "prefix_share": 1.1}, "prefix_share=1.1; pass 0 <="),
        ({"loss_type": "soft_q", "value_beta": -1.0}, "value_beta=-1.0; pass 0 or more, or inf"),
        ({"loss_type": "soft_q", "td_lambda": 2.0}, "td_lambda=2.0; pass 0 <= value <= 1"),
        ({"loss_type": "rad", "td_lambda": 0.5}, "td_lambda=0.5 has no part in loss_type='rad'"),
        ({"loss_type": "genarm", "prefix_share": 0.5}, "prefix_share=0.5 has no part in"),
        ({"separator": "x"}, "separator='x' has no part in loss_type='prefix', only in seq2seq"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)
