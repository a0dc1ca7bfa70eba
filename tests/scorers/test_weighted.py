"""Rewards of everything that people have as one, and sums of them, against full forwards."""

import functools

import numpy as np
import pytest
import tiny
import torch
import zoo
from oracle import assert_same, decode_row, public
from torch import nn

import rgtg_fast
from rgtg_fast import Reward, WeightedRewards
from rgtg_fast.scorers import AutoregressiveScorer, VocabRewardScorer, make_scorer
from rgtg_fast.scorers.joint import JointScorer

STEPS = 8


@functools.cache
def models():
    """A language model, two reward models, and two language models as rewards."""
    lm, helpful, harmless = tiny.llama_lm(), tiny.llama_rm(seed=11), tiny.gpt2_rm(seed=12)
    return lm, helpful, harmless, tiny.llama_lm(seed=13), tiny.gpt2_lm(seed=14)


def of_answers(lm, prompt):
    """log p(answer | prompt) of rows [k, L], in float64."""

    def reward(ids):
        logprobs = lm(ids).logits[:, :-1].double().log_softmax(-1)
        return logprobs.gather(2, ids[:, 1:, None])[..., 0][:, prompt - 1 :].sum(1)

    return reward


def texts_of(ids):
    return [tiny.tokenizer().decode(row, skip_special_tokens=True) for row in ids]


def spaces_and_length(texts):
    return [0.3 * text.count(" ") + 0.05 * (len(text.encode()) % 11) for text in texts]


def guided(reward, inputs, **options):
    options = {"k": 5, "max_new_tokens": STEPS, "return_dict_in_generate": True} | options
    return rgtg_fast.generate(models()[0], **inputs, reward_model=reward, **options)


def check(reward, oracle, **options):
    """`guided` against full forwards; `oracle(prompt length)` gives rewards of ids [k, L]."""
    inputs = tiny.prompts(3, 9, 6)
    sampled = {"do_sample": True, "seed": torch.tensor([5, 6, 7])}
    for how in ({}, sampled):
        out = guided(reward, inputs, pad_token_id=0, suppress_tokens=[0], **how, **options)
        rows = []
        for i, mask in enumerate(inputs["attention_mask"]):
            own = {"do_sample": True, "seed": 5 + i} if how else {}
            prompt = inputs["input_ids"][i][mask.bool()]
            of_row = oracle(len(prompt))
            rows.append(
                decode_row(
                    models()[0], lambda ids, f=of_row: f(ids).float(), prompt, k=5, steps=STEPS,
                    eos=[tiny.EOS], **own,
                )
            )  # fmt: skip
        assert_same(out, rows, inputs["input_ids"].shape[1])


def test_a_sum_of_reward_models():
    _, a, b, *_ = models()
    one, two = public(a), public(b)
    check(
        WeightedRewards([a, b], [0.7, 0.3]), lambda p: lambda ids: 0.7 * one(ids) + 0.3 * two(ids)
    )


def test_the_implicit_reward_of_a_pair():
    policy, reference = models()[3:]

    def oracle(prompt):
        one, two = of_answers(policy, prompt), of_answers(reference, prompt)
        return lambda ids: one(ids) - two(ids)

    check((policy, reference), oracle)


def test_a_function_of_texts():
    check(
        spaces_and_length,
        lambda p: lambda ids: torch.tensor(spaces_and_length(texts_of(ids))),
        tokenizer=tiny.tokenizer(),
    )


@pytest.mark.parametrize(
    "kind, scorer",
    [
        ("genarm", AutoregressiveScorer),
        ("genarm_prefix", AutoregressiveScorer),
        ("farma", VocabRewardScorer),
    ],
)
def test_a_causal_reward_model_of_a_kind_is_its_scorer(kind, scorer):
    rm, inputs = models()[3], tiny.prompts(3, 7)
    got, want = guided(rm, inputs, reward_kind=kind), guided(scorer(rm), inputs)
    assert torch.equal(got.sequences, want.sequences) and torch.equal(got.rewards, want.rewards)


