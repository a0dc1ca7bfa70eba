"""Token-for-token parity of `rgtg_fast.generate` with the naive loop of oracle.py."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from oracle import assert_same, decode_row, public
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

import rgtg_fast
from rgtg_fast.scorers import make_scorer

STEPS, K = 12, 4
PROMPTS = zoo.prompts()
BATCH = zoo.left_pad(PROMPTS)
WIDTH = BATCH["input_ids"].shape[1]
SEEDS = torch.tensor([11, 12, 13])
TREE_RMS = tuple(n for n in zoo.RMS if n not in zoo.NO_TREE)
EXPAND_RMS = tuple(n for n in zoo.RMS if n not in (*zoo.ENCODERS, *zoo.RECURRENT))
SAMPLED = {"do_sample": True, "temperature": 0.8}
both = pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
# For every family: a draw needs all of the log-probs and rewards, the argmax their best alone.
greedy = pytest.param(False, id="greedy", marks=pytest.mark.slow)
sampled_first = pytest.mark.parametrize("sampled", [greedy, pytest.param(True, id="sampled")])


def guided(lm: Any, rm: Any, **options: Any) -> Any:
    """`rgtg_fast.generate` on the common batch; fallback warnings are tested in test_scorers.py."""
    common = {**BATCH, "k": K, "max_new_tokens": STEPS, "return_dict_in_generate": True}
    if options.get("do_sample"):
        common |= {"seed": SEEDS, "top_k": 0}  # Hugging Face's default would be top_k=50
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return rgtg_fast.generate(lm, reward_model=rm, **(common | options))


def naive(lm: Any, reward: Any, reward_prompts: Any = None, **options: Any) -> list[Any]:
    """The oracle's rows on the common prompts."""
    shown = [None] * len(PROMPTS) if reward_prompts is None else reward_prompts
    options = {"k": K, "steps": STEPS} | options
    return [
        decode_row(lm, reward, p, seed=int(s), reward_prompt=r, **options)
        for p, s, r in zip(PROMPTS, SEEDS, shown, strict=True)
    ]


@functools.cache
def oracle(lm: str, rm: str, sampled: bool) -> tuple[int, list[Any]]:
    """An EOS id that ends a row early, and the oracle's rows for it."""
    rows = naive(zoo.lm(lm), public(zoo.rm(rm)), **(SAMPLED if sampled else {}))
    eos = rows[0].tokens[5]
    return eos, [row.until(eos) for row in rows]


def check(lm: str, rm: str, sampled: bool, method: str) -> None:
    eos, rows = oracle(lm, rm, sampled)
    extra = SAMPLED if sampled else {}
    out = guided(zoo.lm(lm), zoo.rm(rm), eos_token_id=eos, reward_method=method, **extra)
    assert_same(out, rows, WIDTH)


@sampled_first
@pytest.mark.parametrize("lm", zoo.LMS)
def test_every_lm(lm: str, sampled: bool) -> None:
    check(lm, "llama", sampled, "auto")


@sampled_first
@pytest.mark.parametrize("rm", zoo.RMS)
def test_every_rm(rm: str, sampled: bool) -> None:
    check("llama", rm, sampled, "auto")


