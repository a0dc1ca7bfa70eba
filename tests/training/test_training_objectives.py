"""FaRMA, GenARM, RAD and head-only training against their formulas written out."""

import pytest
import torch
import torch.nn.functional as F
from tiny import BOS, EOS, gpt2_lm, gpt2_rm, llama_lm, tokenizer
from training import close, id_pairs, step, text_pairs, trainer
from transformers import AutoModelForCausalLM

from rgtg_fast.scorers import AutoregressiveScorer, RewriteScorer, VocabRewardScorer
from rgtg_fast.training import LabelledDataset, PreferenceDataset
from rgtg_fast.training.head_only import fit_head, head_accuracy, pair_features

SIDES = ("chosen_ids", "rejected_ids")


def lm():
    return gpt2_lm(initializer_range=0.2).double()


def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0]


def test_farma_first_compares_the_last_tokens_logits(tmp_path):
    rows, model = id_pairs(4), lm()
    loss, _ = step(trainer(tmp_path, model, rows, loss_type="farma"), rows, at=0)
    gaps = []
    for row in rows:
        chosen, rejected = (
            logits_of(model, row["prompt_ids"] + row[s])[-2, row[s][-1]] for s in SIDES
        )
        gaps.append(chosen - rejected)
    torch.testing.assert_close(loss, -F.logsigmoid(torch.stack(gaps)).mean().detach())


@pytest.mark.parametrize("first", [1, 3])
def test_farma_then_ties_each_tokens_logit_to_the_best_next_one(tmp_path, first):
    rows, model = id_pairs(4), lm()
    trained = trainer(tmp_path, model, rows, loss_type="farma", first=first, invalid="drop")
    loss, gradients = step(trained, rows, at=1)
    errors = []
    for row in rows:
        ids, start = row["prompt_ids"] + row["chosen_ids"], len(row["prompt_ids"])
        logits = logits_of(model, ids)
        for i in range(start + first - 1, len(ids) - 1):  # the last token has no next one
            errors.append((logits[i - 1, ids[i]] - logits[i].max()) ** 2)
    expected = torch.stack(errors).mean()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients["lm_head.weight"], model.lm_head.weight.grad)


def test_farma_takes_turns_of_the_length_asked_for(tmp_path):
    rows = id_pairs(4)
    trained = trainer(tmp_path, lm(), rows, loss_type="farma", alternate=3)
    losses = [step(trained, rows, at)[0].item() for at in range(9)]
    assert losses[0] == losses[2] == losses[6] != losses[3] == losses[5]


def test_genarm_compares_scaled_sums_of_log_probs(tmp_path):
    rows, model = id_pairs(4), lm()
    loss, _ = step(trainer(tmp_path, model, rows, loss_type="genarm", beta=0.3), rows)
    gaps = []
    for row in rows:
        sums = []
        for side in SIDES:
            ids, start = row["prompt_ids"] + row[side], len(row["prompt_ids"])
            logprobs = logits_of(model, ids).log_softmax(-1)
            sums.append(sum(logprobs[i - 1, ids[i]] for i in range(start, len(ids))))
        gaps.append(0.3 * (sums[0] - sums[1]))
    torch.testing.assert_close(loss, -F.logsigmoid(torch.stack(gaps)).mean().detach())


def exploded_losses(model, row, beta, first):
    """Bradley-Terry at each prefix length of a pair, one row and one forward for each prefix and
    side; the shorter answer is held at its end."""

    def reward(prompt, answer):
        logprobs = logits_of(model, prompt + answer).log_softmax(-1)
        return beta * sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(answer))

    longest = max(len(row[side]) for side in SIDES)
    for i in range(first, longest + 1):
        chosen, rejected = (reward(row["prompt_ids"], row[side][:i]) for side in SIDES)
        yield i, -F.logsigmoid(chosen - rejected)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(("weights", "first"), [("uniform", 1), ("linear", 2)])
