"""SequenceMatch (arXiv 2306.05426): its loss over trees of states, its data, what it learns."""

import copy
import json
import random
import shutil

import pytest
import torch
import transformers
from tiny import EOS, gpt2_lm, gpt2_rm, llama_lm, tokenizer, vocab_size
from training import close, id_pairs, step, text_pairs, train, trainer, write_rows

from rgtg_fast.training import AnswerRows, add_backspace
from rgtg_fast.training.sequencematch import grown, match_loss
from rgtg_fast.training.trees import batch_trees, grow

BACK = vocab_size()  # the backspace's id once it is added
LM = {"gpt2": gpt2_lm, "llama": llama_lm}


def with_backspace(family="gpt2", **changes):
    """A model and a tokenizer that have the token."""
    model = LM[family](**{"initializer_range": 0.2} | changes)
    tok = copy.deepcopy(tokenizer())  # which others use as it is
    assert add_backspace(model, tok) == BACK
    return model, tok


def demonstrations(n, own=False, seed=0):
    """Rows of ids, some with backspaces in them, some of them cut before EOS."""
    rng = random.Random(seed)
    rows = []
    for number, pair in enumerate(id_pairs(n, seed)):
        row = {"prompt_ids": pair["prompt_ids"], "answer_ids": pair["chosen_ids"]}
        if number % 3 == 1:
            row["answer_ids"] = row["answer_ids"][:-1] or [5]
        if number % 3 == 2:
            row["answer_ids"] = [9, 7, BACK, BACK, 8, *row["answer_ids"]]
        if own and number % 2:
            row["own_ids"] = [11, rng.randrange(3, 200), BACK, *pair["rejected_ids"]]
        rows.append(row)
    return rows


def matched(tmp_path, rows, family="gpt2", **changes):
    model, tok = with_backspace(family)
    return trainer(tmp_path, model.double(), rows, loss_type="sequencematch", tok=tok, **changes)


def naive_loss(model, batch, args, at):
    """The objective as it is defined, with -V(s_0), each state from a forward of its own row."""
    trees, own = grown(batch, args, model.config.vocab_size, at)

    def state(tree, node):
        path = []
        while node >= 0:
            path.insert(0, tree.tokens[node])
            node = tree.parents[node]
        return model(torch.tensor([path])).logits[0, -1]

    gamma, alpha, total, likelihood = args.gamma, args.alpha, 0.0, 0.0
    for tree, given in [(t, True) for t in trees] + [(t, False) for t in own]:
        for source, action, target, before in tree.steps:
            scores, after = state(tree, source), state(tree, target)
            r = scores[action] - gamma * after.logsumexp(-1)
            total = total - gamma**before * alpha * r**2 / 4
            if given:
                # Σ γᵗ r - V(s_0), V(s_0) being the sum of these along the way.
                worth = scores.logsumexp(-1) - gamma * after.logsumexp(-1)
                total = total + gamma**before * (r - worth)
                likelihood = likelihood + scores.log_softmax(-1)[action]
        if tree.end is not None:
            node, length = tree.end
            value = state(tree, node).logsumexp(-1)
            # The same reward for ever: Σ_{t >= n} γᵗ is γⁿ / (1 - γ).
            at_end = ((1 - gamma) * value) ** 2 / (1 - gamma)
            total = total - gamma**length * alpha / 4 * at_end
    share = args.match_share if at is None or at >= args.match_after else 0.0
    count = batch["answer_mask"].sum()
    return (-share * total - (1 - share) * likelihood) / count


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("own", [False, True])
def test_loss_and_gradient_are_those_of_separate_rows(tmp_path, family, own):
    rows = demonstrations(6, own=own)
    options = {"slip_rate": 0.5, "gamma": 0.9, "alpha": 0.3, "match_share": 0.7}
    trained = matched(tmp_path, rows, family, **options)
    loss, gradients = step(trained, rows, at=3)
    trained.model.zero_grad()
    expected = naive_loss(trained.model, trained.data_collator(rows), trained.args, 3)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    named = trained.model.named_parameters()
    # Llama takes its norms in fp32, forwards and backwards.
    tolerance = 1e-10 if family == "gpt2" else 1e-6
    close(gradients, {n: p.grad for n, p in named if p.grad is not None}, tolerance)


