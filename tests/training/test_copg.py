"""Contrastive Policy Gradient (arXiv 2406.19185): a language model trained on scores of answers."""

import json
import shutil

import pytest
import torch
import transformers
from on_policy import PROMPTS, config, polite, rows
from safetensors.torch import load_file
from tiny import gpt2_lm, tokenizer
from training import close, id_pairs, normal, step, text_pairs, train, trainer, write_rows

from rgtg_fast.on_policy import train_on_policy
from rgtg_fast.training.objectives import copg_loss

SIDES = ("chosen_ids", "rejected_ids")
LORA = "lora={r: 4, target_modules: all-linear}"


def scored(pairs):
    """Rows with scores of eighths, which fp32 holds as they are."""
    return [
        row | {"chosen_score": (n % 5) / 8, "rejected_score": (n % 3 - 1) / 8}
        for n, row in enumerate(pairs)
    ]


def test_the_loss_is_the_published_one_and_its_gradient_that_of_equation_19():
    log_ratio, scores, beta = normal(6, 2).requires_grad_(), normal(6, 2, seed=1), 0.3
    loss = copg_loss(log_ratio, scores, beta)
    expected, weights = 0.0, torch.zeros(6, 2, dtype=torch.float64)
    for n in range(6):
        (one, other), (r, s) = log_ratio[n].tolist(), scores[n].tolist()
        half, half_other = r - beta / 2 * one, s - beta / 2 * other
        expected += (half - half_other) * one + (half_other - half) * other
        weights[n, 0] = (r - beta * one) - (s - beta * other)
        weights[n, 1] = -weights[n, 0]
    assert loss.item() == pytest.approx(-expected / 6, abs=1e-12)
    loss.backward()
    torch.testing.assert_close(log_ratio.grad, -weights / 6, rtol=0, atol=1e-12)


def test_its_optimum_is_the_tilted_reference_whatever_the_pairs_were_drawn_from():
    """The paper's bandit: three arms, and two distributions of data far from the optimum."""
    reward, beta = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64), 0.5
    reference = torch.log(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    gen = torch.Generator().manual_seed(0)
    drawn = [
        torch.multinomial(torch.tensor(p), 2000, replacement=True, generator=gen)
        for p in ([0.1, 0.2, 0.7], [0.05, 0.05, 0.9])
    ]
    pairs = torch.stack(drawn, 1)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = copg_loss((logits.log_softmax(0) - reference)[pairs], reward[pairs], beta)
        loss.backward()
        return loss

    optimiser.step(closure)
    expected = (reference + reward / beta).softmax(0)
    torch.testing.assert_close(logits.softmax(0).detach(), expected, rtol=0, atol=1e-5)


def test_the_objective_takes_whole_answers_against_what_the_model_began_as(tmp_path):
    pairs, beta = scored(id_pairs(5)), 0.2
    model = gpt2_lm(initializer_range=0.2).double()
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    trained = trainer(tmp_path, model, pairs, loss_type="copg", beta=beta)
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter += 0.05 * normal(*parameter.shape, seed=n)

    def logprobs(of, row, side):
        ids, start = row["prompt_ids"] + row[side], len(row["prompt_ids"])
        logits = of(torch.tensor([ids])).logits[0].log_softmax(-1)
        return torch.stack([logits[i - 1, ids[i]] for i in range(start, len(ids))])

    loss, gradients = step(trained, trained.train_dataset.rows)
    other = gpt2_lm(initializer_range=0.2).double()
    other.load_state_dict(begin)
    model.zero_grad()
    total = 0.0
    for row in pairs:
        ratios = [
            (logprobs(model, row, side) - logprobs(other, row, side).detach()).sum()
            for side in SIDES
        ]
        r, s = row["chosen_score"], row["rejected_score"]
        gap = (r - beta / 2 * ratios[0]) - (s - beta / 2 * ratios[1])
        total = total - (gap * ratios[0] - gap * ratios[1]) / len(pairs)
    total.backward()
    torch.testing.assert_close(loss, total.detach(), rtol=1e-10, atol=1e-10)
    expected = {n: p.grad for n, p in model.named_parameters()}
    close(gradients, expected, 1e-10)


def test_a_resumed_run_keeps_the_reference_of_its_beginning(tmp_path):
    def run(**changes):
        pairs = scored(text_pairs(16))
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "beta": 1.0}
        return trainer(tmp_path, train=pairs, loss_type="copg", **options | changes)

    whole = run()
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    close(resumed.model.state_dict(), whole.model.state_dict(), 0.0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "48 of 48 rows have no chosen_score and rejected_score"),
        (["margin=0.5"], "margin=0.5 has no part in loss_type='copg'"),
        (["label_smoothing=0.1"], "label_smoothing=0.1 has no part in loss_type='copg'"),
        (["frozen=true"], "frozen: true fits a head only"),
    ],
)
def test_what_it_cannot_use_is_refused(folder, overrides, said):
    with pytest.raises(SystemExit, match=said):
        train(folder, "loss_type=copg", *overrides, model="lm", evaluate=False)