def test_a_sum_of_a_sum_clamped_of_models_pairs_functions_and_scorers():
    _, a, b, policy, reference = models()
    genarm = AutoregressiveScorer(policy)
    reward = (
        2 * (0.5 * Reward(a) - 1).clamp(-1.5, 0.5)
        + Reward(b) / 4
        + 0.1 * Reward((policy, reference))
        + WeightedRewards([spaces_and_length, genarm], [1.0, 0.2], reduction="min")
    )

    def oracle(prompt):
        first, second = public(a), public(b)
        p, r = of_answers(policy, prompt), of_answers(reference, prompt)

        def reward(ids):
            last = policy(ids[:, :-1]).logits[:, -1].log_softmax(-1).gather(1, ids[:, -1:])[:, 0]
            of_text = torch.tensor(spaces_and_length(texts_of(ids)))
            total = 2 * (0.5 * first(ids) - 1).clamp(-1.5, 0.5) + second(ids) / 4
            return total + 0.1 * (p(ids) - r(ids)) + torch.minimum(of_text, 0.2 * last)

        return reward

    check(reward, oracle, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("reduction", ["mean", "min", "pessimistic"])
def test_ensembles(reduction):
    rms = [models()[1], models()[2], tiny.llama_rm(seed=17)]
    penalty = {"penalty": 0.7} if reduction == "pessimistic" else {}

    def oracle(ids):
        each = torch.stack([public(rm)(ids).double() for rm in rms])
        if reduction == "min":
            return each.min(0).values
        spread = each.std(0, correction=0) if penalty else 0.0
        return each.mean(0) - penalty.get("penalty", 0.0) * spread

    check(WeightedRewards(rms, reduction=reduction, **penalty), lambda p: oracle)


def test_weights_may_differ_from_prompt_to_prompt():
    """In `generate`, for each of several answers, and in `generate_many`, whatever else runs."""
    lm, a, b, *_ = models()
    weights = torch.tensor([1.0, -0.5, 0.25])
    prompts = [torch.arange(3, 3 + n) for n in (4, 7, 3)]
    inputs = zoo.left_pad(prompts)
    reward = WeightedRewards([a, b], [weights, 0.5], offset=weights)
    alone = [
        guided(w * Reward(a) + 0.5 * Reward(b) + w, {"input_ids": p[None]})
        for w, p in zip(weights.tolist(), prompts, strict=True)
    ]
    out = guided(reward, inputs)
    copies = guided(reward, inputs, num_return_sequences=2, do_sample=True, temperature=1e-6)
    options = {"k": 5, "max_new_tokens": STEPS, "batch_size": 2}
    many = sorted(
        rgtg_fast.generate_many(lm, prompts, reward_model=reward, **options), key=lambda x: x.index
    )
    for i, want in enumerate(alone):
        for got in (out.rewards[i], copies.rewards[2 * i], copies.rewards[2 * i + 1]):
            torch.testing.assert_close(got, want.rewards[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.tensor(many[i].rewards), want.rewards[0], rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match=r"weights\[0\] has 3 values for 2 prompts"):
        guided(reward, tiny.prompts(3, 4))
    errors = [
        x.error
        for x in rgtg_fast.generate_many(lm, [*prompts, prompts[0]], reward_model=reward, **options)
    ]
    assert [e for e in errors if e] == ["weights[0] has 3 values, and this is prompt 3"]


class Plain:
    """A scorer without rows: the reward of a token is in a table."""

    def __init__(self, table):
        self.table = table

    def prefill(self, input_ids, attention_mask):
        pass

    def score(self, ids):
        return self.table[ids]

    def commit(self, slot):
        pass


def test_scorers_without_rows_are_parts_too():
    lm, a, *_ = models()
    table = torch.randn(tiny.vocab_size(), generator=torch.Generator().manual_seed(1))
    reward = WeightedRewards([Plain(table), a], [torch.tensor([0.5, 2.0, 1.0]), 1.0])
    prompts = [torch.arange(3, 3 + n) for n in (4, 7, 3)]
    with pytest.warns(UserWarning, match="in padded batches of 2"):
        many = list(
            rgtg_fast.generate_many(
                lm, prompts, reward_model=reward, batch_size=2, k=5, max_new_tokens=STEPS
            )
        )
    for i, weight in enumerate((0.5, 2.0, 1.0)):
        alone = guided(WeightedRewards([Plain(weight * table), a]), {"input_ids": prompts[i][None]})
        torch.testing.assert_close(
            torch.tensor(many[i].rewards), alone.rewards[0], rtol=1e-4, atol=1e-4
        )


def test_a_head_on_the_language_model_shares_its_forwards_in_a_sum(monkeypatch):
    lm, a, *_ = models()
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0)) / 32**0.5
    head = rgtg_fast.RewardHead(lm, weight)

    def oracle(ids):
        hidden = lm.model(ids).last_hidden_state[:, -1]
        return hidden @ weight + 0.5 * public(a)(ids)

    reward = WeightedRewards([head, a], [1.0, 0.5])
    check(reward, lambda p: oracle)
    made = []
    plain = JointScorer.__init__
    monkeypatch.setattr(JointScorer, "__init__", lambda *a, **o: made.append(plain(*a, **o)))
    guided(WeightedRewards([head, a, head]), tiny.prompts(3))
    assert len(made) == 1


