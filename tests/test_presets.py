"""Each preset against its published formula, written out: one row at a time in float64, every text
run anew, without padding, cache or anything of this package."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import zoo
from chi_square import chi_square_p
from torch import Tensor, nn

import rgtg_fast
from rgtg_fast import presets
from rgtg_fast.presets import ratio

EOS, DRAWS = zoo.EOS, 2000
PROMPTS = [torch.tensor([3, 5, 2, 7, 4]), torch.tensor([6, 2]), torch.tensor([5, 7, 7])]
pytestmark = pytest.mark.filterwarnings("ignore:.*pad_token_id == EOS")


class Models(NamedTuple):
    """A language model, classifiers of one and of three labels, and heads on the LM's states."""

    lm: Any
    rm: Any
    attributes: Any
    q: Tensor
    q1: nn.Module
    q2: nn.Module
    v: nn.Module


def build(vocab: int) -> Models:
    lm = zoo.build_lm("llama", vocab_size=vocab)
    rm = zoo.build_rm("gpt2", vocab_size=vocab)
    attributes = zoo.build_rm("llama", seed=5, vocab_size=vocab, num_labels=3)
    attributes.config.id2label = {0: "toxic", 1: "insult", 2: "threat"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        size = lm.config.hidden_size

        def mlp(outputs: int) -> nn.Module:
            layers = nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, outputs)
            return nn.Sequential(*layers)

        q = 0.3 * torch.randn(vocab, size)
        return Models(lm, rm, attributes, q, mlp(vocab), mlp(vocab), mlp(1))


@pytest.fixture(scope="module")
def many() -> Models:
    return build(zoo.VOCAB)


@pytest.fixture(scope="module")
def few() -> Models:
    return build(8)


Formula = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def top(z: Tensor, k: int) -> Tensor:
    return torch.argsort(z, descending=True, stable=True)[:k]


def with_each(ids: Tensor, tokens: Tensor) -> list[Tensor]:
    return [torch.cat([ids, token[None]]) for token in tokens]


def output(model: Any, ids: Tensor) -> Tensor:
    """What the head gives of the last hidden state of the text: [labels]."""
    base = getattr(model, model.base_model_prefix)
    return model.score(base(ids[None], use_cache=False).last_hidden_state[0, -1])


