"""The prefill / score / commit contract of every scorer against full public forwards, and what a
scorer must not do to the reward model it was given."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import zoo
from oracle import public
from torch import nn

import rgtg_fast
from rgtg_fast.scorers import make_scorer

K, STEPS = 5, 7
METHODS = ("tree", "expand", "reencode")


def scorer_for(rm: Any, method: str = "auto", k: int = K, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make_scorer(rm, k=k, method=method, max_length=64, **options)


@torch.no_grad()
def walk(scorer: Any, reward: Any, prompts: list[torch.Tensor], seed: int = 0) -> None:
    """STEPS random steps, another slot in every row; each score against k full forwards."""
    g = torch.Generator().manual_seed(seed)
    rows = list(prompts)
    batch = zoo.left_pad(rows)
    scorer.prefill(batch["input_ids"], batch["attention_mask"])
    for _ in range(STEPS):
        ids = torch.stack([torch.randperm(zoo.VOCAB - 3, generator=g)[:K] + 3 for _ in rows])
        got = scorer.score(ids)
        assert got.dtype == torch.float32
        want = torch.stack(
            [
                reward(torch.cat([row.expand(K, -1), cand[:, None]], dim=1))
                for row, cand in zip(rows, ids, strict=True)
            ]
        )
        torch.testing.assert_close(got, want, rtol=5e-5, atol=5e-5)
        slot = torch.randint(K, (len(rows),), generator=g)
        scorer.commit(slot)
        chosen = ids.gather(1, slot[:, None])
        rows = [torch.cat(pair) for pair in zip(rows, chosen, strict=True)]


CONTRACT = [
    (rm, method)
    for rm in ("llama", "mistral", "gpt2", "opt", "gemma3", "gpt_oss", "mixtral", "deepseek_v3")
    for method in METHODS
] + [(rm, m) for rm in ("bloom", "mpt", "gpt_neo", "falcon_alibi") for m in ("expand", "reencode")]


@pytest.mark.parametrize(("rm", "method"), CONTRACT)
def test_scores_are_those_of_full_forwards(rm: str, method: str) -> None:
    scorer = scorer_for(zoo.rm(rm), method)
    assert scorer.method == method
    walk(scorer, public(zoo.rm(rm)), zoo.prompts())


@pytest.mark.parametrize("rm", ["llama", "gemma3", "deepseek_v3"])
def test_buffers_grow_where_no_length_was_announced(rm: str) -> None:
    """deepseek_v3 has keys and values of different sizes, gemma3 a mask for each kind of layer."""
    scorer = make_scorer(zoo.rm(rm), k=K, method="tree")
    walk(scorer, public(zoo.rm(rm)), zoo.prompts())
    longest = max(len(prompt) for prompt in zoo.prompts())
    assert scorer.forward.cache.capacity > longest + 1


@pytest.mark.parametrize("rm", zoo.ENCODERS)
def test_encoder_scores_are_those_of_full_forwards(rm: str) -> None:
    walk(scorer_for(zoo.rm(rm)), public(zoo.rm(rm)), zoo.prompts())


@pytest.mark.parametrize("method", METHODS)
def test_prefill_starts_anew(method: str) -> None:
    scorer = scorer_for(zoo.rm("gemma3"), method)
    walk(scorer, public(zoo.rm("gemma3")), zoo.prompts())
    walk(scorer, public(zoo.rm("gemma3")), zoo.prompts(9, (4, 11)), seed=1)


@pytest.mark.parametrize("method", METHODS)
def test_one_token_prompts(method: str) -> None:
    walk(scorer_for(zoo.rm("gpt2"), method), public(zoo.rm("gpt2")), zoo.prompts(2, (1, 1)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 64])
def test_scores_of_few_and_many_candidates(k: int, method: str) -> None:
    rm = zoo.rm("llama")
    scorer = scorer_for(rm, method, k=k)
    (row,) = zoo.prompts(3, (8,))
    scorer.prefill(row[None], torch.ones_like(row)[None])
    ids = torch.randperm(zoo.VOCAB - 3)[:k] + 3
    with torch.no_grad():
        want = public(rm)(torch.cat([row.expand(k, -1), ids[:, None]], dim=1))
    torch.testing.assert_close(scorer.score(ids[None])[0], want, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("rm", ["mpt", "bloom", "falcon_alibi", "bert", "deberta_v2"])
def test_tree_is_refused_where_it_would_be_wrong(rm: str) -> None:
    with pytest.raises(ValueError, match=r"reward_method.*tree"):
        scorer_for(zoo.rm(rm), "tree")


@pytest.mark.parametrize("window", [zoo.WINDOW, 64])
def test_window_indexed_by_slot(window: int) -> None:
    """GPT-Neo counts its window in cache slots: with siblings it is off without any error."""
    rm = zoo.build_rm("gpt_neo", window_size=window)
    walk(scorer_for(rm), public(rm), zoo.prompts())
    if window == zoo.WINDOW:
        with pytest.raises(ValueError, match="tree"):
            scorer_for(rm, "tree")


def guided(rm: Any, **options: Any) -> Any:
    batch = zoo.left_pad(zoo.prompts())
    options = {"k": 4, "max_new_tokens": 5} | options
    return rgtg_fast.generate(zoo.lm("llama"), **batch, reward_model=rm, **options)


def user_warnings(rm: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guided(rm)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize(("rm", "cost"), [("mpt", "cache"), ("bert", "forward")])
def test_one_warning_on_fallback_names_reason_and_cost(rm: str, cost: str) -> None:
    model = zoo.build_rm(rm)
    (message,) = user_warnings(model)
    assert type(model).__name__ in message
    assert cost in message
    assert "tree" in message
    assert user_warnings(model) == []


def test_no_warning_where_tree_works() -> None:
    assert user_warnings(zoo.build_rm("llama")) == []


def snapshot(rm: nn.Module) -> dict[str, Any]:
    """All that a caller may rely on staying the same."""
    return {
        "training": {n: m.training for n, m in rm.named_modules()},
        "hooks": {n: len(m._forward_hooks | m._forward_pre_hooks) for n, m in rm.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in rm.named_modules()},
        "config": copy.deepcopy(rm.config.to_dict()),
        "attention": rm.config._attn_implementation,
        "grad": {n: (p.requires_grad, p.grad is None) for n, p in rm.named_parameters()},
        "weights": {n: p.detach().clone() for n, p in rm.state_dict().items()},
    }


def assert_unchanged(rm: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(rm)
    for (name, a), b in zip(before["weights"].items(), after["weights"].values(), strict=True):
        assert torch.equal(a, b), name
    for key in before:
        if key != "weights":
            assert before[key] == after[key], key


def half_training(rm: nn.Module) -> nn.Module:
    """In train mode but for every other module, as a user with frozen parts would have it."""
    for i, module in enumerate(rm.modules()):
        module.training = i % 2 == 0
    return rm


@pytest.mark.parametrize(
    ("rm", "method"),
    [("llama", m) for m in METHODS] + [("gemma2", "tree"), ("mpt", "expand"), ("bert", "auto")],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_reward_model_is_left_as_it_was(rm: str, method: str) -> None:
    model = half_training(zoo.build_rm(rm))
    before = snapshot(model)
    guided(model, reward_method=method)
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_reward_model_is_left_as_it_was_after_an_error() -> None:
    model = half_training(zoo.build_rm("llama"))
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    before = snapshot(model)
    before["weights"] = {}
    with pytest.raises(ValueError, match=r"(?i)nan"):
        guided(model)
    after = snapshot(model)
    assert {k: after[k] for k in before if k != "weights"} == {
        k: before[k] for k in before if k != "weights"
    }


def test_reward_model_in_training_mode_scores_as_in_eval() -> None:
    model = zoo.build_rm("gpt2", resid_pdrop=0.5)
    quiet = guided(model, return_dict_in_generate=True).rewards
    model = zoo.build_rm("gpt2", resid_pdrop=0.5).train()
    assert torch.equal(guided(model, return_dict_in_generate=True).rewards, quiet)
    assert model.training


def test_language_model_is_left_as_it_was() -> None:
    lm, rm = half_training(zoo.build_lm("llama")), zoo.rm("gpt2")
    before = snapshot(lm)
    defaults = copy.deepcopy(lm.generation_config.to_dict())
    rgtg_fast.generate(lm, **zoo.left_pad(zoo.prompts()), reward_model=rm, k=4, max_new_tokens=3)
    assert_unchanged(lm, before)
    assert lm.generation_config.to_dict() == defaults


def tensor_bytes(root: Any) -> int:
    """Bytes of all tensor storages reachable from `root` but through modules."""
    seen: set[int] = set()
    storages: dict[int, int] = {}

    def visit(x: Any) -> None:
        if id(x) in seen or isinstance(x, (nn.Module, str, int, float, type)):
            return
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            for value in x.values():
                visit(value)
        elif isinstance(x, (list, tuple, set)):
            for value in x:
                visit(value)
        elif hasattr(x, "__dict__"):
            visit(vars(x))

    visit(root.__dict__)
    return sum(storages.values())


def held_after(method: str, k: int, steps: int, reserve: int | None = 60) -> int:
    """Bytes a scorer made for `reserve` tokens holds after `steps` commits on a prompt of 40."""
    prompt = zoo.prompts(3, (40,))[0][None]
    scorer = make_scorer(zoo.rm("llama"), k=k, method=method, max_length=reserve)
    scorer.prefill(prompt, torch.ones_like(prompt))
    for _ in range(steps):
        scorer.score(torch.arange(3, 3 + k)[None])
        scorer.commit(torch.tensor([k - 1]))
    return tensor_bytes(scorer)


# Keys and values of one token: 2 layers x 2 kv heads x 8 dims, fp32.
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4


def test_tree_holds_one_prefix_whatever_k() -> None:
    few, many = held_after("tree", 2, 10), held_after("tree", 40, 10)
    assert few >= 50 * TOKEN_BYTES  # it does hold the prefix and the answer
    # k own tokens, their mask and rewards may come on top; 40 prefixes (100 times that) may not
    assert many - few <= 38 * (TOKEN_BYTES + 1024)
    assert held_after("expand", 40, 10) > 20 * 50 * TOKEN_BYTES  # the measure sees such copies


def test_tree_keeps_one_token_per_commit() -> None:
    """The cache grows by one token a step, in chunks, not by k; the mask grows by k numbers."""
    k = 32
    grown = held_after("tree", k, 105, reserve=None) - held_after("tree", k, 5, reserve=None)
    assert grown <= 250 * (TOKEN_BYTES + 4 * k)
    assert 250 * (TOKEN_BYTES + 4 * k) < 100 * k * TOKEN_BYTES