def test_a_sum_of_one_model_twice_runs_it_twice_and_is_right():
    _, a, *_ = models()
    got, want = guided(Reward(a) + Reward(a), tiny.prompts(5)), guided(a, tiny.prompts(5), beta=2.0)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.rewards, 2 * want.rewards)


def test_several_labels_make_a_weighted_sum():
    """As ArmoRM's and RAD's: the numbers of one head, added up."""
    rm = zoo.build_rm("llama", num_labels=4, problem_type="regression")
    rm.config.id2label = dict(enumerate(["kind", "safe", "short", "true"]))
    lm, batch = zoo.lm("llama"), zoo.left_pad(zoo.prompts())
    options = {"k": 4, "max_new_tokens": 4, "return_dict_in_generate": True}
    for label, weights in (
        (["kind", 3], [1.0, 0, 0, 1.0]),
        ({"safe": 0.7, 2: -0.3}, [0, 0.7, -0.3, 0]),
    ):
        out = rgtg_fast.generate(lm, **batch, reward_model=rm, reward_label=label, **options)
        ids = torch.cat([zoo.prompts()[0], out.sequences[0, -4:]])
        with torch.no_grad():
            logits = rm(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
        want = logits.double() @ torch.tensor(weights, dtype=torch.float64)
        torch.testing.assert_close(out.rewards[0, -1], want.float(), rtol=1e-3, atol=1e-3)


def test_a_regression_layer_gives_its_numbers_as_they_are():
    """ArmoRM's head has another name, and its configuration says nothing of it."""
    rm = tiny.llama_rm()
    rm.regression_layer = nn.Linear(32, 3, bias=False)
    del rm.score
    out = guided(rm, tiny.prompts(4), reward_label=[0, 2], max_new_tokens=1)
    hidden = rm.model(out.sequences).last_hidden_state[0, -1]
    want = rm.regression_layer(hidden)[[0, 2]].sum()
    torch.testing.assert_close(out.rewards[0, 0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [2, np.float32(2), np.float64(2), torch.tensor(2.0)])
def test_arithmetic_is_that_of_numbers(factor):
    a, b = AutoregressiveScorer(models()[3]), Reward(models()[1])
    reward = (factor * a - b) / 2 + 1 - (3 - b * factor)
    rewards = [torch.tensor([[0.5]]), torch.tensor([[2.0]]), torch.tensor([[2.0]])]
    assert [getattr(p, "model", p) for p in reward.parts][1:] == [b.model, b.model]
    assert float(reward.combination(rewards, None)) == (2 * 0.5 - 2) / 2 + 1 - (3 - 2 * 2)


def test_a_candidate_that_one_part_has_no_token_for_is_none():
    combined = WeightedRewards(["http://a", "http://b"], [0.0, -1.0]).combination
    rewards = [torch.tensor([[-torch.inf, 1.0]]), torch.tensor([[1.0, -torch.inf]])]
    assert combined(rewards, None).tolist() == [[-torch.inf, -torch.inf]]


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda a: WeightedRewards([a, a], [1.0]), "weights has 1 values for 2 parts"),
        (lambda a: WeightedRewards([]), "parts is empty"),
        (lambda a: WeightedRewards([a], [float("nan")]), r"weights\[0\] must be a finite float"),
        (
            lambda a: WeightedRewards([a], [torch.tensor([[1.0]])]),
            r"got a torch.float32 tensor \[1",
        ),
        (lambda a: WeightedRewards([a], ["1"]), r"weights\[0\] must be .* got '1'"),
        (lambda a: WeightedRewards([a], reduction="max"), "reduction='max'; pass one of sum, mean"),
        (lambda a: WeightedRewards([a], penalty=1.0), "with reduction='pessimistic'"),
        (lambda a: Reward(a).clamp(1, 1), r"clamp: \(1, 1\); pass two finite numbers"),
    ],
)
def test_unclear_sums_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made(models()[1])