def of_pargs(m: Models, beta: float) -> Formula:
    def formula(z: Tensor, h: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        c = top(z, k)
        r = torch.cat([output(m.rm, text) for text in with_each(ids, c)])
        return c, z.log_softmax(-1)[c] + beta * r

    return formula


def of_args(m: Models, weight: float, temperature: float) -> Formula:
    def formula(z: Tensor, h: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        logits, c = z.topk(k)
        r = torch.cat([output(m.rm, text) for text in with_each(ids, c)])
        return c, (r * weight + logits) / temperature

    return formula


def of_rad(m: Models, beta: float, attribute: int | None, inverse: bool) -> Formula:
    def formula(z: Tensor, h: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        model = m.rm if attribute is None else m.attributes
        logits, c = z.topk(k)
        texts = [ids if c[i] == EOS else text for i, text in enumerate(with_each(ids, c))]
        r = torch.stack([output(model, text)[attribute or 0] for text in texts]).clamp(0, 1)
        return c, logits + beta * (1 - r if inverse else r)

    return formula


def of_fudge(m: Models, strength: float, attribute: int | None) -> Formula:
    def formula(z: Tensor, h: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        logits, c = z.topk(k)
        if attribute is None:
            x = torch.cat([output(m.rm, text) for text in with_each(ids, c)])
            logp = x - torch.log(1 + torch.exp(x))
        else:
            p = [output(m.attributes, text).softmax(-1)[attribute] for text in with_each(ids, c)]
            logp = torch.stack(p).log()
        return c, logits + strength * logp

    return formula


def of_cd_q(m: Models, strength: float) -> Formula:
    def formula(z: Tensor, h: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        c = top(z, k)
        return c, z.log_softmax(-1)[c] + strength * (m.q @ h)[c]

    return formula


def of_ilql(m: Models, beta: float) -> Formula:
    def formula(z: Tensor, h: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        c = top(z, k)
        advantage = torch.minimum(m.q1(h), m.q2(h)) - m.v(h)
        return c, z.log_softmax(-1)[c] + beta * advantage[c]

    return formula


Case = tuple[Callable[[Models, int | None], dict[str, Any]], Callable[[Models], Formula]]
CASES: dict[str, Case] = {
    "pargs": (lambda m, k: presets.pargs(m.rm, k=k), lambda m: of_pargs(m, 2.0)),
    "pargs_greedy": (lambda m, k: presets.pargs_greedy(m.rm, k=k), lambda m: of_pargs(m, 1.0)),
    "args": (lambda m, k: presets.args(m.rm, weight=1.5, k=k), lambda m: of_args(m, 1.5, 1.0)),
    "args_stochastic": (
        lambda m, k: presets.args_stochastic(m.rm, weight=0.5, k=k),
        lambda m: of_args(m, 0.5, 0.7),
    ),
    "rad": (lambda m, k: presets.rad(m.rm, beta=3.0, k=k), lambda m: of_rad(m, 3.0, None, False)),
    "rad of an attribute": (
        lambda m, k: presets.rad(m.attributes, beta=3.0, attribute="insult", k=k),
        lambda m: of_rad(m, 3.0, 1, False),
    ),
    "rad away from an attribute": (
        lambda m, k: presets.rad(m.attributes, beta=3.0, attribute=0, inverse=True, k=k),
        lambda m: of_rad(m, 3.0, 0, True),
    ),
    "cd_fudge": (
        lambda m, k: presets.cd_fudge(m.rm, strength=1.5, k=k),
        lambda m: of_fudge(m, 1.5, None),
    ),
    "cd_fudge of an attribute": (
        lambda m, k: presets.cd_fudge(m.attributes, attribute="threat", k=k),
        lambda m: of_fudge(m, 1.0, 2),
    ),
    "cd_q": (lambda m, k: presets.cd_q(m.lm, m.q, strength=1.2, k=k), lambda m: of_cd_q(m, 1.2)),
    "ilql": (
        lambda m, k: presets.ilql(m.lm, [m.q1, m.q2], m.v, beta=1.5, k=k),
        lambda m: of_ilql(m, 1.5),
    ),
}
SAMPLED = [name for name in CASES if name not in ("pargs_greedy", "args")]
cases = pytest.mark.parametrize("name", CASES)


def doubled(models: Models) -> Models:
    return Models(*(copy.deepcopy(model).double() for model in models))


def step(m: Models, formula: Formula, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Candidates and scores s, tempered, behind a text."""
    out = m.lm(ids[None], use_cache=False, output_hidden_states=True)
    z = out.logits[0, -1]
    z[zoo.PAD] = -torch.inf  # the models' generation configuration never proposes it
    return formula(z, out.hidden_states[-1][0, -1], ids, k)


@torch.no_grad()
def greedy(m: Models, formula: Formula, prompt: Tensor, k: int, steps: int) -> list[int]:
    ids = prompt
    while len(ids) < len(prompt) + steps:
        c, s = step(m, formula, ids, k)
        ids = torch.cat([ids, c[s.argmax()][None]])
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :].tolist()


@torch.no_grad()
def enumerated(m: Models, formula: Formula, prompt: Tensor, k: int) -> dict[tuple[int, ...], float]:
    """The probability of each answer of two tokens, or one that is EOS."""
    found: dict[tuple[int, ...], float] = {}
    c, s = step(m, formula, prompt, k)
    for token, p in zip(c, s.softmax(-1).tolist(), strict=True):
        if token == EOS:
            found[EOS,] = p
            continue
        after, scores = step(m, formula, torch.cat([prompt, token[None]]), k)
        for last, q in zip(after.tolist(), scores.softmax(-1).tolist(), strict=True):
            found[int(token), last] = p * q
    return found


def until_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


@cases
def test_greedy_tokens_are_those_of_the_formula(name: str, many: Models) -> None:
    preset, formula = CASES[name]
    options = preset(many, 10) | {"do_sample": False, "eos_token_id": EOS}
    batch = zoo.left_pad(PROMPTS)
    got = rgtg_fast.generate(many.lm, **batch, **options, max_new_tokens=12)
    exact = doubled(many)
    plain = many.lm.generate(**batch, do_sample=False, eos_token_id=EOS, max_new_tokens=12)
    differs = False
    for row, prompt in enumerate(PROMPTS):
        want = greedy(exact, formula(exact), prompt, 10, 12)
        width = batch["input_ids"].shape[1]
        assert until_eos(got[row, width:].tolist()) == want
        differs |= until_eos(plain[row, width:].tolist()) != want
    assert differs, "the reward changes no token: nothing is tested"


@pytest.mark.parametrize("name", ["cd_q", "ilql"])
def test_over_the_whole_vocabulary_as_published(name: str, many: Models, few: Models) -> None:
    preset, formula = CASES[name]
    batch = zoo.left_pad(PROMPTS)
    options = preset(many, None) | {"do_sample": False, "eos_token_id": EOS}
    got = rgtg_fast.generate(many.lm, **batch, **options, max_new_tokens=12)
    exact, width = doubled(many), batch["input_ids"].shape[1]
    for row, prompt in enumerate(PROMPTS):
        want = greedy(exact, formula(exact), prompt, many.lm.config.vocab_size, 12)
        assert until_eos(got[row, width:].tolist()) == want
    options = preset(few, None) | {"eos_token_id": EOS, "num_return_sequences": DRAWS}
    batch, exact = zoo.left_pad(PROMPTS[:2]), doubled(few)
    out = rgtg_fast.generate(few.lm, **batch, **options, max_new_tokens=2, seed=3)
    answers = out[:, batch["input_ids"].shape[1] :].view(2, DRAWS, 2).tolist()
    for rows, prompt in zip(answers, PROMPTS, strict=False):
        probs = enumerated(exact, formula(exact), prompt, few.lm.config.vocab_size)
        probs = {answer: p for answer, p in probs.items() if p > 0}
        assert chi_square_p(Counter(tuple(until_eos(row)) for row in rows), probs) > 1e-4


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_are_of_the_formula(name: str, few: Models) -> None:
    preset, formula = CASES[name]
    batch = zoo.left_pad(PROMPTS[:2])
    options = preset(few, 4) | {"eos_token_id": EOS, "num_return_sequences": DRAWS}
    assert options["do_sample"]
    out = rgtg_fast.generate(few.lm, **batch, **options, max_new_tokens=2, seed=3)
    answers = out[:, batch["input_ids"].shape[1] :].view(2, DRAWS, 2).tolist()
    exact = doubled(few)
    for rows, prompt in zip(answers, PROMPTS, strict=False):
        probs = enumerated(exact, formula(exact), prompt, 4)
        assert sum(probs.values()) == pytest.approx(1.0)
        assert chi_square_p(Counter(tuple(until_eos(row)) for row in rows), probs) > 1e-4


@cases
def test_generate_many_and_a_guide_give_the_same_tokens(name: str, many: Models) -> None:
    options = CASES[name][0](many, 10)
    batch, seeds = zoo.left_pad(PROMPTS), rgtg_fast.ops.split_seed(4, len(PROMPTS))
    rest = {"max_new_tokens": 6, "eos_token_id": EOS}
    want = rgtg_fast.generate(many.lm, **batch, **options, **rest, seed=seeds)
    width = batch["input_ids"].shape[1]
    answers = rgtg_fast.generate_many(many.lm, PROMPTS, **options, **rest, seed=4, batch_size=2)
    for answer in answers:
        assert answer.tokens == until_eos(want[answer.index, width:].tolist())
    of_hf = {n: options.pop(n) for n in ("do_sample", "top_k", "top_p") if n in options}
    guide = rgtg_fast.RewardGuided(**options, seed=seeds)
    assert torch.equal(many.lm.generate(**batch, custom_generate=guide, **of_hf, **rest), want)


def test_defaults_are_the_published_ones(few: Models) -> None:
    def numbers(options: dict[str, Any]) -> tuple[Any, ...]:
        return options["beta"], options["k"], options["do_sample"], options.get("temperature")

    assert numbers(presets.pargs(few.rm)) == (2.0, 10, True, 1.0)
    assert numbers(presets.pargs_greedy(few.rm)) == (1.0, 10, False, None)
    assert numbers(presets.args(few.rm)) == (1.0, 10, False, None)
    assert numbers(presets.args_stochastic(few.rm)) == (1.0, 10, True, 0.7)
    assert numbers(presets.rad(few.rm)) == (30.0, 20, True, 1.0)
    assert presets.rad(few.rm)["reward_range"] == (0.0, 1.0)
    assert numbers(presets.cd_fudge(few.rm)) == (1.0, 64, True, 1.0)
    assert numbers(presets.cd_q(few.lm, few.q)) == (1.0, None, True, 1.0)
    assert numbers(presets.ilql(few.lm, few.q1, few.v)) == (1.0, None, True, 1.0)


def test_a_generation_configuration_that_cuts_the_language_model_is_set_aside(few: Models) -> None:
    lm = copy.deepcopy(few.lm)
    lm.generation_config.update(top_k=2, top_p=0.3, temperature=0.5)
    call = {**zoo.left_pad(PROMPTS), **presets.pargs(few.rm, k=4), "max_new_tokens": 6, "seed": 0}
    assert torch.equal(rgtg_fast.generate(lm, **call), rgtg_fast.generate(few.lm, **call))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: presets.rad(m.attributes), r"presets\.rad.*attribute.*3 labels \(toxic, insult"),
        (lambda m: presets.rad(m.attributes, attribute="joy"), r"presets\.rad.*'joy' is none of"),
        (lambda m: presets.rad(m.lm), r"presets\.rad takes a classifier.*presets\.genarm"),
        (lambda m: presets.rad(str, attribute=1), r"attribute=1 is a label of a classifier"),
        (lambda m: presets.cd_fudge(m.attributes), r"presets\.cd_fudge.*one number is wanted"),
        (lambda m: presets.cd_fudge(m.rm, attribute=0), r"gives one number; leave it out"),
        (lambda m: presets.cd_q(m.rm, m.q), r"no output embeddings.*AutoModelForCausalLM"),
        (lambda m: presets.cd_q(m.lm, m.q[0]), r"heads\[0\] has shape \[32\].*RewardHead"),
        (lambda m: presets.cd_q(m.lm, m.q[:, 1:]), r"does not take the hidden states \[n, 32\]"),
        (lambda m: presets.cd_q(m.lm, m.v), r"heads\[0\] gives shape \[2, 1\].*\[n, V\] is wanted"),
        (
            lambda m: presets.cd_q(m.lm, None),
            r"heads\[0\] must be a float tensor \[V, H\] or a mod",
        ),
        (lambda m: presets.ilql(m.lm, [], m.v), r"heads is empty"),
        (lambda m: presets.ilql(m.lm, m.q1, m.q2), r"value gives shape \[2, 8\].*\[n\] is wanted"),
        (lambda m: presets.ilql(m.lm, m.q1, m.q), r"value has shape \[8, 32\].*pass a float tens"),
    ],
)
def test_what_a_preset_lacks_is_named(
    call: Callable[[Models], Any], message: str, few: Models
) -> None:
    with pytest.raises(ValueError, match=message):
        call(few)


def test_every_preset_says_its_formula_and_where_it_is_from() -> None:
    names = [name for name in presets.__all__ if hasattr(ratio, name)]
    assert len(names) >= 8
    for name in names:
        text = getattr(presets, name).__doc__
        assert "arXiv" in text and "Published:" in text and "y " in text.splitlines()[0], name