def test_values_at_the_ends_of_answers_are_that_of_the_prompt_whoever_gave_them():
    """So that -½ V along the data and -½ along the model's own answers is -V(s_0) of either, which
    is what is left of it in the loss."""
    gamma = 0.8
    for actions in ([5, 6, EOS], [7, BACK, 8, 9, BACK, BACK, EOS]):
        tree = grow([3, 4], actions, BACK, EOS)
        values = torch.randn(len(tree.tokens), dtype=torch.float64)
        along = sum(
            gamma**s.before * (values[s.source] - gamma * values[s.target]) for s in tree.steps
        )
        node, length = tree.end
        along = along + gamma**length * (1 - gamma) * values[node] / (1 - gamma)
        torch.testing.assert_close(along, values[1], rtol=0, atol=1e-12)


def test_without_penalty_discount_and_slips_it_is_the_likelihood(tmp_path):
    rows = [r for r in demonstrations(9) if BACK not in r["answer_ids"]]
    options = {"slip_rate": 0.0, "alpha": 0.0, "gamma": 1.0, "match_share": 1.0}
    trained = matched(tmp_path, rows, **options)
    loss, _ = step(trained, rows)
    total = count = 0
    for row in rows:
        ids, start = row["prompt_ids"] + row["answer_ids"], len(row["prompt_ids"])
        logp = trained.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids)))
        count += len(row["answer_ids"])
    assert loss.item() == pytest.approx(total / count, abs=1e-10)


def test_undone_tokens_are_seen_by_nothing_but_their_own_step(tmp_path):
    tree = grow([3, 4], [5, 6, BACK, 7, 8, BACK, BACK, 9, EOS], BACK, EOS)
    assert tree.tokens == [3, 4, 5, 6, 7, 8, 9, EOS]
    nodes = batch_trees([tree], torch.device("cpu"), torch.float64)
    sees = (nodes.mask[0, 0] == 0).long()
    seen = [[tree.tokens[i] for i in row.nonzero()[:, 0].tolist()] for row in sees]
    assert seen == [
        [3],
        [3, 4],
        [3, 4, 5],
        [3, 4, 5, 6],
        [3, 4, 5, 7],
        [3, 4, 5, 7, 8],
        [3, 4, 5, 9],
        [3, 4, 5, 9, EOS],
    ]
    assert nodes.positions.tolist() == [[0, 1, 2, 3, 3, 4, 3, 4]]
    model, _ = with_backspace()
    changed = grow([3, 4], [5, 66, BACK, 7, 88, BACK, BACK, 9, EOS], BACK, EOS)
    with torch.no_grad():
        one, two = (
            model(n.ids, attention_mask=n.mask, position_ids=n.positions).logits[0]
            for n in (batch_trees([t], model.device, model.dtype) for t in (tree, changed))
        )
    kept = [0, 1, 2, 4, 6, 7]
    torch.testing.assert_close(one[kept], two[kept], rtol=0, atol=0)
    assert (one[3] - two[3]).abs().max() > 0.01 < (one[5] - two[5]).abs().max()


def test_slips_are_wrong_tokens_at_the_rate_and_hang_on_row_and_step_alone(tmp_path):
    rows = demonstrations(40)
    trained = matched(tmp_path, rows, slip_rate=0.3)
    args, collate = trained.args, trained.data_collator

    def slips(rows, at):
        trees, _ = grown(collate(rows), args, BACK + 1, at)
        bare, _ = grown(collate(rows), args_without, BACK + 1, at)
        found = []
        for tree, plain in zip(trees, bare, strict=True):
            assert tree.steps[: len(plain.steps)] == plain.steps and tree.end == plain.end
            for back in tree.steps[len(plain.steps) :]:
                assert back.action == BACK and tree.parents[back.source] == back.target
                token, (right, *_) = (
                    tree.tokens[back.source],
                    [s for s in plain.steps if s.before == back.before - 1],
                )
                assert right.source == back.target and token not in (right.action, EOS, BACK)
            found.append(
                [(s.target, tree.tokens[s.source]) for s in tree.steps[len(plain.steps) :]]
            )
        return found

    args_without = trainer(
        tmp_path, trained.model, rows, loss_type="sequencematch", tok=trained.processing_class,
        slip_rate=0.0,
    ).args  # fmt: skip
    first = slips(rows, 0)
    assert first == slips(rows, 0) != slips(rows, 1)
    assert slips(rows[7:9], 0) == first[7:9]
    actions = sum(a != BACK for row in rows for a in row["answer_ids"])
    share = sum(map(len, first)) / actions
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / actions) ** 0.5