@pytest.mark.parametrize(
    "reward, options, message",
    [
        (lambda m: [m[1], m[2]], {}, r"list of \(LlamaForSequenceClassification, GPT2.*Weighted"),
        (lambda m: (m[1], m[2]), {}, r"pair \(policy, reference\) of causal language models"),
        (lambda m: (m[3],), {}, r"tuple of \(LlamaForCausalLM\)"),
        (lambda m: (m[3], m[4]), {"reward_label": 0}, "reward_label is for a classifier"),
        (lambda m: (m[3], m[4]), {"reward_kind": "genarm"}, "for one causal language model"),
        (lambda m: m[1], {"reward_kind": "genarm"}, "is for a causal language model, and"),
        (lambda m: m[3], {"reward_kind": "farm"}, "='farm'; pass one of farma, soft_q, genarm"),
        (lambda m: m[3], {"reward_kind": "farma", "reward_label": 0}, "reward_label is for a clas"),
        (lambda m: spaces_and_length, {}, "needs the language model's tokenizer.*pass tokenizer="),
        (lambda m: "ftp://x", {"tokenizer": tiny.tokenizer()}, "pass the http:// or https:// URL"),
        (
            lambda m: WeightedRewards([m[1], m[2]]),
            {"reward_label": 1},
            r"pass rgtg_fast.Reward\(part, reward_label=...\) as that part",
        ),
        (lambda m: Reward(Reward(m[1])), {}, "is no Reward and no sum itself"),
        (lambda m: m[1], {"reward_label": [0, 1]}, "is for a model with several labels"),
        (lambda m: 3, {}, "reward_model must be a torch module or a scorer"),
    ],
)  # fmt: skip
def test_unclear_rewards_are_refused(reward, options, message):
    with pytest.raises(ValueError, match=message):
        guided(reward(models()), tiny.prompts(3), **options)


def test_a_scorer_that_stands_twice_is_refused():
    scorer = AutoregressiveScorer(models()[3])
    with pytest.raises(ValueError, match=r"AutoregressiveScorer stands twice.*add up its weights"):
        guided(scorer + 0.5 * scorer, tiny.prompts(3))


@pytest.mark.parametrize(
    "given, message",
    [
        (lambda texts: [1.0], r"reward_model <lambda> gave 1 scores for 5 texts"),
        (lambda texts: None, "gave None for 5 texts; it must give a list of floats"),
        (lambda texts: ["high"] * len(texts), "gave .*high.* for 5 texts"),
        (lambda texts: [float("nan")] * len(texts), "row 0, step 0: the reward model gave"),
    ],
)
def test_functions_that_give_no_rewards_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        guided(given, tiny.prompts(3), tokenizer=tiny.tokenizer())


def test_a_pair_behind_other_tokens_is_refused():
    other = tiny.tokenizer().train_new_from_iterator(["a b c"], 290)
    options = {"tokenizer": tiny.tokenizer(), "reward_tokenizer": other}
    with pytest.raises(ValueError, match="have different tokens, and a causal language model"):
        guided(models()[3:], tiny.prompts(3), **options)


@pytest.mark.parametrize("line", ["score", "commit", "prefill"])
def test_an_interrupt_leaves_the_parts_ready_for_the_next_call(line):
    class Breaking(Plain):
        def __getattribute__(self, name):
            if name == line and object.__getattribute__(self, "armed"):
                raise KeyboardInterrupt
            return super().__getattribute__(name)

    genarm, breaking = AutoregressiveScorer(models()[3]), Breaking(torch.zeros(tiny.vocab_size()))
    reward = genarm + WeightedRewards([breaking])
    breaking.armed = False
    want = guided(reward, tiny.prompts(4))
    breaking.armed = True
    with pytest.raises(KeyboardInterrupt):
        guided(reward, tiny.prompts(4))
    assert not genarm.handles and "static" not in genarm.__dict__
    breaking.armed = False
    assert torch.equal(guided(reward, tiny.prompts(4)).rewards, want.rewards)


def test_rows_that_joined_some_parts_alone_leave_them():
    class Full(AutoregressiveScorer):
        def _join(self, prompts):
            if len(self.handles) + len(prompts) > 1:
                raise KeyboardInterrupt
            super()._join(prompts)

    policy, reference = models()[3:]
    scorer = make_scorer(AutoregressiveScorer(policy) + Full(reference), k=3)
    (one,) = scorer.join([torch.tensor([3, 4, 5])])
    ids = torch.tensor([[5, 6, 7]])
    want = scorer.score(ids)
    with pytest.raises(KeyboardInterrupt):
        scorer.join([torch.tensor([6, 7])])
    assert [part.handles for part in scorer.parts] == [[0], [0]]
    torch.testing.assert_close(scorer.score(ids, handles=[one]), want)
