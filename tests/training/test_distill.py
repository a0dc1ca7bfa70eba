"""Distillation of the guided policy into a language model: its rows, its loss, what it learns."""

import json
import math

import pytest
import torch
import transformers
from on_policy import PROMPTS
from tiny import gpt2_lm, gpt2_rm, tokenizer
from training import close, normal, step, train, trainer, write_rows

import rgtg_fast
from rgtg_fast.training import GuidedAnswers, guided_rows

LORA = "lora={r: 16, lora_alpha: 32, target_modules: all-linear}"
OPTIONS = {"k": 5, "beta": 2.0, "temperature": 0.7, "max_new_tokens": 5}


def models():
    return gpt2_lm(initializer_range=0.2, n_positions=128), gpt2_rm(initializer_range=0.2)


def made(count=12, **changes):
    lm, rm = models()
    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(count)]
    options = OPTIONS | changes
    return list(guided_rows(lm, prompts, reward_model=rm, tokenizer=tokenizer(), seed=3, **options))


def test_a_row_has_the_answer_of_the_guided_policy_and_the_policy_of_every_step():
    lm, rm = models()
    for n, row in enumerate(made(8, batch_size=3)):
        ids = torch.tensor([row["prompt_ids"]])
        seed = rgtg_fast.ops.split_seed(3, 8)[n : n + 1]
        out = rgtg_fast.generate(
            lm, ids, reward_model=rm, seed=seed, do_sample=True, top_k=0, **OPTIONS
        )
        assert row["answer_ids"] == out[0, ids.shape[1] :].tolist()[: len(row["answer_ids"])]
        # Against forwards without cache, padding or kernels.
        for t in range(len(row["answer_ids"])):
            prefix = row["prompt_ids"] + row["answer_ids"][:t]
            with torch.no_grad():
                logp = lm(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
                best = logp.topk(5).indices
                whole = torch.tensor([[*prefix, i] for i in best.tolist()])
                hidden = rm.transformer(whole).last_hidden_state[:, -1]
                scores = (logp[best] + 2.0 * rm.score(hidden)[:, 0]) / 0.7
            found = dict(zip(row["candidate_ids"][t], row["candidate_logprobs"][t], strict=True))
            assert set(found) == set(best.tolist())
            expected = dict(zip(best.tolist(), scores.log_softmax(-1).tolist(), strict=True))
            assert found == pytest.approx(expected, abs=1e-4)


def test_rows_survive_json_and_top_k_leaves_steps_of_fewer_candidates():
    rows = made(12, top_k=3)
    assert min(len(s) for row in rows for s in row["candidate_ids"]) < 5
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert GuidedAnswers(rows).report.kept == 12


def test_the_loss_is_the_kl_of_the_guided_policy_from_the_model(tmp_path):
    rows = made(6, top_k=3)
    model = gpt2_lm(initializer_range=0.2, n_positions=128).double()
    trained = trainer(tmp_path, model, rows, loss_type="distill")
    loss, gradients = step(trained, trained.train_dataset.rows)
    model.zero_grad()
    total = 0.0
    for row in rows:
        start, ids = len(row["prompt_ids"]), row["prompt_ids"] + row["answer_ids"]
        logits = model(torch.tensor([ids])).logits[0]
        for t, (own, logq) in enumerate(
            zip(row["candidate_ids"], row["candidate_logprobs"], strict=True)
        ):
            logp = logits[start + t - 1].log_softmax(-1)
            for token, value in zip(own, torch.tensor(logq).double(), strict=True):
                total = total + value.exp() * (value - logp[token]) / len(rows)
    total.backward()
    torch.testing.assert_close(loss, total.detach(), rtol=1e-7, atol=1e-7)
    close(gradients, {n: p.grad for n, p in model.named_parameters()}, 1e-6)


def test_a_model_that_is_the_policy_costs_nothing_and_another_does(tmp_path):
    """At β = 0, over the whole of a small support, the guided policy is the language model's."""
    lm, rm = models()
    prompts = [tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    (row, *_) = guided_rows(lm, prompts, reward_model=rm, k=64, beta=0.0, max_new_tokens=4)
    left_out = []
    for t in range(len(row["answer_ids"])):
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"][:t]])
        with torch.no_grad():
            probability = lm(ids).logits[0, -1].softmax(-1)
        left_out.append(-math.log(float(probability[row["candidate_ids"][t]].sum())))
    trained = trainer(tmp_path, lm, [row], loss_type="distill")
    loss, _ = step(trained, trained.train_dataset.rows)
    assert loss.item() == pytest.approx(sum(left_out), abs=1e-4)
    with torch.no_grad():
        lm.lm_head.weight.add_(normal(*lm.lm_head.weight.shape).float() * 0.1)
    assert step(trained, trained.train_dataset.rows)[0] > loss + 0.01


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guided_top_p": 0.9}, "guided_top_p has no part"),
        ({"do_sample": False}, "do_sample has no part"),
        ({"k": None}, "k=None; guided_rows keeps"),
        ({"beta": torch.ones(12)}, "beta is a tensor"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_options_of_another_policy_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        made(**options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer_ids": []}, "an empty answer or prompt"),
        ({"candidate_ids": [[1]]}, "candidates without a log-probability each"),
        ({"answer_ids": [5]}, "not of one step per token"),
        ({"candidate_logprobs": [[-9.0] * 5] * 5}, "do not sum to 1"),
        ({"candidate_ids": None}, "has no candidate_ids; make rows by"),
    ],
)
def test_rows_that_do_not_fit_are_named(change, said):
    row = next(row for row in made() if len(row["answer_ids"]) == 5)
    with pytest.raises(ValueError, match=said):
        GuidedAnswers([row | change])


def test_a_cut_answer_keeps_its_steps_candidates():
    rows = made()
    longest = max(len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows)
    cut = GuidedAnswers(rows, max_length=longest - 2)
    assert cut.report.truncated_answers > 0
    for row in cut.rows:
        assert len(row["candidate_ids"]) == len(row["candidate_logprobs"]) == len(row["answer_ids"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "share"),
    [([], 0.5), ([LORA], 0.2)],  # of a random model, which few directions change but little
    ids=["whole", "adapter"],
)
def test_a_distilled_model_takes_on_the_guides_reward_without_it(folder, lora, share):
    lm, rm = models()
    lm.save_pretrained(folder / "lm")
    tok = tokenizer()
    asked = list(PROMPTS) * 80
    options = OPTIONS | {"temperature": 1.0}
    rows = list(guided_rows(lm, asked, reward_model=rm, tokenizer=tok, seed=1, **options))
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "eval.jsonl", made(12, temperature=1.0))
    values = [
        "loss_type=distill",
        "leaks=drop",
        "max_steps=250",
        "per_device_train_batch_size=32",
        *lora,
    ]
    values += [f"learning_rate={1e-2 if lora else 3e-3}"]
    metrics, out = train(folder, *values, model="lm")
    assert metrics["eval_loss"] < 0.8 * metrics["history"][0]["loss"]
    card = (out / "README.md").read_text()
    assert "# Language model: distill" in card and "Loss on held-out answers" in card
    exec(card.split("```python\n")[1].split("```")[0], {})
    prompts = tok(asked, return_tensors="pt", padding=True)

    def reward(model):
        torch.manual_seed(0)
        ids = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=5)
        mask = torch.cat([prompts["attention_mask"], torch.ones(len(ids), ids.shape[1])], 1)
        mask = mask[:, : ids.shape[1]].long()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            hidden = rm.transformer(ids, attention_mask=mask, position_ids=places)
        return rm.score(hidden.last_hidden_state[:, -1]).mean().item()

    if lora:
        from peft import AutoPeftModelForCausalLM as Auto
    else:
        Auto = transformers.AutoModelForCausalLM
    guided = sum(
        answer.rewards[-1]
        for answer in rgtg_fast.generate_many(
            lm,
            asked,
            reward_model=rm,
            tokenizer=tok,
            do_sample=True,
            top_k=0,
            seed=5,
            **options,
        )
    ) / len(asked)
    before, after = reward(lm), reward(Auto.from_pretrained(out).eval())
    assert guided - before > 0.5 and after - before > share * (guided - before)