def test_likelihood_alone_comes_first_where_it_is_asked_for(tmp_path):
    rows = demonstrations(6)
    options = {"slip_rate": 0.2, "match_after": 5, "match_share": 0.7}
    trained = matched(tmp_path, rows, **options)
    batch = trained.data_collator(rows)
    for at, share in ((0, 0.0), (4, 0.0), (5, 0.7), (None, 0.7)):
        trees, own = grown(batch, trained.args, BACK + 1, at)
        nodes = batch_trees(trees, torch.device("cpu"), torch.float64)
        logits = trained.model(
            nodes.ids, attention_mask=nodes.mask, position_ids=nodes.positions
        ).logits
        args = trained.args
        expected = match_loss(logits, trees, own, 0, args.gamma, args.alpha, share)
        found = trained.score(trained.model, batch, at).loss
        torch.testing.assert_close(found, expected / batch["answer_mask"].sum())


def test_accumulated_batches_count_by_their_tokens(tmp_path):
    """A step of 2 batches of 3 rows moves the weights as one of 6 rows does."""
    rows = demonstrations(6)
    ends = []
    for size, accumulate in ((6, 1), (3, 2)):
        trained = matched(
            tmp_path, rows, max_steps=1, per_device_train_batch_size=size, optim="sgd",
            gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        trained.train()
        ends.append(trained.model.state_dict())
    close(*ends, 1e-9)


def test_a_resumed_run_has_the_slips_of_one_that_nothing_stopped(tmp_path):
    def run():
        return matched(
            tmp_path, demonstrations(16), max_steps=4, save_strategy="steps", save_steps=2,
            slip_rate=0.5,
        )  # fmt: skip

    whole = run()
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    close(resumed.model.state_dict(), whole.model.state_dict(), 0.0)


def test_rows_are_texts_or_the_chosen_answers_of_pairs(tmp_path):
    _, tok = with_backspace()
    pair = text_pairs(1)[0]
    text = {"prompt": pair["prompt"], "text": pair["chosen"], "own": " no"}
    one, two = (AnswerRows([row], tok).rows[0] for row in (pair, text))
    assert one == {key: two[key] for key in ("prompt_ids", "answer_ids")}
    assert two["own_ids"] == [*tok(" no")["input_ids"], EOS] and two["answer_ids"][-1] == EOS
    held = AnswerRows([{"prompt": "a", "text": " hello<backspace>"}], tok, eos="keep").rows[0]
    assert held["answer_ids"][-1] == BACK
    cut = AnswerRows([two], max_length=len(two["prompt_ids"]) + 1).rows[0]
    assert len(cut["answer_ids"]) == len(cut["own_ids"]) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt_ids": [], "answer_ids": [5]}, "an empty answer, or an empty or missing prompt"),
        (
            {"prompt_ids": [5], "answer_ids": [5], "own_ids": []},
            "an empty answer, or an empty or missing prompt",
        ),
        ({"prompt": "a"}, "it needs prompt and text, or chosen and rejected"),
        ({"prompt": "a", "text": 5}, "pass strings"),
        ({"prompt_ids": [5], "answer_ids": [5, BACK, BACK]}, "1 answers hold a backspace"),
        ({"prompt_ids": [5], "answer_ids": [5], "own_ids": [BACK]}, "1 answers hold a backspace"),
        (
            {"prompt_ids": [5], "answer_ids": [7, EOS, BACK, 8]},
            "or behind EOS, which ends an answer",
        ),
        ({"prompt_ids": [5, BACK], "answer_ids": [5]}, "1 prompts hold a backspace"),
        ({"prompt_ids": [5], "answer_ids": [BACK + 1]}, f"token id {BACK + 1} and the model has"),
        (
            {"prompt_ids": [5], "answer_ids": [5], "own_ids": [BACK + 1]},
            f"token id {BACK + 1} and the model has",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, row, said):
    with pytest.raises(ValueError, match=said):
        matched(tmp_path, [row])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slip_rate": 1.5}, "slip_rate=1.5; pass 0 <= value <= 1"),
        ({"gamma": -0.1}, "gamma=-0.1; pass 0 <= value <= 1"),
        ({"match_share": 2.0}, "match_share=2.0; pass 0 <= value <= 1"),
        ({"alpha": -1.0}, "alpha=-1.0; pass 0 or more"),
        ({"match_after": -1}, "match_after=-1; pass at least 0"),
        ({"backspace": "<eos>"}, "backspace='<eos>' is the EOS token"),
        ({"backspace": "<pad>"}, "backspace='<pad>' is the PAD token"),
        ({"backspace": "<undo>"}, "backspace='<undo>' is to be one token, and the tokenizer has"),
        ({"loss_type": "distill", "slip_rate": 0.2}, "slip_rate=0.2 has no part in"),
        ({"margin": 0.5}, "margin=0.5 has no part in loss_type='sequencematch'"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, said):
    model, tok = with_backspace()
    changes = {"loss_type": "sequencematch"} | options
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, model, demonstrations(4), tok=tok, **changes)