def test_a_score_that_is_no_number_is_named(folder):
    write_rows(folder / "train.jsonl", [row | {"chosen_score": "x"} for row in text_pairs(3)])
    with pytest.raises(SystemExit, match="line 1: chosen_score is 'x'; pass a finite number"):
        train(folder, "loss_type=copg", model="lm", evaluate=False)


def test_rounds_do_not_train_it(folder):
    with pytest.raises(ValueError, match="loss_type='copg' trains a language model"):
        train_on_policy(config(folder, model="lm", loss_type="copg"))


@pytest.mark.parametrize("lora", [[], [LORA]])
def test_the_model_and_its_card_need_no_guide(folder, capsys, lora):
    write_rows(folder / "train.jsonl", scored(text_pairs(24)))
    write_rows(folder / "eval.jsonl", scored(text_pairs(8, seed=3)))
    metrics, out = train(folder, "loss_type=copg", "max_steps=2", *lora, model="lm")
    assert metrics["eval"]["full"]["pairs"] == 8
    card = (out / "README.md").read_text()
    assert "# Language model: copg" in card and "arXiv 2406.19185" in card
    exec(card.split("```python\n")[1].split("```")[0], {})


@pytest.mark.slow
def test_on_the_answers_of_a_round_it_learns_to_please_the_judge(folder):
    """From what the guided policy gave, to a language model that needs no guide."""
    train_on_policy(config(folder, own={"rounds": 1, "samples": 12, "beta": 1.0}))
    pairs = folder / "out" / "round-1" / "own_pairs.jsonl"
    assert {"chosen_score", "rejected_score"} <= rows(pairs)[0].keys()
    values = ["loss_type=copg", f"train={pairs}", f"output_dir={folder / 'tuned'}", "beta=0.05"]
    values += ["max_steps=150", "learning_rate=5e-3", "per_device_train_batch_size=32"]
    train(folder, *values, model="lm", evaluate=False)
    tok = tokenizer()
    prompts = tok(list(PROMPTS) * 40, return_tensors="pt", padding=True)

    def score(name):
        lm = transformers.AutoModelForCausalLM.from_pretrained(folder / name).eval()
        torch.manual_seed(0)
        out = lm.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=6)
        scores = torch.tensor(polite(tok.batch_decode(out, skip_special_tokens=True)))
        return scores.mean().item(), scores.std().item() / len(scores) ** 0.5

    (before, error), (after, other) = score("lm"), score("tuned")
    assert after - before > 4 * (error**2 + other**2) ** 0.5
    assert not torch.equal(
        *(
            load_file(folder / name / "model.safetensors")["transformer.wte.weight"]
            for name in ("lm", "tuned")
        )
    )
    assert json.loads((folder / "tuned" / "metrics.json").read_text())["loss_type"] == "copg"