def test_genarm_prefix_equals_one_row_per_prefix(tmp_path, share, weights, first):
    rows, model = id_pairs(5), lm()
    options = {"beta": 0.3, "prefix_share": share, "weights": weights, "first": first}
    loss, gradients = step(
        trainer(tmp_path, model, rows, loss_type="genarm_prefix", **options), rows
    )
    per_pair = []
    for row in rows:
        lengths, losses = zip(*exploded_losses(model, row, 0.3, first), strict=True)
        weight = torch.tensor(lengths if weights == "linear" else [1] * len(lengths)).double()
        every = (weight * torch.stack(losses)).sum() / weight.sum()
        per_pair.append(share * every + (1 - share) * losses[-1])
    expected = torch.stack(per_pair).mean()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    close(gradients, {n: p.grad for n, p in model.named_parameters()}, 1e-10)


def test_genarm_prefix_without_prefixes_is_genarm(tmp_path):
    rows = id_pairs(5)
    losses = [
        step(trainer(tmp_path, lm(), rows, loss_type="genarm", beta=0.3), rows),
        step(
            trainer(tmp_path, lm(), rows, loss_type="genarm_prefix", beta=0.3, prefix_share=0.0),
            rows,
        ),
    ]
    torch.testing.assert_close(losses[0][0], losses[1][0])
    close(losses[0][1], losses[1][1], 1e-10)


def rewriting(model, row, draft, target, separator=EOS):
    """Log-probs of the tokens of answer `target` behind prompt, answer `draft` and separator."""
    draft = row[draft][:-1] if row[draft][-1] == EOS else row[draft]
    before = [*row["prompt_ids"], *draft, separator]
    ids = before + row[target]
    logprobs = logits_of(model, ids).log_softmax(-1)
    return torch.stack([logprobs[i - 1, ids[i]] for i in range(len(before), len(ids))])