def test_models_without_the_token_the_head_or_the_mask_are_refused(tmp_path):
    def refused(model, said, rows=None):
        rows = demonstrations(1) if rows is None else rows
        with pytest.raises(ValueError, match=said):
            trainer(tmp_path, model, rows, loss_type="sequencematch", tok=tok)

    _, tok = with_backspace()
    refused(gpt2_rm(), "no output embeddings over the vocabulary")
    refused(gpt2_lm(), f"the backspace is token {BACK} and the model has {BACK} embeddings")
    config = transformers.BloomConfig(vocab_size=BACK + 1, hidden_size=16, n_layer=1, n_head=2)
    refused(transformers.BloomForCausalLM(config), "does not tell undone tokens apart")
    config = transformers.MistralConfig(
        vocab_size=BACK + 1, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    refused(transformers.MistralForCausalLM(config), "see 4 tokens and a row has")


def test_a_forward_whose_argument_of_positions_has_another_name_is_refused(tmp_path, monkeypatch):
    model, tok = with_backspace()
    forward = type(model).forward

    def renamed(self, input_ids=None, attention_mask=None, places=None, use_cache=None, **kwargs):
        if kwargs.keys() - {"logits_to_keep"}:
            raise TypeError(f"forward() got an unexpected keyword argument {next(iter(kwargs))!r}")
        return forward(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=places, **kwargs
        )

    monkeypatch.setattr(type(model), "forward", renamed)
    with pytest.raises(ValueError, match=r"does not tell undone tokens apart.*position_ids"):
        trainer(tmp_path, model, demonstrations(4), loss_type="sequencematch", tok=tok)


@pytest.mark.slow
def test_from_the_command_line_a_model_learns_to_undo_what_is_wrong(folder):
    write_rows(folder / "train.jsonl", text_pairs(200))
    write_rows(
        folder / "eval.jsonl", [{"prompt": r["prompt"], "text": r["chosen"]} for r in held()]
    )
    values = ["loss_type=sequencematch", "max_steps=200", "learning_rate=5e-3", "slip_rate=0.3"]
    values += ["per_device_train_batch_size=16", "leaks=drop"]
    metrics, out = train(folder, *values, model="lm")
    assert metrics["eval_loss"] < 0.8 * metrics["history"][0]["loss"]
    tok = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert tok.get_vocab()["<backspace>"] == BACK == model.config.backspace_token_id
    undone = kept = total = 0
    rng = random.Random(0)
    for row in AnswerRows(held(), tok).rows:
        for at in range(len(row["answer_ids"])):
            before = row["prompt_ids"] + row["answer_ids"][:at]
            right, wrong = row["answer_ids"][at], rng.randrange(3, BACK)
            with torch.no_grad():
                found = [
                    model(input_ids=torch.tensor([[*before, token]])).logits[0, -1].softmax(-1)
                    for token in (wrong, right)
                ]
            undone += found[0][BACK].item() > 0.5
            kept += found[1][BACK].item() < 0.5
            total += 1
    assert undone > 0.6 * total and kept > 0.9 * total
    card = (out / "README.md").read_text()
    assert "# Language model: sequencematch" in card
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert json.loads((out / "metrics.json").read_text())["loss_type"] == "sequencematch"


@pytest.mark.slow
def test_an_adapter_is_saved_with_the_token_and_its_embedding(folder):
    from peft import AutoPeftModelForCausalLM

    values = ["loss_type=sequencematch", "max_steps=2", "lora={r: 4, target_modules: all-linear}"]
    _, out = train(folder, *values, model="lm", evaluate=False)
    one, two = (AutoPeftModelForCausalLM.from_pretrained(out) for _ in range(2))
    rows = [model.get_input_embeddings().weight for model in (one, two)]
    assert len(rows[0]) == BACK + 1 and torch.equal(*rows)
    assert transformers.AutoTokenizer.from_pretrained(out).get_vocab()["<backspace>"] == BACK
    exec((out / "README.md").read_text().split("```python\n")[1].split("```")[0], {})


def held():
    return text_pairs(12, seed=9)
