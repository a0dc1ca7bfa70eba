"""The two tasks: prompts, texts, gold reward, tokenizer and base language model."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import make_assets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rgtg_fast.demo import task as support
from rgtg_fast.demo.run import ASSETS
from study_parts import recipe


@dataclass(frozen=True)
class Sizes:
    """How much of everything: prompts to choose β on, to test on, and to draw evaluation pairs
    for; pairs to train and evaluate reward models on; samples of a policy per test prompt."""

    beta_prompts: int
    test_prompts: int
    pairs: int
    eval_pairs: int
    batch: int
    epochs: int
    draws: int
    corpus: int = 0
    lm_epochs: int = 0


@dataclass(frozen=True)
class Task:
    """Everything the study needs to know of a task."""

    name: str
    prompts: dict[str, list[str]]  # by split: train, eval, beta, test
    sample_reply: Callable[[str, random.Random], str]
    gold: Callable[[str, str, bool], float]
    tokenizer: Any
    lm: Any
    max_new_tokens: int
    learning_rate: float
    sizes: Sizes
    enumerable: bool = False
    betas: dict[str, tuple[float, ...]] = field(default_factory=dict)
    ks: tuple[int, ...] = (2, 5, 20)  # beside methods.K, at the best β of it


SUPPORT_SIZES = Sizes(60, 100, 4000, 2000, 32, 1, 1)
RECIPE_SIZES = Sizes(60, 90, 6000, 1500, 64, 3, 4, corpus=12_000, lm_epochs=3)

_REWARD = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
BETAS = {
    "ARGS": _REWARD,
    "ARGS-G": _REWARD,
    "PARGS": _REWARD,
    "PARGS-G": _REWARD,
    "FaRMA": _REWARD,
    "RAD": (4.0, 8.0, 16.0, 32.0, 64.0, 128.0),
    "GenARM": (0.06, 0.125, 0.25, 0.5, 1.0, 2.0),
}


def support_task(sizes: Sizes = SUPPORT_SIZES) -> Task:
    """The embedded task, on the language model that is shipped with the package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    splits = support.split_prompts(0)
    return Task(
        name="support",
        prompts={
            **splits,
            "beta": splits["beta"][: sizes.beta_prompts],
            "test": splits["test"][: sizes.test_prompts],
        },
        sample_reply=support.sample_reply,
        gold=support.gold_reward,
        tokenizer=AutoTokenizer.from_pretrained(ASSETS / "lm"),
        lm=AutoModelForCausalLM.from_pretrained(ASSETS / "lm", dtype=torch.float32).eval(),
        max_new_tokens=make_assets.MAX_NEW,
        learning_rate=1e-3,
        sizes=sizes,
        # Answers are five times as long as a recipe: a coarser grid around what is best.
        betas={name: grid[1:5] for name, grid in BETAS.items()},
        ks=(2, 5),
    )


def recipe_task(folder: Path, sizes: Sizes = RECIPE_SIZES) -> Task:
    """The second task; its language model is trained once and kept in `folder`."""
    prompts = recipe.all_prompts()
    random.Random(0).shuffle(prompts)
    beta, test = sizes.beta_prompts, sizes.test_prompts
    splits = {
        "beta": prompts[:beta],
        "test": prompts[beta : beta + test],
        "eval": prompts[beta + test : beta + test + 72],
        "train": prompts[beta + test + 72 :],
    }
    tokenizer = _recipe_tokenizer()
    saved = folder / "recipe_lm"
    if not (saved / "model.safetensors").exists():
        _train_recipe_lm(tokenizer, splits["train"], sizes).save_pretrained(saved)
    return Task(
        name="recipe",
        prompts=splits,
        sample_reply=recipe.sample_reply,
        gold=recipe.gold_reward,
        tokenizer=tokenizer,
        lm=LlamaForCausalLM.from_pretrained(saved, dtype=torch.float32).eval(),
        max_new_tokens=18,
        learning_rate=2e-3,
        sizes=sizes,
        enumerable=True,
        betas=BETAS,
    )


def _recipe_tokenizer() -> PreTrainedTokenizerFast:
    vocab = sorted({w for text in [*recipe.all_prompts(), *recipe.STEPS] for w in text.split()})
    ids = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *vocab])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _train_recipe_lm(tokenizer: Any, prompts: list[str], sizes: Sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    rng = random.Random(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.05,
    )
    lm = LlamaForCausalLM(config)
    corpus = [rng.choice(prompts) for _ in range(sizes.corpus)]
    replies = [recipe.sample_reply(p, rng) for p in corpus]
    starts, ends = tokenizer(corpus)["input_ids"], tokenizer(replies)["input_ids"]
    rows = [a + b + [tokenizer.eos_token_id] for a, b in zip(starts, ends, strict=True)]
    plan = list(make_assets.batches([len(r) for r in rows], 64, sizes.lm_epochs, rng))

    def loss_of(chosen: list[int]) -> torch.Tensor:
        return make_assets.lm_loss(lm, [rows[i] for i in chosen], [len(starts[i]) for i in chosen])

    make_assets.train("recipe lm", lm, plan, loss_of, lr=4e-3)
    return lm