def some(names):
    """Every third; the others are slow. By the way that is chosen, all are tried above."""
    names = list(names)
    return [n if n in names[::3] else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("rm", some(TREE_RMS))
def test_every_rm_with_tree_forced(rm: str) -> None:
    check("llama", rm, False, "tree")


@pytest.mark.parametrize("rm", some(EXPAND_RMS))
def test_every_rm_with_expand_forced(rm: str) -> None:
    check("llama", rm, False, "expand")


@pytest.mark.parametrize("rm", some(zoo.RMS))
def test_every_rm_with_reencode_forced(rm: str) -> None:
    check("llama", rm, False, "reencode")


@pytest.mark.parametrize("method", ["tree", "expand", "reencode"])
@pytest.mark.parametrize("rm", ["mistral", "gemma3", "gpt_oss"])
def test_prompt_far_longer_than_the_window(rm: str, method: str) -> None:
    prompt = zoo.prompts(5, (40,))
    rows = [decode_row(zoo.lm("gpt2"), public(zoo.rm(rm)), prompt[0], k=K, steps=20)]
    batch = zoo.left_pad(prompt)
    out = guided(zoo.lm("gpt2"), zoo.rm(rm), **batch, max_new_tokens=20, reward_method=method)
    assert_same(out, rows, 40)


@pytest.mark.parametrize("rm", zoo.RMS)
def test_method_auto_picks(rm: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        method = make_scorer(zoo.rm(rm), k=K).method
    if rm in (*zoo.ENCODERS, "mamba"):
        assert method == "reencode"
    elif rm in zoo.NO_TREE:
        assert method in ("expand", "reencode")
    else:
        assert method == "tree"


def plain(lm: Any, **options: Any) -> torch.Tensor:
    return lm.generate(**BATCH, max_new_tokens=STEPS, do_sample=False, **options)


@pytest.mark.parametrize("lm", zoo.LMS)
def test_beta_zero_is_plain_greedy(lm: str) -> None:
    model = zoo.lm(lm)
    eos = int(plain(model)[0, WIDTH + 4])
    out = guided(model, zoo.rm("llama"), beta=0.0, eos_token_id=eos)
    assert torch.equal(out.sequences, plain(model, eos_token_id=eos))


@both
def test_one_candidate_is_plain_greedy(sampled: bool) -> None:
    model = zoo.lm("qwen2")
    out = guided(model, zoo.rm("llama"), k=1, beta=3.0, **(SAMPLED if sampled else {}))
    assert torch.equal(out.sequences, plain(model))


@pytest.mark.parametrize("option", [{"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("lm", ["llama", "gpt2", "gemma3", "mixtral"])
def test_lm_cache_choice_changes_nothing(lm: str, option: dict[str, Any]) -> None:
    eos, rows = oracle(lm, "llama", False)
    assert_same(guided(zoo.lm(lm), zoo.rm("llama"), eos_token_id=eos, **option), rows, WIDTH)


@pytest.mark.parametrize("beta", [0.3, 4.0, -1.0])
def test_beta_weighs_the_reward(beta: float) -> None:
    rows = naive(zoo.lm("llama"), public(zoo.rm("gpt2")), beta=beta)
    assert_same(guided(zoo.lm("llama"), zoo.rm("gpt2"), beta=beta), rows, WIDTH)


@pytest.mark.parametrize("k", [1, 2, 33, 64])
def test_number_of_candidates(k: int) -> None:
    rows = naive(zoo.lm("llama"), public(zoo.rm("mistral")), k=k, **SAMPLED)
    assert_same(guided(zoo.lm("llama"), zoo.rm("mistral"), k=k, **SAMPLED), rows, WIDTH)


@pytest.mark.parametrize("method", ["tree", "expand", "reencode"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_bf16_rm_is_as_good_as_its_own_forward(family: str, method: str) -> None:
    rm = zoo.build_rm(family).to(torch.bfloat16)
    exact = public(copy.deepcopy(rm).float())
    out = guided(zoo.lm("llama"), rm, reward_method=method)
    ours, own = [], []
    with torch.no_grad():
        for b, prompt in enumerate(PROMPTS):
            for t in range(STEPS):
                ids = torch.cat([prompt, out.sequences[b, WIDTH : WIDTH + t + 1]])[None]
                ours.append(float(out.rewards[b, t] - exact(ids)))
                own.append(float(public(rm)(ids) - exact(ids)))
    ours, own = torch.tensor(ours), torch.tensor(own)
    assert ours.square().mean().sqrt() < 1.5 * own.square().mean().sqrt() + 2**-9
    assert out.rewards.dtype == torch.float32


class Favour(tf.LogitsProcessor):
    """Adds `bias [V]` to the logits."""

    def __init__(self, bias: torch.Tensor) -> None:
        self.bias = bias

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + self.bias


@pytest.mark.parametrize("method", ["tree", "expand", "reencode"])
@pytest.mark.parametrize("choice", ["auto", "previous", "hidden"])
def test_reward_of_eos_when_pad_is_eos(choice: str, method: str) -> None:
    """A public forward with pad == eos gives "previous", one with another pad gives "hidden"."""
    bias = torch.zeros(zoo.VOCAB)
    bias[zoo.EOS] = 3.0  # among the candidates at nearly every step
    pad_is_eos = zoo.build_rm("llama", pad_token_id=zoo.EOS)
    like = zoo.rm("llama") if choice == "hidden" else pad_is_eos
    rows = naive(zoo.lm("llama"), public(like), bias=bias, eos=(zoo.EOS,), **SAMPLED)
    assert any(row.tokens[-1] == zoo.EOS for row in rows)
    out = guided(
        zoo.lm("llama"), pad_is_eos, logits_processor=LogitsProcessorList([Favour(bias)]),
        eos_token_id=zoo.EOS, eos_reward=choice, reward_method=method, **SAMPLED,
    )  # fmt: skip
    assert_same(out, rows, WIDTH)


def test_the_two_rewards_of_eos_differ() -> None:
    """Guards the test above: on its inputs the choice must matter."""
    ids = torch.cat([PROMPTS[0], torch.tensor([zoo.EOS])])[None]
    with torch.no_grad():
        hidden = public(zoo.rm("llama"))(ids)
        previous = public(zoo.build_rm("llama", pad_token_id=zoo.EOS))(ids)
    assert (hidden - previous).abs() > 0.1


@both
@pytest.mark.parametrize("rm", ["llama", "mpt", "gpt2", "bert"])
def test_rm_sees_its_own_rendering_of_the_prompt(rm: str, sampled: bool) -> None:
    shown = zoo.prompts(21, (3, 17, 6))
    extra = SAMPLED if sampled else {}
    rows = naive(zoo.lm("llama"), public(zoo.rm(rm)), shown, **extra)
    batch = zoo.left_pad(shown)
    out = guided(
        zoo.lm("llama"), zoo.rm(rm), reward_input_ids=batch["input_ids"],
        reward_attention_mask=batch["attention_mask"], **extra,
    )  # fmt: skip
    assert_same(out, rows, WIDTH)


def _tokenizer(words: list[str], by_character: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = {w: i for i, w in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = (
        pre_tokenizers.Split(Regex("."), "isolated")
        if by_character
        else pre_tokenizers.WhitespaceSplit()
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """A word tokenizer for the LM, a character tokenizer (other ids, lengths) for the RM."""
    letters = "abcdefgh"
    words = [a + b * n for n in (1, 2) for a in letters for b in letters][: zoo.VOCAB - 3]
    lm = _tokenizer(["<pad>", "<eos>", "<unk>", *words], by_character=False)
    rm = _tokenizer(["<unk>", "<eos>", *reversed(letters), " ", "<pad>"], by_character=True)
    return lm, rm


@pytest.mark.parametrize("rm", ["deberta_v2", "bert", "llama"])
def test_rm_with_its_own_tokenizer(rm: str, tokenizers: Any) -> None:
    lm_tok, rm_tok = tokenizers
    size = len(rm_tok)
    model = zoo.build_rm(rm, vocab_size=size, pad_token_id=rm_tok.pad_token_id, eos_token_id=1)

    def reward(ids: torch.Tensor) -> torch.Tensor:
        texts = [lm_tok.decode(row, skip_special_tokens=True) for row in ids]
        alone = [rm_tok(text, return_tensors="pt")["input_ids"] for text in texts]
        return torch.cat([public(model)(row) for row in alone])

    bias = torch.zeros(zoo.VOCAB)
    bias[zoo.EOS] = 4.0
    rows = naive(zoo.lm("llama"), reward, steps=8, bias=bias, eos=(zoo.EOS,), **SAMPLED)
    assert any(row.tokens[-1] == zoo.EOS for row in rows)
    out = guided(
        zoo.lm("llama"), model, tokenizer=lm_tok, reward_tokenizer=rm_tok, max_new_tokens=8,
        logits_processor=LogitsProcessorList([Favour(bias)]), eos_token_id=zoo.EOS, **SAMPLED,
    )  # fmt: skip
    assert_same(out, rows, WIDTH)


class NaiveScorer:
    """A user's scorer: one public forward per candidate, nothing kept but the ids."""

    def __init__(self, rm: Any) -> None:
        self.reward = public(rm)

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        self.rows = [i[m.bool()] for i, m in zip(input_ids, attention_mask, strict=True)]

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = ids
        rewards = [
            self.reward(torch.cat([row.expand(ids.shape[1], -1), cand[:, None]], dim=1))
            for row, cand in zip(self.rows, ids, strict=True)
        ]
        return torch.stack(rewards)

    def commit(self, slot: torch.Tensor) -> None:
        chosen = self.ids.gather(1, slot[:, None])
        self.rows = [torch.cat(pair) for pair in zip(self.rows, chosen, strict=True)]


@both
def test_any_object_with_the_three_verbs_is_a_scorer(sampled: bool) -> None:
    eos, rows = oracle("llama", "llama", sampled)
    scorer = NaiveScorer(zoo.rm("llama"))
    extra = SAMPLED if sampled else {}
    assert_same(guided(zoo.lm("llama"), scorer, eos_token_id=eos, **extra), rows, WIDTH)


@pytest.mark.parametrize("head", ["module", "squeezed"])
def test_reward_head_passed_in(head: str) -> None:
    eos, rows = oracle("llama", "llama", False)
    rm = zoo.rm("llama")
    fn = rm.score if head == "module" else lambda hidden: rm.score(hidden)[..., 0]
    out = guided(zoo.lm("llama"), rm.model, reward_head=fn, eos_token_id=eos)
    assert_same(out, rows, WIDTH)


@pytest.mark.parametrize("method", ["tree", "expand", "reencode"])
@pytest.mark.parametrize(
    ("head", "mlp"),
    [("v_head", False), ("v_head", True), ("regression_head", False), ("score", True)],
)
def test_heads_found_on_the_rm(head: str, mlp: bool, method: str) -> None:
    config = zoo.config_of("llama")
    rm = zoo.v_headed(config, tf.LlamaPreTrainedModel, tf.LlamaModel, head, mlp)
    rm = zoo.redraw(rm, 5)
    rows = naive(zoo.lm("llama"), public(rm))
    assert_same(guided(zoo.lm("llama"), rm, reward_method=method), rows, WIDTH)


def test_rm_with_several_labels_is_refused() -> None:
    rm = zoo.build_rm("llama", num_labels=3)
    with pytest.raises(ValueError, match="3"):
        guided(zoo.lm("llama"), rm)