@pytest.mark.parametrize("separator", [None, "<bos>"])
def test_seq2seq_is_the_likelihood_of_the_chosen_answer_behind_either_draft(tmp_path, separator):
    rows, model = id_pairs(5), lm()
    rows[1]["rejected_ids"].pop()  # cut off: without EOS
    between = EOS if separator is None else tokenizer().get_vocab()[separator]
    options = {"loss_type": "seq2seq", "separator": separator}
    loss, gradients = step(trainer(tmp_path, model, rows, **options), rows)
    chosen = SIDES[0]
    each = [rewriting(model, row, draft, chosen, between) for row in rows for draft in SIDES]
    expected = -torch.cat(each).mean()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_the_separator_of_training_is_that_of_the_guide(tmp_path):
    """Also where the model's configuration has another EOS than the tokenizer."""
    for separator, wanted in ((None, EOS), ("<bos>", BOS)):
        model = gpt2_lm(eos_token_id=9)
        trained = trainer(tmp_path, model, id_pairs(4), loss_type="seq2seq", separator=separator)
        trained.save_model(str(tmp_path / "rm"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "rm")
        assert RewriteScorer(loaded).separator == wanted
        assert RewriteScorer(loaded, separator=7).separator == 7
    with pytest.raises(ValueError, match="separator='two tokens' is to be one token"):
        trainer(tmp_path, lm(), id_pairs(4), loss_type="seq2seq", separator="two tokens")


def test_seq2seq_judges_an_answer_by_how_likely_it_is_to_stay(tmp_path):
    rows, model = id_pairs(4), lm()
    trained = trainer(tmp_path, model, rows, loss_type="seq2seq")
    loss, rewards = trained.score(model, trained.data_collator(rows), None)
    assert loss == step(trained, rows)[0]
    for n, row in enumerate(rows):
        for s, side in enumerate(SIDES):
            want = rewriting(model, row, side, side).cumsum(0)
            torch.testing.assert_close(rewards[n, s, : len(row[side])], want)


def test_seq2seq_learns_to_leave_what_was_chosen_and_to_change_the_rest(tmp_path):
    trained = trainer(
        tmp_path,
        train=text_pairs(64),
        evaluate=text_pairs(32, seed=5),
        loss_type="seq2seq",
        max_steps=40,
        learning_rate=3e-3,
    )
    before = trained.evaluate()
    trained.train()
    after = trained.evaluate()
    assert after["eval_loss"] < 0.6 * before["eval_loss"]
    assert after["eval_accuracy"] > 0.9


@pytest.mark.parametrize(("weights", "first"), [("linear", 1), ("uniform", 1), ("uniform", 3)])
def test_rad_is_the_weighted_squared_error_of_every_prefix(tmp_path, weights, first):
    rows = [
        {"prompt_ids": [5, 6] if n else [], "answer_ids": list(range(7, 10 + n)), "label": 0.2 * n}
        for n in range(4)
    ]
    model = gpt2_rm(initializer_range=0.2).double()
    data = LabelledDataset(rows)
    options = {"loss_type": "rad", "weights": weights, "first": first}
    loss, _ = step(trainer(tmp_path, model, data, **options), data.rows)
    per_text = []
    for row in rows:
        total, norm = 0.0, 0.0
        for i in range(first, len(row["answer_ids"]) + 1):
            ids = torch.tensor([row["prompt_ids"] + row["answer_ids"][:i]])
            weight = i if weights == "linear" else 1
            total = total + weight * (model(ids).logits[0, 0] - row["label"]) ** 2
            norm += weight
        per_text.append(total / norm)
    expected = torch.stack(per_text).mean().detach()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_rad_learns_and_reports_its_error_by_length(tmp_path):
    rows = [{"text": "thank you", "label": 1.0}, {"text": "no, hello", "label": 0.0}] * 8
    trained = trainer(
        tmp_path,
        train=rows,
        evaluate=rows,
        loss_type="rad",
        max_steps=30,
        learning_rate=3e-3,
        leaks="allow",
    )
    before = trained.evaluate()
    trained.train()
    after = trained.evaluate()
    assert after["eval_mse"] < 0.05 < before["eval_mse"]
    assert after["eval_mse_decile_100"] == after["eval_mse"]


@pytest.mark.parametrize(
    ("loss_type", "scorer"),
    [
        ("farma", VocabRewardScorer),
        ("genarm", AutoregressiveScorer),
        ("genarm_prefix", AutoregressiveScorer),
    ],
)
def test_a_trained_model_guides_towards_what_was_chosen(tmp_path, loss_type, scorer):
    rows = [
        {"prompt_ids": [5, 6, 7 + n % 3], "chosen_ids": [20, 21], "rejected_ids": [30, 31]}
        for n in range(12)
    ]
    model = llama_lm(initializer_range=0.1)
    trained = trainer(tmp_path, model, rows, loss_type=loss_type, beta=1.0, max_steps=12)
    trained.train()
    guide = scorer(model.eval())
    guide.prefill(torch.tensor([[5, 6, 8]]), torch.ones(1, 3, dtype=torch.long))
    ids = torch.tensor([[20, 30]])
    guide.score(ids)
    guide.commit(torch.tensor([0]))
    chosen, rejected = guide.score(torch.tensor([[21, 31]]))[0]
    assert chosen > rejected


def test_a_classifier_is_refused_where_a_language_model_is_wanted(tmp_path):
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        trainer(tmp_path, gpt2_rm(), id_pairs(4), loss_type="farma")


def test_head_features_give_the_prefix_loss_of_the_same_head(tmp_path):
    rows = id_pairs(6)
    model = gpt2_rm(initializer_range=0.2)
    features = pair_features(model.transformer, PreferenceDataset(rows), batch_size=4)
    loss, gradients = step(trainer(tmp_path, model, rows), rows)
    weight = model.score.weight[0].detach().requires_grad_()
    mine = -(F.logsigmoid(features.differences @ weight) * features.weight).sum()
    mine.backward()
    torch.testing.assert_close(loss, mine.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients["score.weight"][0], weight.grad, rtol=1e-4, atol=1e-5)


def test_a_fitted_head_is_the_optimum_and_generalises():
    from tiny import tokenizer

    model = gpt2_lm(initializer_range=0.2)
    train, held_out = (
        pair_features(model, PreferenceDataset(text_pairs(n, seed), tokenizer()))
        for n, seed in ((64, 0), (32, 1))
    )
    l2 = 1e-2
    fit = fit_head(train, l2=l2)
    assert fit.accuracy > 0.9 and head_accuracy(fit.weight, held_out) > 0.8
    scale = (train.differences**2).mean(0).sqrt()
    theta = (fit.weight * scale).requires_grad_()
    loss = -(F.logsigmoid(train.differences / scale @ theta) * train.weight).sum()
    (loss + l2 / 2 * (theta**2).sum()).backward()
    assert theta.grad.abs().max() < 1e-4


def test_smoothed_labels_are_in_the_fit():
    features = pair_features(
        gpt2_rm(initializer_range=0.2).transformer, PreferenceDataset(id_pairs(20)), first=2
    )
    fit = fit_head(features, l2=1e-2, label_smoothing=0.2)
    gap = features.differences @ fit.weight
    losses = -0.8 * F.logsigmoid(gap) - 0.2 * F.logsigmoid(-gap)
    assert fit.loss == pytest.approx(float((losses * features.weight).sum()), rel=1e-5)
    assert features.length.min() == 2 and features.weight.sum() == pytest.approx(1)
    per_pair = torch.zeros(20).index_add(0, features.pair, features.weight)
    torch.testing.assert_close(per_pair, torch.full((20,), 1 / 20))


def test_full_features_are_those_of_the_whole_answers():
    rows = id_pairs(5)
    model = gpt2_rm(initializer_range=0.2)
    features = pair_features(model.transformer, PreferenceDataset(rows), full=True)
    for n, row in enumerate(rows):
        chosen, rejected = (
            model.transformer(torch.tensor([row["prompt_ids"] + row[s]])).last_hidden_state[0, -1]
            for s in SIDES
        )
        torch.testing.assert_close(features.differences[n], chosen - rejected, rtol=1e-4, atol=1e-4)
    assert features.pair.tolist() == list(range(5))


def test_features_of_an_inner_layer_are_its_hidden_states():
    rows = id_pairs(1)
    model = gpt2_rm(initializer_range=0.2)
    features = pair_features(model.transformer, PreferenceDataset(rows), layer=1, full=True)
    chosen, rejected = (
        model.transformer(
            torch.tensor([rows[0]["prompt_ids"] + rows[0][s]]), output_hidden_states=True
        ).hidden_states[1][0, -1]
        for s in SIDES
    )
    torch.testing.assert_close(features.differences[0], chosen - rejected, rtol=1e-4, atol=1e-4)


def test_a_fitted_head_guides_the_model_it_was_fitted_on():
    from tiny import prompts, tokenizer

    import rgtg_fast

    model = llama_lm(initializer_range=0.2)
    features = pair_features(model, PreferenceDataset(text_pairs(16), tokenizer()))
    weight = fit_head(features, l2=1e-2).weight
    inputs = prompts(5)
    out = rgtg_fast.generate(
        model,
        **inputs,
        reward_model=rgtg_fast.RewardHead(model, weight),
        k=3,
        max_new_tokens=3,
        return_dict_in_generate=True,
    )
    hidden = model.model(out.sequences).last_hidden_state[0]
    expected = (hidden @ weight)[inputs["input_ids"].shape[1] :]
    torch.testing.assert_close(out.rewards[0], expected, rtol=1e-4, atol=1e-4)
